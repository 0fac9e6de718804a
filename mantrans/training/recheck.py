"""A step computed twice: what must have the same bits has them, unless a processor or its memory
computes wrongly."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from mantrans.distributed.world import World
from mantrans.errors import MantransError, RanksError

# The rank's own first: it says which rank is wrong.
NAMES = ("loss of its micro-batches", "loss", "gradient norm")


def require_same(first: Tensor, second: Tensor, step: int, world: World) -> None:
    """The same error on every rank, unless both have the same bits on each: RanksError, of one
    process MantransError. Waits for the device, and for all ranks.

    first, second (3,) float64: NAMES; the last two of all ranks together.
    """
    ours = [[x.hex() for x in results.tolist()] for results in (first, second)]  # NaN is "nan"
    everyone = [json.loads(text) for text in world.texts("recheck", json.dumps(ours))]
    for name, *by_rank in zip(NAMES, *(zip(*pair, strict=True) for pair in everyone), strict=True):
        for rank, (a, b) in enumerate(by_rank):
            if a != b:
                kind = RanksError if world.size > 1 else MantransError
                where = _where(rank, name, first.device, world)
                raise kind(
                    f"step {step}: {name}: expected the same bits when computed twice, got "
                    f"{float.fromhex(a)!r} and {float.fromhex(b)!r} on {where}: a processor or its "
                    f"memory computes wrongly; go on elsewhere, and test this one; "
                    f"{world.last_saved}"
                )


def _where(rank: int, name: str, device: torch.device, world: World) -> str:
    if world.size > 1:
        return f"rank {rank}" if name == NAMES[0] else f"one of {world.size} ranks"
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else "cpu"
