"""Stochastic gradient descent."""

from __future__ import annotations

from mantrans.distributed.shard import Part
from mantrans.optim.optimizer import Now, Optimizer


class SGD(Optimizer):
    """w ← w (1 - η λ) - η g."""

    def _update(self, part: Part, weight_decay: float, now: Now) -> None:
        p = self.parameters
        self.ops.sgd_update(
            p.weights[part.where],
            None if p.master is None else p.master[part.kept],
            p.gradients_of(part),
            now.learning_rate,
            now.clip,
            now.applied,
            weight_decay,
            **self._rounding(part),
        )
