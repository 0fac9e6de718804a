"""A block: two branches, each added to the residual stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from mantrans.layers.attention import Attention, KeyValueCache
from mantrans.layers.elements import Elements
from mantrans.layers.mlp import MLP
from mantrans.layers.norm import Norm
from mantrans.parameters import Parameter


class Block:
    """x ← x + attention(norm_1(x));  x ← x + mlp(norm_2(x)).

    A block passes on the residual x and the output of its last branch, not yet added: the next norm
    adds the two while it reads them. The gradient of the sum is also the gradient of each.
    """

    class Saved(NamedTuple):
        norm_1: Norm.Saved
        attention: Attention.Saved
        norm_2: Norm.Saved
        mlp: MLP.Saved

    def __init__(self, norm_1: Norm, attention: Attention, norm_2: Norm, mlp: MLP) -> None:
        self.norm_1, self.attention, self.norm_2, self.mlp = norm_1, attention, norm_2, mlp

    def parameters(self) -> Iterator[Parameter]:
        for part in (self.norm_1, self.attention, self.norm_2, self.mlp):
            yield from part.parameters()

    def forward(
        self, x: Tensor, branch: Tensor | None, first_key: Tensor | None
    ) -> tuple[Tensor, Tensor, Saved]:
        """x, branch (B, T, C) -> the residual, and the MLP's output, not yet added to it."""
        y, norm_1, attention, norm_2 = self._up_to_mlp(x, branch, first_key)
        branch, mlp = self.mlp.forward(y)
        return norm_2.x, branch, self.Saved(norm_1, attention, norm_2, mlp)

    def recompute(self, x: Tensor, first_key: Tensor | None) -> Saved:
        """The `Saved` of a forward, from its `norm_1.x`. The MLP's last product, a third of a
        block's arithmetic, is left out: the backward does not need its result."""
        y, norm_1, attention, norm_2 = self._up_to_mlp(x, None, first_key)
        return self.Saved(norm_1, attention, norm_2, self.mlp.Saved(y, *self.mlp.hidden(y)))

    def _up_to_mlp(
        self, x: Tensor, branch: Tensor | None, first_key: Tensor | None
    ) -> tuple[Tensor, Norm.Saved, Attention.Saved, Norm.Saved]:
        y, norm_1 = self.norm_1.forward(x, branch)
        branch, attention = self.attention.forward(y, first_key)
        y, norm_2 = self.norm_2.forward(norm_1.x, branch)
        return y, norm_1, attention, norm_2

    def backward(
        self, dx: Tensor, saved: Saved, first_key: Tensor | None, accumulate: bool = True
    ) -> Tensor:
        """dx: the gradient of the sum of the two outputs. Returns that of the sum of the inputs."""
        dy = self.mlp.backward(dx, saved.mlp, accumulate)
        dx = self.norm_2.backward(dy, saved.norm_2, dresidual=dx)
        dy = self.attention.backward(dx, saved.attention, first_key, accumulate)
        return self.norm_1.backward(dy, saved.norm_1, dresidual=dx)

    def decode(
        self, x: Tensor, branch: Tensor | None, cache: KeyValueCache, lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The forward for one new position per row, x (B, C), against the cache."""
        y, norm_1 = self.norm_1.forward(x, branch)
        y, norm_2 = self.norm_2.forward(norm_1.x, self.attention.decode(y, cache, lengths))
        return norm_2.x, self.mlp.forward(y)[0]

    def flops(self, T: int) -> float:
        return self.attention.flops(T) + self.mlp.flops(T)

    def kept(self) -> Elements:
        norms = self.norm_1.kept() + self.norm_2.kept()
        return norms + self.attention.kept() + self.mlp.kept()

    def workspace(self) -> int:
        """The two branches run backward one after the other."""
        return max(self.attention.workspace(), self.mlp.workspace())
