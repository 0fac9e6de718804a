"""The part common to all optimizers: clip, check, update.

A step never waits for the device: the gradient norm, the clip factor and the finite flag stay there
as 0-d tensors, which the update kernels read.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mantrans.config.arguments import OPTIMIZER, GradNorm, checked
from mantrans.distributed.shard import PIECES, Part, Shard
from mantrans.errors import show
from mantrans.kernels import reference
from mantrans.optim.guards import Guard
from mantrans.parameters import Parameters


class StepOutcome(NamedTuple):
    """The outcome of a step, all 0-d on the device."""

    grad_norm: Tensor  # float64, before clipping
    applied: Tensor  # bool: whether the weights were changed


class Now(NamedTuple):
    """The numbers of a step that its updates read, all 0-d on the device."""

    number: Tensor  # of this update, 1 at the first; float32 or float64
    learning_rate: Tensor
    clip: Tensor  # factor of the gradients
    applied: Tensor  # bool: False changes nothing


class Optimizer:
    """Clip, check, update. A subclass implements the update.

    max_grad_norm: longer gradients are scaled down to this L2 norm; None never scales.
    weight_decay: decoupled; biases and gains do not decay.
    """

    @checked(**OPTIMIZER)
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

    @checked(max_grad_norm=GradNorm)
    def step(
        self,
        loss: Tensor,
        learning_rate: Tensor,
        guards: Sequence[Guard] = (),
        max_grad_norm: float | Literal["configured"] | None = "configured",
        has_targets: Tensor | None = None,
    ) -> StepOutcome:
        """Update the weights from the gradients, unless a number of the step is not finite.

        The norm and the clip factor are float64: finite gradients have a finite norm, and however
        long they are, they are scaled down to the limit.

        loss, learning_rate 0-d. max_grad_norm: for this step only. has_targets 0-d bool: whether
        the loss is of any target; None: it is. If the update is refused, by the check, by one of
        `guards`, or for want of targets, weights, moments and the count stay unchanged.
        """
        for name, number in (("loss", loss), ("learning_rate", learning_rate)):
            if not isinstance(number, Tensor) or number.dim():
                raise TypeError(f"{name}: expected a 0-d tensor, got {show(number)}")
        p = self.parameters
        norm = self.gradient_norm()
        clip = torch.ones_like(norm)
        limit = self.max_grad_norm if max_grad_norm == "configured" else max_grad_norm
        if limit is not None:
            clip = (limit / (norm + 1e-6)).clamp_(max=1)  # as torch's clip_grad_norm_
        # No element of the clipped gradient is longer than all of it, which moments square and
        # rates multiply. Infinity times 0 is NaN, so norm, clip and rate are checked with it.
        length = (clip * norm).to(p.wide)
        pace = learning_rate * self.reach * (length + self.weight_decay)
        applied = torch.stack([loss, length * length, pace]).isfinite().all()
        for guard in guards:
            applied = applied & guard.allows(loss, norm)
        if has_targets is not None:
            applied = applied & has_targets
        self._update_all(Now((p.updates + 1).to(p.wide), learning_rate, clip, applied))
        p.updates += applied
        return StepOutcome(norm, applied)

    def gradient_norm(self) -> Tensor:
        """0-d float64: the norm of the norms of all pieces of all buckets, whoever owns them."""
        p, shard = self.parameters, self.parameters.shard
        shape = len(p.buckets), PIECES
        norms = torch.zeros(shape, dtype=torch.float64, device=p.weights.device)
        for part in p.shard.parts:
            own = norms[part.buckets, shard.pieces]
            own.copy_(self.ops.gradient_norms(p.gradients_of(part), part.pieces).view(own.shape))
        return reference.gradient_norms(shard.world.sum(norms).flatten(), 1)[0]

    @property
    def reach(self) -> float:
        """The largest factor that the learning rate is multiplied by."""
        return 1.0

    def _update_all(self, now: Now) -> None:
        """Update the elements that the rank owns."""
        for part in self.parameters.shard.parts:
            self._update(part, 0.0 if part.kind == "vectors" else self.weight_decay, now)

    def _update(self, part: Part, weight_decay: float, now: Now) -> None:
        """Update the elements of `part`."""
        raise AssertionError("an Optimizer is one of OPTIMIZERS")

    def _rounding(self, part: Part) -> dict[str, Tensor | int]:
        """Weights of low precision without a master are rounded stochastically."""
        if not self.parameters.low_precision():
            return {}
        return {"rounding_seed": self.parameters.updates, "offset": part.where.start}

    def state(self) -> dict[str, Tensor]:
        """The optimizer's flat buffers, of the elements that the rank owns, by name."""
        return {}

    def shards(self) -> dict[str, Shard]:
        """Which elements each buffer of `state` has."""
        return dict.fromkeys(self.state(), self.parameters.shard)
