"""SwiGLU (Shazeer 2020): a gate g and a value u, side by side in the rows of one product h.

    forward     y = g σ(g) u

    backward    s = σ(g)
                dg = dy u (s + g s (1 - s))      du = dy g s

h is (N, 2F): g in the first F columns, u in the last. The forward keeps h alone; the backward
computes s again and writes dh as h is. Each is one pass, in tiles of rows and columns; the tiles of
one row are neighbors, so that the GPU walks through memory in order.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mantrans.kernels.triton.bias_gradient import column_blocks
from mantrans.kernels.triton.launch import cdiv, check_tensor, launch, refuse

ROWS, WARPS = 8, 4  # two 16-byte loads of bf16 of each tensor in flight per lane

MINUS_LOG2_E = tl.constexpr(-math.log2(math.e))


@triton.jit
def sigmoid_and_motion(g):
    """s = σ(g) and s (1 - s), with a = exp(-|g|) <= 1, which cannot overflow: as the difference of
    s from 1, the second would keep few digits where g is large."""
    a = tl.exp2(tl.abs(g) * MINUS_LOG2_E)
    r = 1.0 / (1.0 + a)
    return tl.where(g < 0, a * r, r), a * r * r


@triton.jit
def tile_of(n_rows, n_columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """rows (BLOCK_ROWS, 1) int64, columns (1, BLOCK_COLUMNS) and mask of this program's tile."""
    n_blocks = tl.cdiv(n_columns, BLOCK_COLUMNS)
    program = tl.program_id(0)
    rows = (program // n_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = program % n_blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    return rows[:, None], columns[None, :], mask


@triton.jit(do_not_specialize=["n_rows"])
def swiglu_forward_kernel(
    h_ptr, y_ptr, n_rows, n_columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    """Program p computes tile p of y.

    h_ptr  (n_rows, 2 n_columns) any float: g, u
    y_ptr  (n_rows, n_columns) like h: written
    """
    rows, columns, mask = tile_of(n_rows, n_columns, BLOCK_ROWS, BLOCK_COLUMNS)
    gate_ptrs = h_ptr + rows * 2 * n_columns + columns
    g = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(gate_ptrs + n_columns, mask=mask, other=0.0).to(tl.float32)
    s, _ = sigmoid_and_motion(g)
    y = g * s * u
    tl.store(y_ptr + rows * n_columns + columns, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_rows"])
def swiglu_backward_kernel(
    dy_ptr, h_ptr, dh_ptr, n_rows, n_columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    """Program p computes tile p of dg and of du.

    dy_ptr  (n_rows, n_columns) any float: the gradient of y
    h_ptr   (n_rows, 2 n_columns) like dy: g, u
    dh_ptr  (n_rows, 2 n_columns) like dy: dg, du, written
    """
    rows, columns, mask = tile_of(n_rows, n_columns, BLOCK_ROWS, BLOCK_COLUMNS)
    gate_offsets = rows * 2 * n_columns + columns
    g = tl.load(h_ptr + gate_offsets, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(h_ptr + gate_offsets + n_columns, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + rows * n_columns + columns, mask=mask, other=0.0).to(tl.float32)
    s, motion = sigmoid_and_motion(g)
    dg = dy * (u * (s + g * motion))  # dy u alone could be infinite
    du = dy * (g * s)
    tl.store(dh_ptr + gate_offsets, dg.to(dh_ptr.dtype.element_ty), mask=mask)
    tl.store(dh_ptr + gate_offsets + n_columns, du.to(dh_ptr.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------------------------- launchers


def check_packed(h: Tensor) -> tuple[int, int]:
    """(N, F) of h (..., 2F); refuses a last axis that has no halves."""
    check_tensor("h", h)
    if h.dim() == 0 or h.shape[-1] % 2:
        refuse("h", f"shape {tuple(h.shape)}", "an even last axis: gate and up")
    return math.prod(h.shape[:-1]), h.shape[-1] // 2


def launch_tiles(kernel: triton.JITFunction, N: int, F: int, *tensors: Tensor) -> None:
    """Launch a kernel on every tile of (N, F)."""
    block, n_blocks = column_blocks(F)
    launch(
        kernel,
        (cdiv(N, ROWS) * n_blocks,),
        *tensors,
        N,
        F,
        BLOCK_ROWS=ROWS,
        BLOCK_COLUMNS=block,
        num_warps=WARPS,
    )


def swiglu_forward(h: Tensor) -> Tensor:
    """y = silu(g) u.

    h (..., 2F) float32, float16 or bfloat16: g, then u. Returns y (..., F).
    Raises ValueError for another dtype, shape, stride or device.
    """
    N, F = check_packed(h)
    y = h.new_empty(*h.shape[:-1], F)
    launch_tiles(swiglu_forward_kernel, N, F, h, y)
    return y


def swiglu_backward(dy: Tensor, h: Tensor) -> Tensor:
    """The gradient of h (..., 2F), of the shape of h, from dy (..., F) of its dtype.

    Raises ValueError for another dtype, shape, stride or device.
    """
    N, F = check_packed(h)
    check_tensor("dy", dy, shape=(*h.shape[:-1], F), dtype=h.dtype, device=h.device)
    dh = torch.empty_like(h)
    launch_tiles(swiglu_backward_kernel, N, F, dy, h, dh)
    return dh
