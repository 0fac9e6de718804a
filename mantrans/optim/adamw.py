"""AdamW (Loshchilov & Hutter 2019)."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from mantrans.config.arguments import ADAMW, checked
from mantrans.distributed.shard import Part, Shard
from mantrans.optim.optimizer import Now, Optimizer
from mantrans.parameters import Parameters


class AdamW(Optimizer):
    """AdamW with float32 moments (float64 for a float64 model)."""

    @checked(**ADAMW)
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
        self.squared = self._squared()
        self.exp_avg = parameters.gradients.new_zeros(parameters.shard.elements)
        self.exp_avg_sq = parameters.gradients.new_zeros(self.squared.elements)
        self._places = {part.where.start: part.kept for part in self.squared.parts}

    def _squared(self) -> Shard:
        """The elements that have a second moment."""
        return self.parameters.shard

    def _update(self, part: Part, weight_decay: float, now: Now) -> None:
        p = self.parameters
        self.ops.adamw_update(
            p.weights[part.where],
            None if p.master is None else p.master[part.kept],
            p.gradients_of(part),
            self.exp_avg[part.kept],
            self.exp_avg_sq[self._places[part.where.start]],
            now.number,
            now.learning_rate,
            now.clip,
            now.applied,
            self.beta1,
            self.beta2,
            self.epsilon,
            weight_decay,
            **self._rounding(part),
        )

    def state(self) -> dict[str, Tensor]:
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
