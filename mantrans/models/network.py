"""A network: embedding, blocks, final norm, output. It can be described before it has memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

from mantrans.layers import Block, Embedding, LayerNorm, Output
from mantrans.parameters import Parameter


class Network(NamedTuple):
    """The layers in the order of the forward."""

    embedding: Embedding
    blocks: list[Block]
    final_norm: LayerNorm
    output: Output

    def forward(
        self,
        tokens: Tensor,
        document_start: Tensor | None = None,
        see: Callable[[Block.Saved], object] = lambda saved: None,
    ) -> tuple[Tensor, LayerNorm.Saved]:
        """tokens (B, T) -> y (B, T, C), the input of the output projection, and what the final norm
        saves. `see` is called with what each block saves, and keeps what it needs."""
        x, branch = self.embedding.forward(tokens), None
        for block in self.blocks:
            x, branch, saved = block.forward(x, branch, document_start)
            see(saved)
            del saved
        return self.final_norm.forward(x, branch)

    def parameters(self) -> Iterator[Parameter]:
        """Every parameter, in the order of the forward."""
        yield from self.embedding.parameters()
        for block in self.blocks:
            yield from block.parameters()
        yield from self.final_norm.parameters()
        yield from self.output.parameters()

    def flops_per_token(self, T: int) -> float:
        """Operations of forward and backward for one token of a sequence of T.

        Counts the matrix products with weights (not the embedding look-ups) and those of causal
        attention. Each has two gradients, so the backward is twice the forward. Norms, GELU,
        softmax, loss and optimizer are not counted: well under 2% for the sizes here.
        """
        forward = sum(block.flops(T) for block in self.blocks) + self.output.flops()
        return 3.0 * forward
