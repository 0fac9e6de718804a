"""CustomTransformer: GPT-2's architecture with its backward pass written out.

    tokens → embedding → block × n_blocks → layer norm → output projection → logits → loss

The backward is the forward read upwards. Activations are kept in a list that the backward empties
as it goes, so that each dies as soon as the mathematics is done with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from mantrans.config import ModelConfig
from mantrans.layers import Block, KeyValueCache, LayerNorm, weight_of
from mantrans.parameters import Parameters, Spec

# Matrix products want dimensions that are multiples of their tiles: the vocabulary is padded.
VOCABULARY_MULTIPLE = 128


class CustomTransformer:
    """A decoder-only transformer that knows its own gradients.

    config: shape of the network; vocab_size must be set.
    ops: the module of operations to compute with (`mantrans.kernels.backend.choose`).
    dtype: float32, bfloat16 or float64, of weights and activations.
    recompute: "none" keeps all activations; "gelu" drops GELU's outputs and computes them again in
        the backward; "block" keeps only each block's input.
    keep_master: whether bfloat16 weights have float32 masters.
    """

    class Saved(NamedTuple):
        """What a forward leaves for its backward."""

        tokens: Tensor  # (B,T)
        document_start: Tensor | None  # (B,T)
        blocks: list  # per block: Block.Saved, or its input (B,T,C) where it is recomputed
        final_norm: LayerNorm.Saved
        y: Tensor  # (B,T,C) input of the output projection

    def __init__(
        self,
        config: ModelConfig,
        ops: ModuleType,
        *,
        dtype: torch.dtype,
        device: torch.device,
        recompute: str = "none",
        keep_master: bool = True,
        seed: int = 0,
    ) -> None:
        assert config.vocab_size is not None, "the vocabulary is known before a model is built"
        self.config, self.ops, self.recompute = config, ops, recompute
        self.vocab_size = config.vocab_size
        self.parameters = Parameters(parameter_specs(config), dtype, device, keep_master)
        initialize(self.parameters, config, seed)

        self.token_table = weight_of(self.parameters, "token_embedding.weight")
        self.position_table = weight_of(self.parameters, "position_embedding.weight")
        epsilon, gelu = config.layer_norm_epsilon, recompute == "gelu"
        self.blocks = [
            Block(ops, self.parameters, f"blocks.{i}", config.n_heads, epsilon, gelu)
            for i in range(config.n_blocks)
        ]
        self.final_norm = LayerNorm(ops, self.parameters, "final_norm", epsilon)
        self.output = (
            self.token_table
            if config.tie_embeddings
            else weight_of(self.parameters, "output.weight")
        )
        self._saved: CustomTransformer.Saved | None = None

    # ------------------------------------------------------------------ the network, up and down

    def _trunk_forward(
        self, tokens: Tensor, document_start: Tensor | None, keep: bool = True
    ) -> Tensor:
        """tokens (B, T) -> y (B, T, C), the input of the output projection."""
        x = self.ops.embedding_forward(tokens, self.token_table.value, self.position_table.value)
        branch, saved_blocks = None, []
        for block in self.blocks:
            x, branch, saved = block.forward(x, branch, document_start)
            if keep:
                saved_blocks.append(saved.norm_1.x if self.recompute == "block" else saved)
            del saved
        y, saved_norm = self.final_norm.forward(x, branch)
        if keep:
            self._saved = self.Saved(tokens, document_start, saved_blocks, saved_norm, y)
        return y

    def _trunk_backward(self, dy: Tensor) -> None:
        """dy (B, T, C): of the output projection's input. Adds to every gradient below it."""
        assert self._saved is not None
        (tokens, document_start, saved_blocks, saved_norm, _), self._saved = self._saved, None
        dx = self.final_norm.backward(dy, saved_norm)
        del dy, saved_norm
        for block in reversed(self.blocks):
            saved = saved_blocks.pop()
            if self.recompute == "block":
                saved = block.recompute(saved, document_start)
            dx = block.backward(dx, saved, document_start)
            del saved
        self.ops.embedding_backward(
            dx, tokens, self.token_table.gradient, self.position_table.gradient
        )

    # ----------------------------------------------------------- logits and their gradient, whole

    def forward(self, tokens: Tensor, document_start: Tensor | None = None) -> Tensor:
        """tokens (B, T) int64, T <= max_seq_len -> logits (B, T, V) in the model's dtype.

        document_start (B, T) int32: where each position's document begins, if attention is to stay
        inside it (`mantrans.kernels.reference.document_starts`).
        """
        y = self._trunk_forward(tokens, document_start)
        return self.ops.linear_forward(y, self.output.value)[..., : self.vocab_size]

    def backward(self, dlogits: Tensor) -> None:
        """Adds the gradient of every parameter, given that of the last forward's logits (B, T, V).

        Raises RuntimeError if no forward came before, or its activations are used up.
        """
        if self._saved is None:
            raise RuntimeError("backward: no activations; call forward first, once per backward")
        padding = len(self.output.value) - self.vocab_size
        dlogits = torch.nn.functional.pad(dlogits, (0, padding)).to(self._saved.y.dtype)
        dy = self.ops.linear_backward(dlogits, self._saved.y, *self.output)
        self._trunk_backward(dy)

    # ------------------------------------------------------- loss and gradients, logits in chunks

    def forward_backward(
        self,
        tokens: Tensor,
        targets: Tensor,
        scale: Tensor,
        document_start: Tensor | None = None,
    ) -> Tensor:
        """Loss of a micro-batch, and its gradient added to every parameter's.

        tokens, targets (B, T) int64, targets already shifted, -100 where there is none; scale 0-d:
        what each token's loss counts, 1 / number of targets in the whole batch for a mean.
        Returns scale · Σ losses, 0-d.
        """
        y = self._trunk_forward(tokens, document_start)
        loss, dy = self.ops.linear_cross_entropy_forward_backward(
            y.flatten(0, 1), self.output.value, targets.flatten(), scale, self.output.gradient,
            self.vocab_size,
        )  # fmt: skip
        self._trunk_backward(dy.view(y.shape))
        return loss

    def losses(
        self, tokens: Tensor, targets: Tensor, document_start: Tensor | None = None
    ) -> Tensor:
        """The loss of each token, for evaluation: nothing is kept. (B, T), (B, T) -> (B·T,)."""
        y = self._trunk_forward(tokens, document_start, keep=False)
        return self.ops.linear_cross_entropy_forward(
            y.flatten(0, 1), self.output.value, targets.flatten(), self.vocab_size
        )

    # -------------------------------------------------------------------------------- generation

    def new_cache(self, batch_size: int) -> list[KeyValueCache]:
        """Room for the keys and values of `batch_size` sequences of max_seq_len tokens."""
        shape = (batch_size, self.config.max_seq_len, self.config.d_model)
        weights = self.parameters.weights
        return [
            KeyValueCache(
                *(torch.empty(shape, dtype=weights.dtype, device=weights.device) for _ in "kv")
            )
            for _ in self.blocks
        ]

    def prefill(self, tokens: Tensor, lengths: Tensor, cache: list[KeyValueCache]) -> Tensor:
        """Read prompts (B, T), padded on the right to one length, and fill the cache.

        lengths (B,): how much of each row is prompt. What stands right of it is never looked at,
        because attention is causal. Returns the logits (B, V) after each row's last token.
        """
        x = self.ops.embedding_forward(tokens, self.token_table.value, self.position_table.value)
        branch = None
        for block, layer_cache in zip(self.blocks, cache, strict=True):
            x, branch, saved = block.forward(x, branch, None)
            layer_cache.fill(saved.attention.qkv)
        y, _ = self.final_norm.forward(x, branch)
        last = y[torch.arange(len(lengths), device=y.device), lengths - 1]
        return self.ops.linear_forward(last, self.output.value)[:, : self.vocab_size]

    def decode(self, tokens: Tensor, lengths: Tensor, cache: list[KeyValueCache]) -> Tensor:
        """One more token per row, tokens (B,) at index lengths[b] - 1: logits (B, V) after it."""
        x = self.token_table.value[tokens] + self.position_table.value[lengths - 1]
        branch = None
        for block, layer_cache in zip(self.blocks, cache, strict=True):
            x, branch = block.decode(x, branch, layer_cache, lengths)
        y, _ = self.final_norm.forward(x, branch)
        return self.ops.linear_forward(y, self.output.value)[:, : self.vocab_size]

    # -------------------------------------------------------------------- parameters, by name

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(name, view of the weights): what is written there is what the model computes with."""
        return self.parameters.named(self.parameters.weights)

    def named_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """(name, view of the gradient), the same names and shapes as `named_parameters`."""
        return self.parameters.named(self.parameters.gradients)

    def zero_gradients(self) -> None:
        """Every backward adds: call this before the first of a step."""
        self.parameters.gradients.zero_()

    def update_parameters(self, learning_rate: float) -> None:
        """Plain gradient descent: w ← w - η g."""
        p = self.parameters
        device = p.weights.device
        one, yes = torch.ones((), device=device), torch.tensor(True, device=device)
        eta = torch.tensor(learning_rate, dtype=p.gradients.dtype, device=device)
        seed = None
        if p.master is None and p.weights.dtype != p.gradients.dtype:
            seed = torch.zeros((), dtype=torch.int64, device=device)
        self.ops.sgd_update(p.weights, p.master, p.gradients, eta, one, yes, 0.0, 0, seed)


def parameter_specs(config: ModelConfig) -> list[Spec]:
    """Name and shape of every parameter, in the order in which the network meets them."""
    C, F, V = config.d_model, config.feed_forward_width, config.vocab_size
    assert V is not None
    padded = -(-V // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    def norm(name: str) -> list[Spec]:
        return [Spec(f"{name}.weight", (C,))] + [Spec(f"{name}.bias", (C,))] * config.bias

    def linear(name: str, width_in: int, width_out: int) -> list[Spec]:
        weight = Spec(f"{name}.weight", (width_out, width_in))
        return [weight] + [Spec(f"{name}.bias", (width_out,))] * config.bias

    specs = [
        Spec("token_embedding.weight", (V, C), stored_rows=padded),
        Spec("position_embedding.weight", (config.max_seq_len, C)),
    ]
    for i in range(config.n_blocks):
        block = f"blocks.{i}"
        specs += norm(f"{block}.norm_1")
        specs += linear(f"{block}.attention.qkv", C, 3 * C)
        specs += linear(f"{block}.attention.projection", C, C)
        specs += norm(f"{block}.norm_2")
        specs += linear(f"{block}.mlp.up", C, F)
        specs += linear(f"{block}.mlp.down", F, C)
    specs += norm("final_norm")
    if not config.tie_embeddings:
        specs.append(Spec("output.weight", (V, C), stored_rows=padded))
    return specs


def initialize(parameters: Parameters, config: ModelConfig, seed: int) -> None:
    """GPT-2's initialisation (Radford et al. 2019): normal, std 0.02 there; norms 1; biases 0.

    The projections that add to the residual are scaled by 1 / √(2 n_blocks), because that many of
    them are summed. Drawn on the CPU in float32, so that a seed means the same on any device.
    """
    generator = torch.Generator().manual_seed(seed)
    std = config.initializer_range
    residual_std = std / (2 * config.n_blocks) ** 0.5
    for name, spec in parameters.specs.items():
        if len(spec.shape) == 1:
            value = torch.full(spec.shape, 1.0 if name.endswith("weight") else 0.0)
        else:
            adds_to_residual = name.endswith(("attention.projection.weight", "mlp.down.weight"))
            scale = residual_std if adds_to_residual else std
            value = torch.randn(spec.shape, generator=generator) * scale
        parameters.write(name, value)
