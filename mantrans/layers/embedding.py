"""The token embedding, and learned positions."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

from torch import Tensor

from mantrans.kernels.reference import padded_vocabulary
from mantrans.parameters import Parameter


def vocabulary_table(name: str, V: int, C: int, std: float) -> Parameter:
    """A row (C,) for each of V tokens, then zero rows up to `padded_vocabulary`."""
    return Parameter(name, (V, C), std=std, stored_rows=padded_vocabulary(V), table=True)


class Embedding:
    """x[b, t] = the token's row + the position's row, if there are T_max of these; None: none."""

    def __init__(self, ops: ModuleType, V: int, T_max: int | None, C: int, *, std: float) -> None:
        self.ops = ops
        self.tokens = vocabulary_table("token_embedding.weight", V, C, std)
        self.positions: Parameter | None = None
        if T_max is not None:
            self.positions = Parameter("position_embedding.weight", (T_max, C), std=std, table=True)

    def parameters(self) -> Iterator[Parameter]:
        yield self.tokens
        if self.positions is not None:
            yield self.positions

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> x (B, T, C)."""
        positions = self.positions and self.positions.value
        return self.ops.embedding_forward(tokens, self.tokens.value, positions)

    def backward(
        self, dx: Tensor, tokens: Tensor, accumulate: bool = True, tied: bool = False
    ) -> None:
        """Add to the gradients of the tables. Without `accumulate` they start from 0, except a
        token table that is `tied`: the output projection has already written to it."""
        positions = None if self.positions is None else self.positions.gradient
        if not accumulate:
            if positions is not None:
                positions.zero_()
            if not tied:
                self.tokens.gradient.zero_()
        self.ops.embedding_backward(dx, tokens, self.tokens.gradient, positions)

    def decode(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """tokens (B,) at index lengths[b] - 1 -> x (B, C)."""
        x = self.tokens.value[tokens]
        return x if self.positions is None else x + self.positions.value[lengths - 1]
