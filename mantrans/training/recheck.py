"""A step computed twice: what must have the same bits has them, unless a processor or its memory
computes wrongly."""

from __future__ import annotations

import torch
from torch import Tensor

from mantrans.distributed.world import World
from mantrans.errors import MantransError, RanksError

COMPARED = ("loss", "gradient norm")


def require_same(first: Tensor, second: Tensor, step: int, world: World) -> None:
    """MantransError unless both have the same bits; this waits for the device.

    first, second (2,) float64: the loss and the gradient norm of all ranks' micro-batches.
    """
    for name, a, b in zip(COMPARED, first.tolist(), second.tolist(), strict=True):
        if a.hex() != b.hex():  # two NaN are the same
            kind = RanksError if world.size > 1 else MantransError  # all ranks raise the same
            raise kind(
                f"step {step}: {name}: expected the same bits when computed twice, got {a!r} and "
                f"{b!r} on {_where(first.device, world)}: a processor or its memory computes "
                f"wrongly; go on elsewhere, and test this one; {world.last_saved}"
            )


def _where(device: torch.device, world: World) -> str:
    if world.size > 1:
        return f"{world.size} processes, of which one is wrong"
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else "cpu"
