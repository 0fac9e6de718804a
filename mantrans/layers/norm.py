"""The norms, each with the residual addition before it."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from mantrans.layers.elements import Elements
from mantrans.parameters import Parameter


class Norm:
    """y = γ x̂ (+ β), optionally of the sum of a residual and a branch's output.

    branch_bias: the bias of the branch's last layer, if any (`Linear.into_residual`).
    """

    class Saved(NamedTuple):
        x: Tensor  # (B,T,C)
        mean: Tensor | None  # (N,)  float64
        rstd: Tensor  # (N,)

    def __init__(
        self,
        ops: ModuleType,
        name: str,
        C: int,
        *,
        epsilon: float,
        bias: bool = False,
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
        """y of x, or of x + branch. `saved.x` is that sum: the residual from here on."""
        raise NotImplementedError

    def backward(self, dy: Tensor, saved: Saved, dresidual: Tensor | None = None) -> Tensor:
        """The gradient of x, plus `dresidual`, the gradient that reaches x without the norm."""
        raise NotImplementedError

    def kept(self) -> Elements:
        raise NotImplementedError


class LayerNorm(Norm):
    """x̂ = (x - μ) / √(σ² + ε)."""

    def forward(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Norm.Saved]:
        weight, bias = self.weight.value, self.bias and self.bias.value
        if branch is None:
            y, mean, rstd = self.ops.layer_norm_forward(x, weight, bias, self.epsilon)
        else:
            y, x, mean, rstd = self.ops.add_layer_norm_forward(
                branch, x, weight, bias, self.epsilon
            )
        return y, self.Saved(x, mean, rstd)

    def backward(self, dy: Tensor, saved: Norm.Saved, dresidual: Tensor | None = None) -> Tensor:
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
        return Elements(narrow=self.weight.shape[0], wide=3)  # a float64 mean counts as two


class RMSNorm(Norm):
    """x̂ = x / √(mean(x²) + ε), without β."""

    def forward(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Norm.Saved]:
        weight = self.weight.value
        if branch is None:
            y, rstd = self.ops.rms_norm_forward(x, weight, self.epsilon)
        else:
            y, x, rstd = self.ops.add_rms_norm_forward(branch, x, weight, self.epsilon)
        return y, self.Saved(x, None, rstd)

    def backward(self, dy: Tensor, saved: Norm.Saved, dresidual: Tensor | None = None) -> Tensor:
        return self.ops.rms_norm_backward(
            dy,
            saved.x,
            self.weight.value,
            saved.rstd,
            self.weight.gradient,
            dresidual,
            self.branch_bias and self.branch_bias.gradient,
        )

    def kept(self) -> Elements:
        return Elements(narrow=self.weight.shape[0], wide=1)
