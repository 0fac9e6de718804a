"""Causal attention: grouped heads, a window, several sequences one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from mantrans.kernels.reference import check_window, head_sizes, window_starts
from mantrans.ops.registration import (
    autocast,
    backend_of,
    differentiate,
    expect,
    expect_floats,
    expect_integers,
    expect_like,
    operation,
    shape_of,
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """softmax(q kᵀ / √D + mask) v for each head (Vaswani et al. 2017), causal.

    q (..., T, H, D); k, v (..., T, H_kv, D), H_kv a divisor of H: key head n serves the n-th group
    of query heads. window: the keys that a query sees at most, itself the last (FlashAttention's
    window_size = (window - 1, 0)); None: all. cu_seqlens (n + 1,) integers, as FlashAttention's
    varlen functions have them: q is (N, H, D), sequence i its rows cu_seqlens[i] ..
    cu_seqlens[i + 1] - 1, the first bound is 0 and the last N (checked on a CPU alone).
    Under autocast q, k and v are cast to its dtype, as those of PyTorch's SDPA are.
    Returns (..., T, H, D). Scores do not exist as a whole.
    """
    expect_floats("q", q)
    q, k, v = autocast(q, k, v)
    expect("q", q.dim() >= 3, "(..., T, H, D)", tuple(q.shape))
    expect("k", isinstance(k, Tensor) and k.dim() == q.dim(), f"{q.dim()} axes", shape_of(k))
    expect_like("k", k, q, (*q.shape[:-2], k.shape[-2], q.shape[-1]))
    expect_like("v", v, q, k.shape)
    heads = q.shape[-2], k.shape[-2]
    qkv = torch.cat((q, k, v), -2).flatten(-2)
    return packed_attention(qkv, *heads, window=window, cu_seqlens=cu_seqlens).view(q.shape)


def packed_attention(
    qkv: Tensor,
    n_heads: int,
    n_kv_heads: int | None = None,
    *,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """`attention` of one projection, without a copy.

    qkv (..., T, (H + 2 H_kv)·D): H heads of q, H_kv of k and H_kv of v side by side; n_kv_heads:
    H_kv, None for H. With cu_seqlens it is (N, (H + 2 H_kv)·D). Returns (..., T, H·D).
    """
    expect_floats("qkv", qkv)
    (qkv,) = autocast(qkv)
    axes = "(N, ...)" if cu_seqlens is not None else "(..., T, ...)"
    fits = qkv.dim() == 2 or (qkv.dim() > 2 and cu_seqlens is None)
    expect("q, k and v", fits, axes, f"{qkv.dim() - 1} axes before the heads")
    H_kv, D = head_sizes(qkv.shape[-1], n_heads, n_kv_heads)
    expect("q, k and v", D > 0, "heads of at least 1", D)
    whole = window is None or isinstance(window, int)
    expect("window", whole, "an integer or None", window)
    check_window(window)
    rows = qkv[None] if qkv.dim() == 2 else qkv.flatten(0, -3)
    starts = None
    if cu_seqlens is not None:
        expect_integers("cu_seqlens", cu_seqlens, qkv)
        starts = _starts(cu_seqlens, qkv.shape[0])
    if window is not None and window < rows.shape[1]:
        starts = window_starts(rows[..., 0], window, starts)
    out, _ = _forward(rows, n_heads, H_kv, starts)
    return out.view(*qkv.shape[:-1], n_heads * D)


def sequence_starts(cu_seqlens: Tensor, n_rows: int) -> Tensor:
    """Where the sequence of each row begins, (1, N) int32."""
    bounds = cu_seqlens.long()
    if bounds.device.type == "cpu":
        given = bounds.tolist()
        rises = given == sorted(given) and given[:1] == [0] and given[-1:] == [n_rows]
        shown = given if len(given) <= 16 else f"{given[:8]} ... {given[-8:]}"
        expect("cu_seqlens", rises, f"bounds that rise from 0 to {n_rows}", shown)
    position = torch.arange(n_rows, device=bounds.device)
    # a GPU's bounds may be wrong: no kernel must read outside the rows because of them
    sequence = torch.searchsorted(bounds, position, right=True) - 1
    return bounds[sequence.clamp(min=0)].minimum(position).int()[None]


def fake_starts(cu_seqlens: Tensor, n_rows: int) -> Tensor:
    return cu_seqlens.new_empty(1, n_rows, dtype=torch.int32)


def as_made(statistics: Tensor, qkv: Tensor, n_heads: int, n_kv_heads: int) -> Tensor:
    """With the strides that this backend's forward makes, and its fake promises."""
    made = backend_of(qkv).empty_statistics(qkv, n_heads, n_kv_heads)
    return statistics if statistics.stride() == made.stride() else made.copy_(statistics)


def forward(
    qkv: Tensor, n_heads: int, n_kv_heads: int, document_start: Tensor | None
) -> tuple[Tensor, Tensor]:
    if not qkv.numel():
        return fake_forward(qkv, n_heads, n_kv_heads, document_start)
    qkv = qkv.contiguous()
    out, statistics = backend_of(qkv).attention_forward(qkv, n_heads, document_start, n_kv_heads)
    return out, as_made(statistics, qkv, n_heads, n_kv_heads)


def fake_forward(
    qkv: Tensor, n_heads: int, n_kv_heads: int, document_start: Tensor | None
) -> tuple[Tensor, Tensor]:
    _, D = head_sizes(qkv.shape[-1], n_heads, n_kv_heads)
    out = qkv.new_empty(*qkv.shape[:-1], n_heads * D)
    return out, backend_of(qkv).empty_statistics(qkv, n_heads, n_kv_heads)


def backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    statistics: Tensor,
    n_heads: int,
    n_kv_heads: int,
    document_start: Tensor | None,
) -> Tensor:
    qkv = qkv.contiguous()
    statistics = as_made(statistics, qkv, n_heads, n_kv_heads)
    dense = dout.contiguous(), qkv, out.contiguous()
    return backend_of(qkv).attention_backward(
        *dense, statistics, n_heads, document_start, n_kv_heads
    )


def fake_backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    statistics: Tensor,
    n_heads: int,
    n_kv_heads: int,
    document_start: Tensor | None,
) -> Tensor:
    return qkv.new_empty(qkv.shape)


_starts = operation("sequence_starts", sequence_starts, fake_starts)
_forward = operation("attention", forward, fake_forward)
_backward = operation("attention_backward", backward, fake_backward)
differentiate(
    _forward,
    _backward,
    keep=lambda qkv, n_heads, n_kv_heads, document_start, out, statistics: (
        qkv, out, statistics, n_heads, n_kv_heads, document_start,
    ),
    wiring=(0,),
)  # fmt: skip
