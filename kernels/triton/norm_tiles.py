"""What the kernels of layer norm and RMS norm share: tiles of whole rows, column sums, launches.

Both directions read whole rows once into registers, in tiles of several rows so that many loads are
in flight at a time. The backward runs a fixed number of programs, each with many rows: its share of
each vector's gradient stays in registers, one sum per element of the tile, until its last row, then
is added to one row of partial sums (see `partials`). So the gradient has the same bits in every
run, and the number of rows changes nothing but the grid.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mantrans.kernels.triton.launch import (
    cdiv,
    check_tensor,
    launch,
    multiprocessors,
    next_power_of_two,
    refuse,
)
from mantrans.kernels.triton.partials import check_vector_gradient, most_programs, rows_for

MAX_WIDTH = 8192  # a row must fit into the registers of one program
COLUMNS_A_WARP = 256  # 32 lanes with 8 bf16 (16 bytes) each
MAX_WARPS = 16
# Elements per lane of each tensor: two 16-byte loads of bf16 of each in flight, and in the backward
# enough registers for three sums.
ELEMENTS_A_LANE = 16
# Of the backward. With up to 128 registers per lane, 16 warps are resident. A program has at least
# four of them, because each program needs a row of partial sums.
WARPS_A_MULTIPROCESSOR = 16
MIN_BACKWARD_WARPS = 4


@triton.jit
def load_row_vector(ptr, columns, in_columns):
    """γ or β as float32, shape (1, BLOCK_COLUMNS)."""
    return tl.load(ptr + columns, mask=in_columns, other=0.0).to(tl.float32)[None, :]


@triton.jit
def load_sum(x_ptr, branch_ptr, residual_ptr, offsets, mask):
    """x as float32. With a branch x = residual + branch is stored first, rounded: the backward
    reads it, so it is what is normalized."""
    if branch_ptr is None:
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    else:
        branch = tl.load(branch_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        rounded = (residual + branch).to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + offsets, rounded, mask=mask)
        x = rounded.to(tl.float32)
    return x


@triton.jit
def store_sums(rows_ptr, tile, program, stride, columns, in_columns, ACCUMULATE: tl.constexpr):
    """Add the column sums of tile (BLOCK_ROWS, BLOCK_COLUMNS) to row `program`, or overwrite it;
    nothing for a vector without gradient."""
    if rows_ptr is not None:
        ptrs = rows_ptr + program.to(tl.int64) * stride + columns
        sums = tl.sum(tile, 0)
        if ACCUMULATE:
            sums += tl.load(ptrs, mask=in_columns, other=0.0)
        tl.store(ptrs, sums, mask=in_columns)


# ---------------------------------------------------------------------------------- launchers


def tile(n_columns: int, min_warps: int = 1) -> tuple[int, int, int]:
    """(BLOCK_ROWS, BLOCK_COLUMNS, warps): the warps are side by side along a row."""
    block_columns = next_power_of_two(n_columns)
    warps = min(MAX_WARPS, max(min_warps, block_columns // COLUMNS_A_WARP))
    return max(1, 32 * ELEMENTS_A_LANE * warps // block_columns), block_columns, warps


def backward_tile(n_columns: int) -> tuple[int, int, int]:
    """The same for the backward. With the most warps a lane has 128 registers: room for three sums
    of one row, not of two."""
    block_rows, block_columns, warps = tile(n_columns, MIN_BACKWARD_WARPS)
    return (1 if warps == MAX_WARPS else block_rows), block_columns, warps


def launch_forward(kernel: Any, y: Tensor, *arguments: Tensor | None, eps: float) -> None:
    """Launch a kernel (*arguments, n_rows, n_columns, eps) over the rows of y (..., C)."""
    C = y.shape[-1]
    N = y.numel() // C
    block_rows, block_columns, warps = tile(C)
    launch(
        kernel,
        (cdiv(N, block_rows),),
        *arguments,
        N,
        C,
        eps,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
        num_warps=warps,
    )


def launch_backward(
    kernel: Any, dx: Tensor, *arguments: Tensor | None, vectors: tuple[Tensor | None, ...]
) -> None:
    """Launch a kernel (*arguments, *rows of partial sums, n_rows, n_columns, n_programs, stride)
    over the rows of dx (..., C), and add the partial sums to the gradients `vectors`."""
    C = dx.shape[-1]
    N = dx.numel() // C
    block_rows, block_columns, warps = backward_tile(C)
    resident = max(1, WARPS_A_MULTIPROCESSOR // warps) * multiprocessors(dx.device)
    n_programs = min(cdiv(N, block_rows), resident, most_programs(*vectors) or resident)
    with rows_for(n_programs, *vectors) as rows:
        launch(
            kernel,
            (n_programs,),
            *arguments,
            *rows.tensors,
            N,
            C,
            n_programs,
            rows.stride,
            ACCUMULATE=rows.accumulate,
            BLOCK_ROWS=block_rows,
            BLOCK_COLUMNS=block_columns,
            num_warps=warps,
        )


def check_rows(argument: str, x: Tensor, **others: Tensor | None) -> int:
    """The row length C of x; refuses more than MAX_WIDTH, and others that are not like x."""
    check_tensor(argument, x)
    if x.dim() == 0 or not 1 <= x.shape[-1] <= MAX_WIDTH:
        refuse(argument, f"shape {tuple(x.shape)}", f"a last axis of 1 to {MAX_WIDTH}")
    for name, other in others.items():
        if other is not None:
            check_tensor(name, other, shape=x.shape, dtype=x.dtype, device=x.device)
    return x.shape[-1]


def check_statistic(argument: str, statistic: Tensor, x: Tensor, dtype: torch.dtype) -> None:
    """Refuse anything but one number of `dtype` for each row of x."""
    rows = (x.numel() // x.shape[-1],)
    check_tensor(argument, statistic, shape=rows, dtype=dtype, device=x.device)


def check_vectors(x: Tensor, dweight: Tensor, **others: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of vectors; refuses any but all (C,), or all rows of one stride."""
    C, device = x.shape[-1], x.device
    check_vector_gradient("dweight", dweight, C, device)
    for name, vector in others.items():
        if vector is None:
            continue
        check_vector_gradient(name, vector, C, device)
        if vector.dim() != dweight.dim() or vector.stride(0) != dweight.stride(0):
            refuse(name, f"strides {vector.stride()}", f"{dweight.stride()}, those of dweight")
    return dweight, *others.values()
