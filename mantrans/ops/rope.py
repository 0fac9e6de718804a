"""Rotary position embedding, in the layout of halves that transformers has."""

from __future__ import annotations

import torch
from torch import Tensor

from mantrans.kernels.reference import wide_dtype
from mantrans.ops.registration import backend_of, differentiate, expect, expect_floats, operation


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The heads of q and k, each pair (x_i, x_{i + D/2}) turned by its position's angle
    (Su et al. 2021).

    q (B, T, H, D), k (B, T, H_kv, D); D even. cos, sin (T, D/2), or (B, T, D/2) or (1, T, D/2);
    with a last axis of D, as transformers makes them, the first half is read. They get no gradient.
    Returns both in their dtypes, rotated in float32 (float64 stays float64) and rounded once.
    """
    return turned("q", q, cos, sin), turned("k", k, cos, sin)


def turned(name: str, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """One of the two, (B, T, H, D)."""
    expect_floats(name, x)
    pairs = x.dim() == 4 and x.shape[3] > 0 and x.shape[3] % 2 == 0
    expect(name, pairs, "(B, T, H, D), D even", tuple(x.shape))
    B, T, H, D = x.shape
    tables = [table_of(n, t, x) for n, t in (("cos", cos), ("sin", sin))]
    expect("sin", tables[0].shape == tables[1].shape, f"the shape of cos, {tuple(cos.shape)}",
           tuple(sin.shape))  # fmt: skip
    rows = x.reshape(B, T, H * D) if tables[0].dim() == 2 else x.reshape(1, B * T, H * D)
    return _forward(rows, *(t.reshape(-1, D // 2) for t in tables), H).view(B, T, H, D)


def table_of(name: str, table: Tensor, x: Tensor) -> Tensor:
    """cos or sin (T, D/2) or (B, T, D/2) in the dtype in which x is rotated."""
    expect_floats(name, table)
    expect(name, table.device == x.device, f"device {x.device}", table.device)
    B, T, _, D = x.shape
    expect(name, table.dim() in (2, 3), "(T, D/2) or (B, T, D/2)", tuple(table.shape))
    table = table[..., : D // 2] if table.shape[-1] == D else table
    table = table[0] if table.dim() == 3 and len(table) == 1 else table
    fits = tuple(table.shape) in ((T, D // 2), (B, T, D // 2))
    expect(name, fits, f"shape {(T, D // 2)} or {(B, T, D // 2)}", tuple(table.shape))
    return table.to(wide_dtype(x.dtype))


def forward(x: Tensor, cos: Tensor, sin: Tensor, n_heads: int) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    tables = cos.contiguous(), sin.contiguous()
    return backend_of(x).rotary_forward(x, *tables, n_heads, 0)


def backward(dx: Tensor, cos: Tensor, sin: Tensor, n_heads: int) -> Tensor:
    dx = dx.clone(memory_format=torch.contiguous_format)
    tables = cos.contiguous(), sin.contiguous()
    return backend_of(dx).rotary_backward(dx, *tables, n_heads, 0)


def fake(x: Tensor, cos: Tensor, sin: Tensor, n_heads: int) -> Tensor:
    return x.new_empty(x.shape)


_forward = operation("rope", forward, fake)
_backward = operation("rope_backward", backward, fake)
differentiate(
    _forward,
    _backward,
    keep=lambda x, cos, sin, n_heads, y: (cos, sin, n_heads),
    wiring=(0,),
)
