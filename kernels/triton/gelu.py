"""GELU in its tanh form (Hendrycks & Gimpel 2016), with the bias of the product before it.

    forward     u = h + b
                y = ½ u (1 + tanh z) = u σ(2z)        z = √(2/π) (u + 0.044715 u³)

    backward    s = σ(2z)
                dh = dy (s + 2 u s (1 - s) z'(u))     z' = √(2/π) (1 + 3 · 0.044715 u²)
                db += Σ_rows dh

because tanh z = 2 σ(2z) - 1: one exponential and one division per element. The forward keeps only
its input h; the backward recomputes u and s from it. The bias gradient is computed in the same
pass: each program adds its rows' dh, in float32 and before rounding, to one row of partial sums
(see `partials`).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mantrans.kernels.triton.bias_gradient import column_blocks, row_programs
from mantrans.kernels.triton.launch import (
    cdiv,
    check_tensor,
    gpu_of,
    launch,
)
from mantrans.kernels.triton.partials import check_vector_gradient, most_programs, rows_for

FORWARD_ROWS, FORWARD_WARPS = 16, 4  # four 16-byte loads of bf16 in flight per lane
BACKWARD_LANE_BYTES = 64  # in flight per lane, of each of two tensors

SCALE = tl.constexpr(math.sqrt(2 / math.pi))
CUBIC = tl.constexpr(0.044715)
MINUS_2_LOG2_E = tl.constexpr(-2 * math.log2(math.e))


@triton.jit
def gate(u):
    """σ(2z) = 1 / (1 + exp(-2z)): the factor of u in GELU."""
    z = (u + u * u * u * CUBIC) * SCALE
    return 1.0 / (1.0 + tl.exp2(z * MINUS_2_LOG2_E))


@triton.jit
def gate_and_motion(u):
    """s = σ(2z) and s (1 - s), with a = exp(-2|z|) <= 1: as the difference of s from 1, the second
    would keep few digits where the gate is open, and there u and z' are large."""
    z = (u + u * u * u * CUBIC) * SCALE
    a = tl.exp2(tl.abs(z) * MINUS_2_LOG2_E)
    r = 1.0 / (1.0 + a)
    return tl.where(z < 0, a * r, r), a * r * r


@triton.jit
def load_bias(bias_ptr, columns, in_columns):
    """b as float32, shape (1, BLOCK_COLUMNS); zeros without a bias."""
    if bias_ptr is None:
        bias = tl.zeros(columns.shape, tl.float32)
    else:
        bias = tl.load(bias_ptr + columns, mask=in_columns, other=0.0).to(tl.float32)
    return bias[None, :]


