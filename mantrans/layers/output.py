"""The output projection, and the loss that is computed together with it."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from mantrans.layers.elements import Elements
from mantrans.parameters import Parameter


class Output:
    """logits = y Wᵀ over the vocabulary, W (V, C) stored with padded rows.

    weight: a separate table, or the token embedding's if they are tied.
    chunk_rows: rows of logits in memory at a time while the loss is computed; None for the
        backend's choice. The gradient's last bits depend on it.
    """

    def __init__(self, ops: ModuleType, weight: Parameter, tied: bool) -> None:
        self.ops, self.weight, self.tied = ops, weight, tied
        self.chunk_rows: int | None = None

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    def parameters(self) -> Iterator[Parameter]:
        if not self.tied:
            yield self.weight

    def forward(self, y: Tensor) -> Tensor:
        """y (..., C) -> logits (..., V)."""
        return self.ops.linear_forward(y, self.weight.value)[..., : self.vocab_size]

    def backward(self, dlogits: Tensor, y: Tensor, accumulate: bool = True) -> Tensor:
        """The gradient of y, from that of the logits (..., V)."""
        padding = len(self.weight.value) - self.vocab_size
        dlogits = torch.nn.functional.pad(dlogits, (0, padding)).to(y.dtype)
        return self.ops.linear_backward(
            dlogits, y, self.weight.value, self.weight.gradient, accumulate=accumulate
        )

    def losses(self, y: Tensor, targets: Tensor) -> Tensor:
        """y (B, T, C), targets (B, T) -> the loss of each token (B·T,). Nothing is kept."""
        return self.ops.linear_cross_entropy_forward(
            y.flatten(0, 1), self.weight.value, targets.flatten(), self.vocab_size
        )

    def forward_backward(
        self, y: Tensor, targets: Tensor, scale: Tensor, accumulate: bool = True
    ) -> tuple[Tensor, Tensor]:
        """scale · Σ losses (0-d) and the gradient of y (B, T, C); logits are computed in chunks."""
        loss, dy = self.ops.linear_cross_entropy_forward_backward(
            y.flatten(0, 1),
            self.weight.value,
            targets.flatten(),
            scale,
            self.weight.gradient,
            self.vocab_size,
            accumulate,
            self.chunk_rows,
        )
        return loss, dy.view(y.shape)

    def flops(self) -> int:
        """The padded rows of the vocabulary do not count."""
        V, C = self.weight.shape
        return 2 * V * C

    def workspace(self) -> Elements:
        """While the loss is computed: the gradient of y, and the token's loss."""
        return Elements(narrow=self.weight.shape[1], wide=1)
