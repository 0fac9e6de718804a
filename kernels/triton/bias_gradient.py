"""Column sums of a tall matrix: the gradient of a bias.

    backward of y = x Wᵀ + b:    db_m += Σ_n dy_nm

Each program sums its share of the rows and adds it to one row of partial sums: see `partials`.
GELU's backward sums its bias gradient in its own pass, as does the norm for the branch it adds.
"""

from __future__ import annotations

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
)
from mantrans.kernels.triton.partials import (
    check_vector_gradient,
    compensated,
    most_programs,
    rows_for,
)

BLOCK_COLUMNS = 256  # one warp: 32 lanes with 8 bf16 (16 bytes) each; sums stay within a lane
BLOCK_ROWS = 8  # eight loads in flight per lane
MIN_ROWS_A_PROGRAM = 32  # with fewer, the partial row costs too much beside the rows it sums
WARPS_A_MULTIPROCESSOR = 24  # all resident, of every kernel here and in GELU's backward


@triton.jit(do_not_specialize=["n_rows", "n_programs"])
def column_sums_kernel(
    dy_ptr,
    sums_ptr,
    n_rows,
    n_columns,
    n_programs,
    stride,
    ACCUMULATE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Program (c, p) sums rows p·BLOCK_ROWS, (p + n_programs)·BLOCK_ROWS, … of column block c.

    dy_ptr    (n_rows, n_columns) any float: the matrix
    sums_ptr  (n_programs, n_columns) float32, rows `stride` apart: program p adds to row p
              (ACCUMULATE) or overwrites it
    """
    program = tl.program_id(1)
    columns = tl.program_id(0).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_columns = columns < n_columns
    sums_ptrs = sums_ptr + program.to(tl.int64) * stride + columns
    sums = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    lost = tl.zeros_like(sums)
    for tile in range(program, (n_rows - 1) // BLOCK_ROWS + 1, n_programs):  # cdiv can wrap
        rows = tl.cast(tile, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        offsets = rows[:, None] * n_columns + columns[None, :]
        mask = (rows < n_rows)[:, None] & in_columns[None, :]
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        sums, lost = compensated(sums, lost, tl.sum(dy, 0))
    if ACCUMULATE:
        sums += tl.load(sums_ptrs, mask=in_columns, other=0.0)
    tl.store(sums_ptrs, sums, mask=in_columns)


def column_blocks(n_columns: int) -> tuple[int, int]:
    """(BLOCK_COLUMNS, number of blocks) for one warp per block."""
    block = min(BLOCK_COLUMNS, next_power_of_two(n_columns))
    return block, cdiv(n_columns, block)


def row_programs(n_rows: int, n_blocks: int, device: torch.device, most: int | None = None) -> int:
    """The number of one-warp programs per column block that fill the GPU."""
    wanted = cdiv(WARPS_A_MULTIPROCESSOR * multiprocessors(device), n_blocks)
    return max(1, min(wanted, n_rows // MIN_ROWS_A_PROGRAM, most or wanted))


def add_column_sums(matrix: Tensor, sums: Tensor) -> None:
    """sums += matrix.sum(0).   matrix (N, M) any float, contiguous; sums (M,) float32, or partial
    sums (P, M)."""
    n_rows, n_columns = matrix.shape
    block, n_blocks = column_blocks(n_columns)
    n_programs = row_programs(n_rows, n_blocks, matrix.device, most_programs(sums))
    with rows_for(n_programs, sums) as rows:
        launch(
            column_sums_kernel,
            (n_blocks, n_programs),
            matrix,
            *rows.tensors,
            n_rows,
            n_columns,
            n_programs,
            rows.stride,
            ACCUMULATE=rows.accumulate,
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_COLUMNS=block,
            num_warps=1,
        )


def bias_gradient(dy: Tensor, dbias: Tensor) -> None:
    """dbias += the column sums of dy.

    dy (..., M) float32, float16 or bfloat16; dbias (M,) float32, or partial sums (P, M).
    Raises ValueError for another dtype, shape, stride or device.
    """
    check_tensor("dy", dy)
    check_vector_gradient("dbias", dbias, dy.shape[-1], dy.device)
    add_column_sums(dy.view(-1, dy.shape[-1]), dbias)
