"""Guards: further conditions for a step's update, evaluated on the device."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from mantrans.config.arguments import checked
from mantrans.config.section import Size, ZScore


class Guard(Protocol):
    """Allows or refuses a step."""

    def allows(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """0-d bool for a step of this loss and gradient norm (0-d)."""
        ...

    def state(self) -> dict[str, Tensor]:
        """The tensors that describe earlier steps, for a checkpoint."""
        ...


class Switch:
    """A guard that refuses every update while it is off: steps run, and no weight changes."""

    def __init__(self, device: torch.device) -> None:
        self.on = torch.ones((), dtype=torch.bool, device=device)

    def allows(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        return self.on

    def state(self) -> dict[str, Tensor]:
        return {}


# A rise by less than this share of the mean is no outlier, however alike the steps before were. It
# is of the size of roundings: 6e-8 of a float32 loss, some 1e-5 of a mean over bfloat16 tokens.
SMALLEST_RISE = 1e-4


class OutlierGuard:
    """Refuses a step whose loss or gradient norm is far above that of the last steps.

    z_score: the limit, in standard deviations above the mean of the last `window` finite steps,
    but at least SMALLEST_RISE of the mean above it.
    Nothing is refused before the window is full. Refused steps enter the window too, so that a
    lasting change of level is accepted after a while.
    """

    @checked(z_score=ZScore, window=Size)
    def __init__(self, z_score: float, window: int, device: torch.device) -> None:
        self.z_score = z_score
        self.values = torch.zeros(window, 2, dtype=torch.float64, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)

    def allows(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        now = torch.stack([loss.double(), grad_norm.double()])
        mean, std = self.values.mean(0), self.values.std(0)
        rise = (self.z_score * std).maximum(SMALLEST_RISE * mean)
        limit = mean + rise + torch.finfo(torch.float32).tiny  # a rounding above 0 is none either
        calm = (now <= limit).all() | (self.count < len(self.values))
        finite = now.isfinite().all()
        place = (self.count % len(self.values)).view(1)
        kept = torch.where(finite, now, self.values[place][0])
        self.values.index_copy_(0, place, kept[None])
        self.count += finite
        return calm

    def state(self) -> dict[str, Tensor]:
        """The window, for a checkpoint."""
        return {"values": self.values, "count": self.count}

    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
