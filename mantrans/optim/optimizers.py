"""SGD and AdamW over the flat buffers, and learning-rate schedules.

An optimizer step never asks the device a question: the gradient's norm, the clip factor and whether
everything is finite stay there as 0-d tensors, and the update kernel obeys them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mantrans.parameters import Parameters


class StepOutcome(NamedTuple):
    """What a step found, all 0-d on the device."""

    grad_norm: Tensor  # before clipping
    applied: Tensor  # bool: whether the weights were changed


class Guard(Protocol):
    """A further opinion on whether a step's update should happen, formed on the device."""

    def allows(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """0-d bool for a step of this loss and gradient norm (0-d)."""
        ...

    def state(self) -> dict[str, Tensor]:
        """The tensors that it remembers earlier steps in."""
        ...


class Optimizer:
    """Clip, check, update. A subclass says what the update is.

    max_grad_norm: longer gradients are scaled down to this L2 norm; None never scales.
    weight_decay: decoupled, on matrices only.
    """

    def __init__(
        self,
        ops: ModuleType,
        parameters: Parameters,
        *,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = 1.0,
    ) -> None:
        self.ops, self.parameters = ops, parameters
        self.weight_decay, self.max_grad_norm = weight_decay, max_grad_norm
        device = parameters.weights.device
        self.updates = torch.zeros((), dtype=torch.float32, device=device)  # applied so far

    def step(
        self, loss: Tensor, learning_rate: Tensor, guards: Sequence[Guard] = ()
    ) -> StepOutcome:
        """Update the weights from the gradients, unless the loss or their norm is not finite.

        loss, learning_rate 0-d. Where this, or one of `guards`, refuses the update, weights and
        moments keep their bits.
        """
        norm = self.ops.gradient_norm(self.parameters.gradients)
        applied = norm.isfinite() & loss.isfinite()
        for guard in guards:
            applied = applied & guard.allows(loss, norm)
        clip = torch.ones_like(norm)
        if self.max_grad_norm is not None:
            clip = (self.max_grad_norm / (norm + 1e-6)).clamp_(max=1)  # as torch's clip_grad_norm_
        self._update(learning_rate, clip, applied)
        self.updates += applied
        return StepOutcome(norm, applied)

    def _update(self, learning_rate: Tensor, clip: Tensor, applied: Tensor) -> None:
        raise AssertionError("an Optimizer is an SGD or an AdamW")

    def _rounding_seed(self) -> Tensor | None:
        """Where low-precision weights have no master they are rounded stochastically."""
        p = self.parameters
        stochastic = p.master is None and p.weights.dtype != p.gradients.dtype
        return self.updates.long() if stochastic else None

    def state(self) -> dict[str, Tensor]:
        """Flat buffers that hold the optimizer's memory, by name."""
        return {}


class SGD(Optimizer):
    """w ← w - η g."""

    def _update(self, learning_rate: Tensor, clip: Tensor, applied: Tensor) -> None:
        p = self.parameters
        self.ops.sgd_update(
            p.weights, p.master, p.gradients, learning_rate, clip, applied, self.weight_decay,
            p.n_decayed, self._rounding_seed(),
        )  # fmt: skip


class AdamW(Optimizer):
    """AdamW (Loshchilov & Hutter 2019) with float32 moments (float64 for a float64 model)."""

    def __init__(
        self,
        ops: ModuleType,
        parameters: Parameters,
        *,
        beta1: float = 0.9,
        beta2: float = 0.95,
        epsilon: float = 1e-8,
        weight_decay: float = 0.1,
        max_grad_norm: float | None = 1.0,
    ) -> None:
        super().__init__(ops, parameters, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
        self.beta1, self.beta2, self.epsilon = beta1, beta2, epsilon
        self.exp_avg = torch.zeros_like(parameters.gradients)
        self.exp_avg_sq = torch.zeros_like(parameters.gradients)

    def _update(self, learning_rate: Tensor, clip: Tensor, applied: Tensor) -> None:
        p = self.parameters
        self.ops.adamw_update(
            p.weights, p.master, p.gradients, self.exp_avg, self.exp_avg_sq, self.updates + 1,
            learning_rate, clip, applied, self.beta1, self.beta2, self.epsilon, self.weight_decay,
            p.n_decayed, self._rounding_seed(),
        )  # fmt: skip

    def state(self) -> dict[str, Tensor]:
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}


def scheduled_learning_rate(
    step: int,
    total_steps: int,
    peak: float,
    *,
    minimum: float = 0.0,
    warmup_steps: int = 0,
    decay: str = "cosine",
    decay_fraction: float = 0.2,
) -> float:
    """The learning rate of step 0 .. total_steps - 1.

    It rises linearly to `peak` over warmup_steps, then
      constant  stays there
      linear    falls in a straight line to `minimum` at the last step
      cosine    falls along half a cosine (Loshchilov & Hutter 2017)
      wsd       stays, and falls in a straight line over the last `decay_fraction` of all steps
                (warm-up, stable, decay: Hu et al. 2024)
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    start = warmup_steps
    if decay == "wsd":
        start = max(start, total_steps - round(decay_fraction * total_steps))
    if decay == "constant" or step < start:
        return peak
    progress = min(1.0, (step - start) / max(1, total_steps - 1 - start))
    share = 0.5 * (1 + math.cos(math.pi * progress)) if decay == "cosine" else 1 - progress
    return minimum + (peak - minimum) * share