@triton.jit(do_not_specialize=["n_rows"])
def bias_gelu_forward_kernel(
    h_ptr,
    bias_ptr,
    y_ptr,
    n_rows,
    n_columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Program (r, c) computes one tile of y.

    h_ptr     (n_rows, n_columns) any float: the product before its bias
    bias_ptr  (n_columns,) any float, or None
    y_ptr     (n_rows, n_columns) like h: written
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_columns = columns < n_columns
    offsets = rows[:, None] * n_columns + columns[None, :]
    mask = (rows < n_rows)[:, None] & in_columns[None, :]
    u = tl.load(h_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    u += load_bias(bias_ptr, columns, in_columns)
    y = u * gate(u)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_rows", "n_programs"])
def bias_gelu_backward_kernel(
    dy_ptr,
    h_ptr,
    bias_ptr,
    dh_ptr,
    dbias_ptr,
    n_rows,
    n_columns,
    n_programs,
    stride,
    ACCUMULATE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Program (c, p) processes row tiles p, p + n_programs, … of column block c.

    dy_ptr        (n_rows, n_columns) any float: the gradient of y
    h_ptr         (n_rows, n_columns) like dy: the product before its bias
    bias_ptr      (n_columns,) any float, or None
    dh_ptr        (n_rows, n_columns) like dy: written
    dbias_ptr     (n_programs, n_columns) float32, rows `stride` apart: program p adds its share of
                  db to row p; or None
    """
    program = tl.program_id(1)
    columns = tl.program_id(0).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_columns = columns < n_columns
    bias = load_bias(bias_ptr, columns, in_columns)
    dbias = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    for tile in range(program, (n_rows - 1) // BLOCK_ROWS + 1, n_programs):  # cdiv can wrap
        rows = tl.cast(tile, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        offsets = rows[:, None] * n_columns + columns[None, :]
        mask = (rows < n_rows)[:, None] & in_columns[None, :]
        u = tl.load(h_ptr + offsets, mask=mask, other=0.0).to(tl.float32) + bias
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        s, motion = gate_and_motion(u)
        dz = (1.0 + u * u * (3.0 * CUBIC)) * SCALE
        dh = dy * (s + 2.0 * u * motion * dz)  # masked elements: times dy = 0
        tl.store(dh_ptr + offsets, dh.to(dh_ptr.dtype.element_ty), mask=mask)
        if dbias_ptr is not None:
            dbias += tl.sum(dh, 0)
    if dbias_ptr is not None:
        share_ptrs = dbias_ptr + program.to(tl.int64) * stride + columns
        if ACCUMULATE:
            dbias += tl.load(share_ptrs, mask=in_columns, other=0.0)
        tl.store(share_ptrs, dbias, mask=in_columns)


# ---------------------------------------------------------------------------------- launchers


def backward_rows(h: Tensor) -> int:
    """The number of rows in a tile of the backward; on AMD's half of them where 16 does not divide
    a row's length, because addresses then take the registers."""
    rows = BACKWARD_LANE_BYTES // (8 * h.itemsize)
    gpu = gpu_of(h.device)
    return rows // 2 if gpu and gpu.capability == 0 and h.shape[-1] % 16 else rows


def check_bias(bias: Tensor | None, h: Tensor) -> None:
    """Refuse a bias that does not fit h (..., F)."""
    if bias is not None:
        check_tensor("bias", bias, shape=h.shape[-1:], device=h.device)


def bias_gelu_forward(h: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = gelu(h + bias).

    h (..., F), bias (F,) or None: float32, float16 or bfloat16. Returns y (..., F).
    Raises ValueError for another dtype, shape, stride or device.
    """
    check_tensor("h", h)
    check_bias(bias, h)
    F = h.shape[-1]
    N = h.numel() // F
    y = torch.empty_like(h)
    block, n_blocks = column_blocks(F)
    launch(
        bias_gelu_forward_kernel,
        (cdiv(N, FORWARD_ROWS), n_blocks),
        h,
        bias,
        y,
        N,
        F,
        BLOCK_ROWS=FORWARD_ROWS,
        BLOCK_COLUMNS=block,
        num_warps=FORWARD_WARPS,
    )
    return y


def bias_gelu_backward(
    dy: Tensor, h: Tensor, bias: Tensor | None = None, dbias: Tensor | None = None
) -> Tensor:
    """The gradient of h; its column sums are added to dbias.

    dy, h (..., F) of one dtype; bias (F,) or None; dbias (F,) float32, partial sums (P, F), or
    None. Returns dh (..., F). Raises ValueError for another dtype, shape, stride or device.
    """
    check_tensor("h", h)
    check_tensor("dy", dy, shape=h.shape, dtype=h.dtype, device=h.device)
    check_bias(bias, h)
    if dbias is not None:
        check_vector_gradient("dbias", dbias, h.shape[-1], h.device)
    F = h.shape[-1]
    N = h.numel() // F
    dh = torch.empty_like(h)
    block, n_blocks = column_blocks(F)
    n_programs = row_programs(N, n_blocks, h.device, most_programs(dbias))
    with rows_for(n_programs, dbias) as rows:
        launch(
            bias_gelu_backward_kernel,
            (n_blocks, n_programs),
            dy,
            h,
            bias,
            dh,
            *rows.tensors,
            N,
            F,
            n_programs,
            rows.stride,
            ACCUMULATE=rows.accumulate,
            BLOCK_ROWS=backward_rows(h),
            BLOCK_COLUMNS=block,
            num_warps=1,
        )
    return dh
