"""The feed-forward branch: Linear → GELU → Linear."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from mantrans.layers.elements import Elements
from mantrans.layers.linear import Linear
from mantrans.parameters import Parameter


class MLP:
    """y = gelu(x W₁ᵀ + b₁) W₂ᵀ + b₂. The first bias is added by the GELU, in the same pass.

    recompute_gelu: GELU's output is recomputed in the backward instead of kept.
    """

    class Saved(NamedTuple):
        x: Tensor  # (B,T,C)
        h: Tensor  # (B,T,F)   the first product, before its bias
        a: Tensor | None  # (B,T,F)  gelu(h + b); None where it is recomputed

    def __init__(
        self,
        ops: ModuleType,
        name: str,
        C: int,
        F: int,
        *,
        std: float,
        residual_std: float,
        bias: bool = True,
        recompute_gelu: bool = False,
    ) -> None:
        self.ops, self.recompute_gelu = ops, recompute_gelu
        self.up = Linear(ops, f"{name}.up", C, F, std=std, bias=False)
        self.bias = Parameter(f"{name}.up.bias", (F,)) if bias else None
        self.down = Linear(
            ops, f"{name}.down", F, C, std=residual_std, bias=bias, into_residual=True
        )

    def parameters(self) -> Iterator[Parameter]:
        yield from self.up.parameters()
        if self.bias is not None:
            yield self.bias
        yield from self.down.parameters()

    def forward(self, x: Tensor) -> tuple[Tensor, Saved]:
        h, a = self.hidden(x)
        y = self.down.forward(a)
        return y, self.Saved(x, h, None if self.recompute_gelu else a)

    def hidden(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The part of the forward that the backward needs: up to the last product's input."""
        h = self.up.forward(x)
        return h, self.ops.bias_gelu_forward(h, self.bias and self.bias.value)

    def backward(self, dy: Tensor, saved: Saved, accumulate: bool = True) -> Tensor:
        x, h, a = saved
        bias, dbias = (self.bias.value, self.bias.gradient) if self.bias else (None, None)
        if a is None:
            a = self.ops.bias_gelu_forward(h, bias)
        da = self.down.backward(dy, a, accumulate)
        dh = self.ops.bias_gelu_backward(da, h, bias, dbias)
        return self.up.backward(dh, x, accumulate)

    def flops(self, T: int) -> float:
        """The two products."""
        return self.up.flops() + self.down.flops()

    def kept(self) -> Elements:
        F, C = self.up.weight.shape
        return Elements(narrow=C + (F if self.recompute_gelu else 2 * F))

    def workspace(self) -> int:
        """dy, da, dh and dx."""
        F, C = self.up.weight.shape
        return 2 * F + 2 * C
