"""The feed-forward branch: Linear → activation → Linear."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import ClassVar, NamedTuple

from torch import Tensor

from mantrans.layers.elements import Elements
from mantrans.layers.linear import Linear
from mantrans.parameters import Parameter


class MLP:
    """y = a W₂ᵀ + b₂ with a = activation(x W₁ᵀ); its kinds are below.

    recompute_activation: a is recomputed in the backward instead of kept.
    """

    class Saved(NamedTuple):
        x: Tensor  # (B,T,C)
        h: Tensor  # the first product: (B,T,F), before its bias, or (B,T,2F)
        a: Tensor | None  # (B,T,F)  None where it is recomputed

    # name and outputs a unit of F of the first layer, and whether it adds its own bias
    FIRST: ClassVar[tuple[str, int, bool]]

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
        recompute_activation: bool = False,
    ) -> None:
        self.ops, self.recompute_activation = ops, recompute_activation
        first, outputs, adds_bias = self.FIRST
        self.first = Linear(
            ops, f"{name}.{first}", C, outputs * F, std=std, bias=bias, adds_bias=adds_bias
        )
        self.down = Linear(
            ops, f"{name}.down", F, C, std=residual_std, bias=bias, into_residual=True
        )

    def activate(self, h: Tensor) -> Tensor:
        raise NotImplementedError

    def activate_backward(self, da: Tensor, h: Tensor) -> Tensor:
        raise NotImplementedError

    def parameters(self) -> Iterator[Parameter]:
        yield from self.first.parameters()
        yield from self.down.parameters()

    def forward(self, x: Tensor) -> tuple[Tensor, Saved]:
        h, a = self.hidden(x)
        y = self.down.forward(a)
        return y, self.Saved(x, h, None if self.recompute_activation else a)

    def hidden(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The part of the forward that the backward needs: up to the last product's input."""
        h = self.first.forward(x)
        return h, self.activate(h)

    def backward(self, dy: Tensor, saved: Saved, accumulate: bool = True) -> Tensor:
        x, h, a = saved
        if a is None:
            a = self.activate(h)
        da = self.down.backward(dy, a, accumulate)
        del a  # if it was recomputed, its memory is free for dh
        dh = self.activate_backward(da, h)
        return self.first.backward(dh, x, accumulate)

    def flops(self, T: int) -> float:
        """The products."""
        return self.first.flops() + self.down.flops()

    def kept(self) -> Elements:
        (M, C), F = self.first.weight.shape, self.down.weight.shape[1]
        return Elements(narrow=C + M + (0 if self.recompute_activation else F))

    def workspace(self) -> int:
        """dy, da, dh and dx."""
        (M, C), F = self.first.weight.shape, self.down.weight.shape[1]
        return F + M + 2 * C


class GELUMLP(MLP):
    """y = gelu(x W₁ᵀ + b₁) W₂ᵀ + b₂. The first bias is added by the GELU, in the same pass."""

    FIRST = ("up", 1, False)

    def activate(self, h: Tensor) -> Tensor:
        bias = self.first.bias
        return self.ops.bias_gelu_forward(h, bias and bias.value)

    def activate_backward(self, da: Tensor, h: Tensor) -> Tensor:
        bias = self.first.bias
        return self.ops.bias_gelu_backward(da, h, bias and bias.value, bias and bias.gradient)


class SwiGLUMLP(MLP):
    """y = (silu(g) u) W₂ᵀ + b₂, with g and u side by side in one product, x W₁ᵀ + b₁."""

    FIRST = ("gate_up", 2, True)

    def activate(self, h: Tensor) -> Tensor:
        return self.ops.swiglu_forward(h)

    def activate_backward(self, da: Tensor, h: Tensor) -> Tensor:
        return self.ops.swiglu_backward(da, h)
