"""Column sums of a tall matrix: the gradient of every bias, by partial sums in a fixed order.

    backward of y = x Wᵀ + b:    db_m += Σ_n dy_nm

No floating-point atomics, so that two runs give the same bits. Each program sums its share of the
rows into one row of a small float32 buffer `partials`; a second kernel adds that buffer's columns,
in order, to the gradient. The other backward kernels that feed a bias or a gain (LayerNorm, GELU)
write such partials themselves and share the second kernel: `add_partials`.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl
from mantrans.kernels.triton.launch import (
    TRITON_NAME,
    ResourceCase,
    cdiv,
    check_tensor,
    launch,
    multiprocessors,
    next_power_of_two,
)

BLOCK_COLUMNS = 256  # one warp: 32 lanes of 8 bf16, 16 bytes each, and sums never leave a lane
BLOCK_ROWS = 8  # eight loads under way in each lane
MIN_ROWS_A_PROGRAM = 32  # below this a partial row costs too much beside the rows it sums
WARPS_A_MULTIPROCESSOR = 24  # of every kernel here and in GELU's backward: all are resident
PARTIAL_ROWS = 64  # rows of `partials` that the second kernel loads at once
PARTIAL_COLUMNS = 32


@triton.jit(do_not_specialize=["n_rows", "n_programs"])
def column_sums_kernel(
    dy_ptr,
    sums_ptr,
    n_rows,
    n_columns,
    n_programs,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """Program (c, p) sums rows p·BLOCK_ROWS, (p + n_programs)·BLOCK_ROWS, … of column block c.

    dy_ptr    (n_rows, n_columns) any float: the matrix
    sums_ptr  (n_programs, n_columns) float32: row p receives program p's sums; with ACCUMULATE
              (one program a column) they are added to what row 0 holds
    """
    program = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_columns = columns < n_columns
    sums = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    for first in range(program * BLOCK_ROWS, n_rows, n_programs * BLOCK_ROWS):
        rows = first + tl.arange(0, BLOCK_ROWS)
        offsets = rows.to(tl.int64)[:, None] * n_columns + columns[None, :]
        mask = (rows < n_rows)[:, None] & in_columns[None, :]
        sums += tl.sum(tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32), 0)
    sums_ptrs = sums_ptr + program.to(tl.int64) * n_columns + columns
    if ACCUMULATE:
        sums += tl.load(sums_ptrs, mask=in_columns, other=0.0)
    tl.store(sums_ptrs, sums, mask=in_columns)


@triton.jit(do_not_specialize=["n_partials"])
def add_partials_kernel(
    partials_ptr,
    first_ptr,
    second_ptr,
    n_partials,
    n_columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Program (c, k) adds column block c of the k-th partial buffer to the k-th gradient.

    partials_ptr  (2 or 1, n_partials, n_columns) float32: one or two buffers of partial sums
    first_ptr     (n_columns,) float32: the gradient that buffer 0 is added to
    second_ptr    (n_columns,) float32: that of buffer 1, or None
    """
    buffer = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_columns = columns < n_columns
    partials_ptr += buffer.to(tl.int64) * n_partials * n_columns
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for first in range(0, n_partials, BLOCK_ROWS):
        rows = first + tl.arange(0, BLOCK_ROWS)
        offsets = rows.to(tl.int64)[:, None] * n_columns + columns[None, :]
        mask = (rows < n_partials)[:, None] & in_columns[None, :]
        total += tl.load(partials_ptr + offsets, mask=mask, other=0.0)
    sums = tl.sum(total, 0)
    gradient_ptr = first_ptr
    if second_ptr is not None:
        gradient_ptr = tl.where(buffer == 0, first_ptr, second_ptr)
    gradient = tl.load(gradient_ptr + columns, mask=in_columns, other=0.0)
    tl.store(gradient_ptr + columns, gradient + sums, mask=in_columns)


