"""What people would use instead: the same GPT in PyTorch with autograd, and transformers' GPT-2.

Same architecture, weights, data and optimizer settings. The dtype policy is the one that PyTorch's
documentation recommends: float32 weights under bfloat16 autocast.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mantrans.config import ModelConfig
from mantrans.interop.huggingface import oriented, their_name

NamedTensors = Iterable[tuple[str, Tensor]]


class RivalBlock(nn.Module):
    """Pre-norm attention and MLP, scaled_dot_product_attention inside."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C, width, bias = config.d_model, config.feed_forward_width, config.bias
        self.n_heads = config.n_heads
        self.norm_1 = nn.LayerNorm(C, config.layer_norm_epsilon, bias=bias)
        self.qkv = nn.Linear(C, 3 * C, bias=bias)
        self.projection = nn.Linear(C, C, bias=bias)
        self.norm_2 = nn.LayerNorm(C, config.layer_norm_epsilon, bias=bias)
        self.up = nn.Linear(C, width, bias=bias)
        self.down = nn.Linear(width, C, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        qkv = self.qkv(self.norm_1(x)).view(B, T, 3, self.n_heads, C // self.n_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(out.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))


class RivalGPT(nn.Module):
    """GPT-2 for autograd; forward gives the mean loss."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.vocab_size is not None
        C = config.d_model
        self.token_embedding = nn.Embedding(config.vocab_size, C)
        self.position_embedding = nn.Embedding(config.max_seq_len, C)
        self.blocks = nn.ModuleList(RivalBlock(config) for _ in range(config.n_blocks))
        self.final_norm = nn.LayerNorm(C, config.layer_norm_epsilon, bias=config.bias)
        self.output = nn.Linear(C, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.output.weight = self.token_embedding.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """tokens, targets (B, T) int64 -> mean loss, 0-d float32."""
        position = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(position)
        for block in self.blocks:
            x = block(x)
        logits = self.output(self.final_norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)

    def load(self, named_parameters: NamedTensors) -> None:
        """Take over our model's weights: (name, tensor) pairs."""
        theirs = dict(self.named_parameters())
        with torch.no_grad():
            for name, value in named_parameters:
                theirs[name.replace("attention.", "").replace("mlp.", "")].copy_(value)


class TransformersGPT2(nn.Module):
    """`transformers.GPT2LMHeadModel` with its SDPA attention; forward gives the mean loss.

    Without dropout, which would make it another function. Its GELU is the fused tanh form, the
    faster of the two that it has for the same formula.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        self.gpt2 = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=config.vocab_size, n_positions=config.max_seq_len,
                n_embd=config.d_model, n_layer=config.n_blocks, n_head=config.n_heads,
                n_inner=config.feed_forward_width, activation_function="gelu_pytorch_tanh",
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None,
                eos_token_id=None, layer_norm_epsilon=config.layer_norm_epsilon, use_cache=False,
                attn_implementation="sdpa",
            )
        )  # fmt: skip

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """tokens, targets (B, T) int64 -> mean loss, 0-d float32."""
        logits = self.gpt2(tokens).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)

    def load(self, named_parameters: NamedTensors) -> None:
        """Take over our model's weights: (name, tensor) pairs."""
        theirs = dict(self.gpt2.named_parameters())
        with torch.no_grad():
            for name, value in named_parameters:
                theirs[their_name(name)].copy_(oriented(name, value))
