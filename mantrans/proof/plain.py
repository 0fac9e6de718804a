"""The forwards in PyTorch's own functions, for its autograd. Nothing here is shared with the
mathematics that they judge; names and arguments are those of `mantrans.kernels.reference`."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from mantrans.kernels.operations import rotated_and_packed, split_heads, visible


def embedding_forward(
    tokens: Tensor, token_table: Tensor, position_table: Tensor | None = None
) -> Tensor:
    x = F.embedding(tokens, token_table)
    return x if position_table is None else x + position_table[: tokens.shape[1]]


def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


def layer_norm_forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple:
    return F.layer_norm(x, weight.shape, weight, bias, eps), None, None


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple:
    return F.rms_norm(x, weight.shape, weight, eps), None


def rotary_forward(
    qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv_heads: int, positions: None
) -> Tensor:
    T = qkv.shape[1]
    return rotated_and_packed(
        *split_heads(qkv, n_heads, n_kv_heads), {"cos": cos[:T], "sin": sin[:T]}
    )


def norm_rotary_forward(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    n_heads: int,
    n_kv_heads: int,
    positions: None,
) -> tuple:
    T = qkv.shape[1]
    q, k, v = split_heads(qkv, n_heads, n_kv_heads)
    q = F.rms_norm(q, q_weight.shape, q_weight, eps)
    k = F.rms_norm(k, k_weight.shape, k_weight, eps)
    return rotated_and_packed(q, k, v, {"cos": cos[:T], "sin": sin[:T]}), None


def attention_forward(
    qkv: Tensor, n_heads: int, first_key: Tensor | None, n_kv_heads: int
) -> tuple:
    q, k, v = split_heads(qkv, n_heads, n_kv_heads)
    mask = None if first_key is None else visible(first_key)
    out = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=mask is None, enable_gqa=n_heads != n_kv_heads
    )
    return out.transpose(1, 2).flatten(2), None


def bias_gelu_forward(h: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.gelu(h if bias is None else h + bias, approximate="tanh")


def swiglu_forward(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


def cross_entropy_forward(logits: Tensor, targets: Tensor, vocab_size: int) -> tuple:
    return F.cross_entropy(logits, targets, reduction="none"), None
