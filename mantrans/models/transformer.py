"""CustomTransformer: a network with its memory, forward and backward.

    tokens → embedding → block × n_blocks → final norm → output → logits → loss

The backward is the forward in reverse. It empties the list of saved activations as it goes, so that
each is freed as soon as it is no longer needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from mantrans.config import ModelConfig
from mantrans.config.arguments import BUILD, Rate, checked
from mantrans.distributed.world import World
from mantrans.errors import show
from mantrans.layers import Block, KeyValueCache, Norm
from mantrans.models import build
from mantrans.parameters import PIECES, Parameters


class CustomTransformer:
    """A decoder-only transformer with a hand-written backward.

    config: shape of the network; vocab_size must be set.
    ops: the module of operations to compute with (`mantrans.kernels.backend.choose`).
    dtype: float32, bfloat16 or float64, of weights and activations.
    recompute: "none" keeps all activations; "gelu" recomputes the outputs of the MLPs' activation
        function, GELU or SwiGLU, in the backward; "block" keeps only each block's input.
    training: False leaves out gradients and masters; backward is then not possible.
    keep_master: whether bfloat16 weights have float32 masters.
    world, shard: the processes that train, and what they divide: see `Parameters`.
    """

    class Saved(NamedTuple):
        """What a forward leaves for its backward."""

        tokens: Tensor  # (B,T)
        first_key: Tensor | None  # (B,T)  that each query sees
        blocks: list  # per block: Block.Saved, or its input (B,T,C) where it is recomputed
        final_norm: Norm.Saved
        y: Tensor  # (B,T,C) input of the output projection

    @checked(recompute=BUILD["recompute"], seed=BUILD["seed"], training=bool, keep_master=bool)
    def __init__(
        self,
        config: ModelConfig,
        ops: ModuleType,
        *,
        dtype: torch.dtype,
        device: torch.device,
        recompute: str = "none",
        training: bool = True,
        keep_master: bool = True,
        seed: int = 0,
        world: World | None = None,
        shard: str = "none",
    ) -> None:
        self.config, self.ops, self.recompute, self.training = config, ops, recompute, training
        network = build(config, ops, recompute_activation=recompute == "gelu")
        self.network = network
        self.parameters = Parameters(
            network.parameters(),
            dtype,
            device,
            training=training,
            keep_master=keep_master,
            partial_rows=ops.partial_rows(device),
            world=world,
            shard=shard,
        )
        self.parameters.initialize(seed)
        self.embedding, self.blocks, self.final_norm, self.output, angles = network
        if angles is not None:
            angles.allocate(self.parameters.wide, device)
        self.vocab_size = self.output.vocab_size
        self._saved: CustomTransformer.Saved | None = None

    # -------------------------------------------------------------- the network, in both directions

    def _trunk_forward(
        self, tokens: Tensor, document_start: Tensor | None, keep: bool = True
    ) -> Tensor:
        """tokens (B, T) -> y (B, T, C), the input of the output projection."""
        tokens = tokens.contiguous()  # kernels take no other
        document_start = None if document_start is None else document_start.contiguous()
        if not keep:
            return self.network.forward(tokens, document_start)[0]
        blocks: list = []

        def see(saved: Block.Saved) -> None:
            blocks.append(saved.norm_1.x if self.recompute == "block" else saved)

        y, final_norm, first_key = self.network.forward(tokens, document_start, see)
        self._saved = self.Saved(tokens, first_key, blocks, final_norm, y)
        return y

    def _trunk_backward(
        self, dy: Tensor, accumulate: bool, finished: Callable[[str], object] = lambda bucket: None
    ) -> None:
        """dy (B, T, C): of the output projection's input. `finished` is called with the name of
        each bucket as soon as its gradients are complete."""
        assert self._saved is not None
        (tokens, first_key, saved_blocks, saved_norm, _), self._saved = self._saved, None
        if not accumulate:
            self.parameters.bucket_gradients("vectors").zero_()
        dx = self.final_norm.backward(dy, saved_norm)
        self._finish_vectors("")
        del dy, saved_norm
        for i, block in reversed(list(enumerate(self.blocks))):
            saved = saved_blocks.pop()
            if self.recompute == "block":
                saved = block.recompute(saved, first_key)
            dx = block.backward(dx, saved, first_key, accumulate)
            del saved
            self._finish_vectors(f"blocks.{i}")
            finished(f"blocks.{i}")
        finished("vectors")
        self.embedding.backward(dx, tokens, accumulate, tied=self.output.tied)
        finished("tables")

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """A backward that ends early, out of memory, leaves partial sums that are not summed: they
        must not enter the next gradient."""
        try:
            yield
        except BaseException:
            self._saved = None
            if self.parameters.partials is not None:
                self.parameters.partials.clear()
            raise

    def _finish_vectors(self, block: str) -> None:
        """Sum the partial sums of the gradients of a block's biases and gains."""
        if self.parameters.partials is not None:
            self.ops.sum_partials(*self.parameters.partials.of(block))

    # ----------------------------------------------------------- logits and their gradient, whole

    def forward(
        self, tokens: Tensor, document_start: Tensor | None = None, keep: bool = True
    ) -> Tensor:
        """tokens (B, T) int64, T <= max_seq_len -> logits (B, T, V) in the model's dtype.

        document_start (B, T) int32: where the document of each position starts, to keep attention
        inside it (`mantrans.kernels.reference.document_starts`). keep: whether a backward follows.
        Raises ValueError for other tokens; ids that are too large are found on a CPU only.
        """
        self._check_tokens(tokens)
        y = self._trunk_forward(tokens, document_start, keep and self.training)
        return self.output.forward(y)

    def backward(self, dlogits: Tensor) -> None:
        """Add every parameter's gradient, given that of the last forward's logits (B, T, V).

        Raises RuntimeError without a forward before each backward, ValueError for another shape.
        """
        if self._saved is None:
            raise RuntimeError("backward: no activations; call forward first, once per backward")
        expected = (*self._saved.tokens.shape, self.vocab_size)
        if not isinstance(dlogits, Tensor) or dlogits.shape != expected:
            found = tuple(dlogits.shape) if isinstance(dlogits, Tensor) else show(dlogits)
            raise ValueError(f"dlogits: expected a tensor of shape {expected}, got {found}")
        with self._whole():
            dy = self.output.backward(dlogits, self._saved.y)
            self._trunk_backward(dy, accumulate=True)

    def _check_tokens(self, tokens: Tensor) -> None:
        """Refuse what is no batch of token ids; on a GPU their values are not read."""
        is_batch = isinstance(tokens, Tensor) and tokens.layout == torch.strided
        if not is_batch or tokens.dtype != torch.int64 or tokens.dim() != 2:
            found = f"one of {tokens.dtype}" if is_batch else show(tokens)
            raise ValueError(f"tokens: expected an int64 tensor (batch, sequence), got {found}")
        if not 0 < tokens.shape[1] <= self.config.max_seq_len:
            raise ValueError(
                f"tokens: expected 1 to {self.config.max_seq_len} (max_seq_len) in a row, "
                f"got {tokens.shape[1]}"
            )
        device = self.parameters.weights.device
        if tokens.device != device:
            raise ValueError(f"tokens: expected a tensor on {device}, got one on {tokens.device}")
        if device.type == "cpu" and not ((tokens >= 0) & (tokens < self.vocab_size)).all():
            raise ValueError(
                f"tokens: expected ids from 0 to {self.vocab_size - 1}, "
                f"got {int(tokens.min())} to {int(tokens.max())}"
            )

    # ------------------------------------------------------- loss and gradients, logits in chunks

    def forward_backward(
        self,
        tokens: Tensor,
        targets: Tensor,
        scale: Tensor,
        document_start: Tensor | None = None,
        accumulate: bool = True,
        finished: Callable[[str], object] = lambda bucket: None,
    ) -> Tensor:
        """The loss of a micro-batch; adds its gradient to every parameter's.

        tokens, targets (B, T) int64, targets already shifted, -100 where there is none; scale 0-d:
        the factor of each token's loss, 1 / number of targets in the whole batch for a mean.
        accumulate: False for the first micro-batch: gradients are overwritten.
        finished: called with each bucket's name (`Parameters.buckets`) as soon as its gradients are
        complete: the last block's matrices first, then vectors, then tables.
        Returns scale · Σ losses, 0-d.
        """
        y = self._trunk_forward(tokens, document_start)
        with self._whole():
            loss, dy = self.output.forward_backward(y, targets, scale, accumulate)
            del y
            self._trunk_backward(dy, accumulate, finished)
        return loss

    def losses(
        self, tokens: Tensor, targets: Tensor, document_start: Tensor | None = None
    ) -> Tensor:
        """The loss of each token, for evaluation: nothing is kept. (B, T), (B, T) -> (B·T,)."""
        return self.output.losses(self._trunk_forward(tokens, document_start, keep=False), targets)

    # -------------------------------------------------------------------------------- generation

    def new_cache(self, batch_size: int, length: int) -> list[KeyValueCache]:
        """Memory for the keys and values of `batch_size` sequences of `length` tokens."""
        return [block.attention.new_cache(batch_size, length) for block in self.blocks]

    def prefill(self, tokens: Tensor, lengths: Tensor, cache: list[KeyValueCache]) -> Tensor:
        """Read prompts (B, T), padded on the right to one length, and fill the cache.

        lengths (B,): prompt tokens of each row. The padding after them is never read, because
        attention is causal. Returns the logits (B, V) after each row's last token.
        """
        layers = iter(cache)
        y, *_ = self.network.forward(tokens, None, lambda s: next(layers).fill(s.attention.qkv))
        return self.output.forward(y[torch.arange(len(lengths), device=y.device), lengths - 1])

    def decode(self, tokens: Tensor, lengths: Tensor, cache: list[KeyValueCache]) -> Tensor:
        """One more token per row, tokens (B,) at index lengths[b] - 1: logits (B, V) after it."""
        x, branch = self.embedding.decode(tokens, lengths), None
        for block, layer_cache in zip(self.blocks, cache, strict=True):
            x, branch = block.decode(x, branch, layer_cache, lengths)
        y, _ = self.final_norm.forward(x, branch)
        return self.output.forward(y)

    # -------------------------------------------------------------------- parameters, by name

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(name, view of the weights): the model computes with these views."""
        return self.parameters.named(self.parameters.weights)

    def named_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """(name, view of the gradient), the same names and shapes as `named_parameters`."""
        return self.parameters.named(self._gradients())

    def zero_gradients(self) -> None:
        """Call this before the first backward of a step, because every backward adds."""
        self._gradients().zero_()

    def _gradients(self) -> Tensor:
        """The flat buffer. RuntimeError for a model that was built without one."""
        if not self.training:
            raise RuntimeError("gradients: expected a model with gradients, got inference=True")
        if self.parameters.divided == "gradients":
            raise RuntimeError("gradients: expected all of them, got shard gradients")
        return self.parameters.gradients

    @checked(learning_rate=Rate)
    def update_parameters(self, learning_rate: float) -> None:
        """Plain gradient descent: w ← w - η g. Nothing changes if a gradient is not finite."""
        p = self.parameters
        gradients = self._gradients()
        if p.divided != "none":
            raise RuntimeError(f"update_parameters: expected shard none, got {p.divided}")
        one, rate = gradients.new_ones(()), gradients.new_tensor(learning_rate)
        finite = (rate * self.ops.gradient_norms(gradients, PIECES)).isfinite().all()
        seed = p.updates if p.low_precision() else None
        self.ops.sgd_update(p.weights, p.master, gradients, rate, one, finite, 0.0, seed)
        p.updates += finite
