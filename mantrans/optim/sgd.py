"""Stochastic gradient descent."""

from __future__ import annotations

from torch import Tensor

from mantrans.distributed.shard import Part
from mantrans.optim.optimizer import Optimizer


class SGD(Optimizer):
    """w ← w (1 - η λ) - η g."""

    def _update(
        self,
        part: Part,
        weight_decay: float,
        count: Tensor,
        learning_rate: Tensor,
        clip: Tensor,
        applied: Tensor,
    ) -> None:
        p = self.parameters
        self.ops.sgd_update(
            p.weights[part.where],
            None if p.master is None else p.master[part.kept],
            p.gradients_of(part),
            learning_rate,
            clip,
            applied,
            weight_decay,
            **self._rounding(part),
        )
