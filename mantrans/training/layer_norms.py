"""The gradient's norm layer by layer, for the curves of a run.

    blocks.3 and its like    of all parameters of one block; outside blocks of one layer
    attention.qkv and so on  of one kind of parameter in all blocks, weights and biases together

The flat gradient buffer is read once, in short rows: a parameter, and what a rank owns of it, is a
number of whole rows. So the norms have the same bits with any number of ranks on a CPU, whatever
they divide. Nothing here is launched but at the steps that are logged, and nothing waits.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mantrans.distributed.shard import PIECES
from mantrans.kernels import reference
from mantrans.parameters import ALIGNMENT, Parameters

LONGEST_ROW = PIECES * ALIGNMENT  # which every bucket is a multiple of
READ_AT_ONCE = 2**20  # elements, of which float64 copies are made


class Norms(NamedTuple):
    """L2 norms before clipping, with six digits."""

    by_layer: dict[str, float]
    by_kind: dict[str, float]


class LayerNorms:
    """`measure` after a step, then `read` once its results have been waited for."""

    def __init__(self, parameters: Parameters) -> None:
        p = self.parameters = parameters
        self.offsets = {name: p.offset(name) for name in sorted(p.by_name, key=p.offset)}
        pieces = [(b.stop - b.start) // PIECES for b in p.buckets.values()]
        self.row = math.gcd(LONGEST_ROW, *self.offsets.values(), *pieces)

    def measure(self) -> Tensor:
        """(rows,) float64 on the device: the norm of each row of the last step's gradient. Every
        rank calls it."""
        p = self.parameters
        norms = torch.zeros(
            len(p.weights) // self.row, dtype=torch.float64, device=p.weights.device
        )
        for part in p.shard.parts:
            rows = p.gradients_of(part).view(-1, self.row)
            own = norms[part.where.start // self.row : part.where.stop // self.row]
            is_wide = rows.dtype == torch.float64
            n = READ_AT_ONCE // self.row if is_wide or not rows.is_cuda else len(rows)
            for few, into in zip(rows.split(n), own.split(n), strict=True):
                if is_wide:  # whose squares may be too large, or too small
                    into.copy_(reference.gradient_norms(few.reshape(-1), len(few)))
                else:
                    torch.linalg.vector_norm(few, dim=1, dtype=torch.float64, out=into)
        return p.shard.world.sum(norms)

    def read(self, norms: Tensor) -> Norms:
        """What `measure` has returned, by layer and by kind. This waits for the device."""
        starts = [offset // self.row for offset in self.offsets.values()]
        with np.errstate(invalid="ignore", over="ignore"):  # a gradient that is not finite
            each = np.hypot.reduceat(norms.cpu().numpy(), starts)
        of = dict(zip(self.offsets, each.tolist(), strict=True))
        inside = [name for name in self.parameters.by_name if name.startswith("blocks.")]
        return Norms(
            _joined({name: of[name] for name in self.parameters.by_name}, layer_of),
            _joined({name: of[name] for name in inside}, kind_of),
        )


def layer_of(name: str) -> str:
    """ "blocks.3" of any parameter in block 3; outside blocks its layer, such as "final_norm"."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "blocks" else ".".join(parts[:-1])


def kind_of(name: str) -> str:
    """ "attention.qkv" of that weight and that bias in any block."""
    return ".".join(name.split(".")[2:-1])


def _joined(norms: dict[str, float], group_of: Callable[[str], str]) -> dict[str, float]:
    groups: dict[str, list[float]] = defaultdict(list)
    for name, norm in norms.items():
        groups[group_of(name)].append(norm)
    return {group: float(f"{math.hypot(*members):.6g}") for group, members in groups.items()}
