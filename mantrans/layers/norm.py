"""LayerNorm, with the addition to the residual that comes before it."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from mantrans.layers.elements import Elements
from mantrans.parameters import Parameter


class LayerNorm:
    """y = γ x̂ + β, optionally of the sum of a residual and what a branch adds to it.

    branch_bias: the bias that the branch ends in, if any (`Linear.into_residual`).
    """

    class Saved(NamedTuple):
        x: Tensor  # (B,T,C)
        mean: Tensor  # (N,)
        rstd: Tensor  # (N,)

    def __init__(
        self,
        ops: ModuleType,
        name: str,
        C: int,
        *,
        epsilon: float,
        bias: bool = True,
        branch_bias: Parameter | None = None,
    ) -> None:
        self.ops, self.epsilon, self.branch_bias = ops, epsilon, branch_bias
        self.weight = Parameter(f"{name}.weight", (C,), constant=1.0)
        self.bias = Parameter(f"{name}.bias", (C,)) if bias else None

    def parameters(self) -> Iterator[Parameter]:
        yield self.weight
        if self.bias is not None:
            yield self.bias

    def forward(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Saved]:
        """y = LN(x), or LN(x + branch); the sum is in `saved.x` for whoever goes on with it."""
        weight, bias = self.weight.value, self.bias and self.bias.value
        if branch is None:
            y, mean, rstd = self.ops.layer_norm_forward(x, weight, bias, self.epsilon)
        else:
            y, x, mean, rstd = self.ops.add_layer_norm_forward(
                branch, x, weight, bias, self.epsilon
            )
        return y, self.Saved(x, mean, rstd)

    def backward(self, dy: Tensor, saved: Saved, dresidual: Tensor | None = None) -> Tensor:
        """The gradient of x, to which `dresidual` is added: what by-passed the norm."""
        return self.ops.layer_norm_backward(
            dy,
            saved.x,
            self.weight.value,
            saved.mean,
            saved.rstd,
            self.weight.gradient,
            self.bias and self.bias.gradient,
            dresidual,
            self.branch_bias and self.branch_bias.gradient,
        )

    def kept(self) -> Elements:
        return Elements(narrow=self.weight.shape[0], wide=2)
