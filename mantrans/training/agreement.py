"""Compares the ranks: what they start with, and now and then their weights.

Every rank gets what all have, compares it, and raises the same error, so that none goes on.
"""

from __future__ import annotations

import json
import platform
from collections import Counter
from importlib import metadata
from typing import Any

import torch

from mantrans.config import Config
from mantrans.distributed.world import World
from mantrans.errors import RanksError
from mantrans.parameters import Parameters

# May differ from machine to machine: what is in them is compared.
PLACES = {
    "data.path", "data.val_path", "data.cache_dir", "data.tokenizer", "training.init_from",
    "training.output_dir", "training.checkpoint_dir", "training.device",
}  # fmt: skip
_PACKAGES = ("torch", "triton", "numpy", "mantrans")
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_PIECE = 1 << 20  # elements at a time
WORKSPACE = 3 * 8 * _PIECE  # bytes of a comparison of weights


def agree(world: World, key: str, facts: dict[str, Any]) -> None:
    """RanksError unless all ranks have the same facts. Waits for all ranks.

    key: of what they are. facts: plain data by name, as a message should show them.
    """
    if world.size == 1:
        return
    first, *others = [json.loads(text) for text in world.texts(key, json.dumps(facts))]
    for rank, theirs in enumerate(others, start=1):
        for name in first:
            if theirs.get(name) != first[name]:
                raise RanksError(
                    f"rank {rank}: {name}: expected {_shown(first[name])}, as rank 0 has, "
                    f"got {_shown(theirs.get(name))}"
                )


def of_config(config: Config) -> dict[str, Any]:
    """The fields that must be the same, by name."""
    fields = {
        f"{section}.{name}": value
        for section, values in config.to_dict().items()
        for name, value in values.items()
    }
    return {name: value for name, value in fields.items() if name not in PLACES}


def of_software() -> dict[str, Any]:
    """The versions that must be the same."""
    found: dict[str, Any] = {"version of python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[f"version of {package}"] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[f"version of {package}"] = None
    return found


def require_same_weights(world: World, parameters: Parameters, step: int) -> None:
    """RanksError, which names the ranks and the first parameter, unless all weights have the same
    bits. They are summed, each times an odd number that depends on its place, modulo 2^64."""
    if world.size == 1:
        return
    sums = world.texts("weights", json.dumps(checksums(parameters)))
    common = Counter(sums).most_common(1)[0][1]
    right = next(text for text in sums if sums.count(text) == common)
    if common == world.size:
        return
    odd = [rank for rank, text in enumerate(sums) if text != right]
    ours, theirs = json.loads(right), json.loads(sums[odd[0]])
    name = next(name for name in ours if ours[name] != theirs[name])
    raise RanksError(
        f"step {step}: {_ranks(odd)} other weights than rank {sums.index(right)}, first in {name}: "
        f"a processor or its memory computes wrongly; {world.last_saved}"
    )


def checksums(parameters: Parameters) -> dict[str, int]:
    """A number for the bits of each parameter's weights; one changed bit changes it."""
    sums = []
    for _, view in parameters.named(parameters.weights):
        bits = view.flatten().view(_INTEGERS[view.element_size()])
        total = torch.zeros((), dtype=torch.int64, device=view.device)
        for start in range(0, len(bits), _PIECE):
            piece = bits[start : start + _PIECE].long()
            first = 2 * start + 1
            total += (
                piece * torch.arange(first, first + 2 * len(piece), 2, device=view.device)
            ).sum()
        sums.append(total)
    return dict(zip(parameters.by_name, torch.stack(sums).tolist(), strict=True))


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _ranks(numbers: list[int]) -> str:
    return ("ranks {} have" if len(numbers) > 1 else "rank {} has").format(
        ", ".join(map(str, numbers))
    )
