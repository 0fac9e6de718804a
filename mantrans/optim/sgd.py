"""Stochastic gradient descent."""

from __future__ import annotations

from torch import Tensor

from mantrans.optim.optimizer import Optimizer


class SGD(Optimizer):
    """w ← w (1 - η λ) - η g."""

    def _update(
        self,
        where: slice,
        weight_decay: float,
        count: Tensor,
        learning_rate: Tensor,
        clip: Tensor,
        applied: Tensor,
    ) -> None:
        p = self.parameters
        self.ops.sgd_update(
            p.weights[where],
            None if p.master is None else p.master[where],
            p.gradients[where],
            learning_rate,
            clip,
            applied,
            weight_decay,
            **self._rounding(where),
        )
