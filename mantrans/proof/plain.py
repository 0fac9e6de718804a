"""The forwards in PyTorch's own functions, for its autograd.

Names and arguments are those of `mantrans.kernels.reference`, but nothing of its mathematics is
used. `see` is called with what a function computes on its way, and returns it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mantrans.kernels.operations import rotated_and_packed, split_heads, visible
from mantrans.kernels.reference import widen

See = Callable[[str, Tensor], Tensor]


def embedding_forward(
    tokens: Tensor, token_table: Tensor, position_table: Tensor | None = None
) -> Tensor:
    x = F.embedding(tokens, token_table)
    return x if position_table is None else x + position_table[: tokens.shape[1]]


def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


def layer_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, see: See
) -> tuple:
    x_hat = see("x_hat", F.layer_norm(x, weight.shape, None, None, eps))
    return x_hat * weight if bias is None else x_hat * weight + bias, None, None


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float, *, see: See) -> tuple:
    return see("x_hat", F.rms_norm(x, weight.shape, None, eps)) * weight, None


def rotary_forward(
    qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv_heads: int, positions: None
) -> Tensor:
    """positions: None, which is 0 .. T-1."""
    tables = {"cos": cos[: qkv.shape[1]], "sin": sin[: qkv.shape[1]]}
    return rotated_and_packed(*split_heads(qkv, n_heads, n_kv_heads), tables)


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
    tables = {"cos": cos[: qkv.shape[1]], "sin": sin[: qkv.shape[1]]}
    q, k, v = split_heads(qkv, n_heads, n_kv_heads)
    q = F.rms_norm(q, q_weight.shape, q_weight, eps)
    k = F.rms_norm(k, k_weight.shape, k_weight, eps)
    return rotated_and_packed(q, k, v, tables), None


def attention_forward(
    qkv: Tensor, n_heads: int, first_key: Tensor | None, n_kv_heads: int, *, see: See
) -> tuple:
    """Each head of q has its own k and v here, of which those of a group are equal."""
    heads = split_heads(qkv, n_heads, n_kv_heads)
    q, k, v = (
        see(name, x.repeat_interleave(n_heads // x.shape[1], dim=1))
        for name, x in zip("qkv", heads, strict=True)
    )
    first_key = qkv.new_zeros(qkv.shape[:2]) if first_key is None else first_key
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~visible(first_key), -torch.inf)
    p = see("p", F.softmax(see("scores", scores), dim=-1))
    return (p @ v).transpose(1, 2).flatten(2), None


def bias_gelu_forward(h: Tensor, bias: Tensor | None = None, *, see: See) -> Tensor:
    return F.gelu(see("u", h if bias is None else h + bias), approximate="tanh")


def swiglu_forward(h: Tensor, *, see: See) -> Tensor:
    gate, up = (see(name, x) for name, x in zip(("gate", "up"), h.chunk(2, dim=-1), strict=True))
    return F.silu(gate) * up


def cross_entropy_forward(logits: Tensor, targets: Tensor, vocab_size: int) -> tuple:
    return F.cross_entropy(widen(logits), targets, reduction="none"), None