def add_partials(partials: Tensor, first: Tensor, second: Tensor | None = None) -> None:
    """first += partials[0].sum(0), and second += partials[1].sum(0) if it is given.

    partials (k, P, C) float32 with k = 1 or 2; first, second (C,) float32.
    """
    n_buffers, n_partials, n_columns = partials.shape
    launch(
        add_partials_kernel,
        (cdiv(n_columns, PARTIAL_COLUMNS), n_buffers if second is not None else 1),
        partials,
        first,
        second,
        n_partials,
        n_columns,
        BLOCK_ROWS=PARTIAL_ROWS,
        BLOCK_COLUMNS=PARTIAL_COLUMNS,
        num_warps=4,
    )


def column_blocks(n_columns: int) -> tuple[int, int]:
    """(BLOCK_COLUMNS, how many of them) for one warp a block."""
    block = min(BLOCK_COLUMNS, next_power_of_two(n_columns))
    return block, cdiv(n_columns, block)


def row_programs(n_rows: int, n_blocks: int, device: torch.device) -> int:
    """How many one-warp programs share the rows of one column block, for a GPU that is full."""
    wanted = cdiv(WARPS_A_MULTIPROCESSOR * multiprocessors(device), n_blocks)
    return max(1, min(wanted, n_rows // MIN_ROWS_A_PROGRAM))


def add_column_sums(matrix: Tensor, sums: Tensor) -> None:
    """sums += matrix.sum(0).   matrix (N, M) any float, contiguous; sums (M,) float32."""
    n_rows, n_columns = matrix.shape
    block, n_blocks = column_blocks(n_columns)
    n_programs = row_programs(n_rows, n_blocks, matrix.device)
    direct = n_programs == 1
    partials = sums if direct else sums.new_empty(1, n_programs, n_columns)
    launch(
        column_sums_kernel,
        (n_blocks, n_programs),
        matrix,
        partials,
        n_rows,
        n_columns,
        n_programs,
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_COLUMNS=block,
        ACCUMULATE=direct,
        num_warps=1,
    )
    if not direct:
        add_partials(partials, sums)


def bias_gradient(dy: Tensor, dbias: Tensor) -> None:
    """dbias += the column sums of dy.

    dy (..., M) float32, float16 or bfloat16; dbias (M,) float32.
    Raises ValueError for another dtype, shape, stride or device.
    """
    check_tensor("dy", dy)
    check_tensor("dbias", dbias, shape=dy.shape[-1:], dtype=torch.float32, device=dy.device)
    add_column_sums(dy.view(-1, dy.shape[-1]), dbias)


def resource_cases() -> list[ResourceCase]:
    """The shipped configurations: each dtype, with partial sums and without; one buffer and two."""
    return [
        *(_sums_case(dtype, direct) for dtype in TRITON_NAME.values() for direct in (False, True)),
        _partials_case("one buffer", {}, {"second_ptr": None}),
        _partials_case("two buffers", {"second_ptr": "*fp32"}, {}),
    ]


def _sums_case(dtype: str, direct: bool) -> ResourceCase:
    pointers = {"dy_ptr": f"*{dtype}", "sums_ptr": "*fp32"}
    lengths = {"n_rows": "i32", "n_columns": "i32", "n_programs": "i32"}
    return ResourceCase(
        name=f"column_sums {dtype} {'direct' if direct else 'partial'}",
        fn=column_sums_kernel,
        signature={**pointers, **lengths},
        constexprs={
            "BLOCK_ROWS": BLOCK_ROWS,
            "BLOCK_COLUMNS": BLOCK_COLUMNS,
            "ACCUMULATE": direct,
        },
        divisible_by_16=(*pointers, "n_columns"),
        num_warps=1,
        num_stages=3,
    )


def _partials_case(name: str, second: dict[str, str], absent: dict[str, None]) -> ResourceCase:
    pointers = {"partials_ptr": "*fp32", "first_ptr": "*fp32", **second}
    return ResourceCase(
        name=f"add_partials {name}",
        fn=add_partials_kernel,
        signature={**pointers, "n_partials": "i32", "n_columns": "i32"},
        constexprs={**absent, "BLOCK_ROWS": PARTIAL_ROWS, "BLOCK_COLUMNS": PARTIAL_COLUMNS},
        divisible_by_16=(*pointers, "n_columns"),
        num_warps=4,
        num_stages=3,
    )
