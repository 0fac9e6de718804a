"""Linear: a matrix product with its bias."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

from torch import Tensor

from mantrans.parameters import Parameter


class Linear:
    """y = x Wᵀ + b, with W (M, K).

    adds_bias: False leaves b, and its gradient, to the operation that reads y.
    into_residual: y is added to the residual stream. The next norm's backward computes the gradient
    of that sum, which is also the gradient of y, and sums the bias's gradient in the same pass.
    """

    def __init__(
        self,
        ops: ModuleType,
        name: str,
        K: int,
        M: int,
        *,
        std: float,
        bias: bool = True,
        adds_bias: bool = True,
        into_residual: bool = False,
    ) -> None:
        self.ops, self.adds_bias, self.into_residual = ops, adds_bias, into_residual
        self.weight = Parameter(f"{name}.weight", (M, K), std=std)
        self.bias = Parameter(f"{name}.bias", (M,)) if bias else None

    def parameters(self) -> Iterator[Parameter]:
        yield self.weight
        if self.bias is not None:
            yield self.bias

    def forward(self, x: Tensor) -> Tensor:
        """The backward needs only the input, which the caller keeps."""
        bias = self.bias if self.adds_bias else None
        return self.ops.linear_forward(x, self.weight.value, bias and bias.value)

    def backward(self, dy: Tensor, x: Tensor, accumulate: bool = True) -> Tensor:
        bias = self.bias if self.adds_bias and not self.into_residual else None
        weight = self.weight
        return self.ops.linear_backward(
            dy, x, weight.value, weight.gradient, bias and bias.gradient, accumulate
        )

    def flops(self) -> int:
        """A multiplication and an addition per weight."""
        M, K = self.weight.shape
        return 2 * M * K
