"""A network: embedding, blocks, final norm, output. It can be described before it has memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

from mantrans.kernels.reference import window_starts
from mantrans.layers import Angles, Block, Embedding, Norm, Output
from mantrans.parameters import Parameter


class Network(NamedTuple):
    """The layers in the order of the forward, and the angles of positions that all blocks share."""

    embedding: Embedding
    blocks: list[Block]
    final_norm: Norm
    output: Output
    angles: Angles | None = None

    def forward(
        self,
        tokens: Tensor,
        document_start: Tensor | None = None,
        see: Callable[[Block.Saved], object] = lambda saved: None,
    ) -> tuple[Tensor, Norm.Saved, Tensor | None]:
        """tokens (B, T) -> y (B, T, C), the input of the output projection; what the final norm
        saves; and the `first_key` of the blocks' backwards. `see` is called with what each block
        saves, and keeps what it needs."""
        x, branch = self.embedding.forward(tokens), None
        first_key = self.first_key(tokens, document_start)
        for block in self.blocks:
            x, branch, saved = block.forward(x, branch, first_key)
            see(saved)
            del saved
        return *self.final_norm.forward(x, branch), first_key

    def first_key(self, tokens: Tensor, document_start: Tensor | None) -> Tensor | None:
        """The first key that each query sees, (B, T) int32: that of its window, or of its document
        if that is later. None: the row's first."""
        window = self.blocks[0].attention.window
        if window is None or window >= tokens.shape[1]:
            return document_start
        return window_starts(tokens, window, document_start)

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
