"""Gradients of vectors: sums over all rows of a batch, in parts and in a fixed order.

The gradient of a bias or a gain is the sum of a tall matrix's rows. Floating-point atomics would
add them in a different order in every run. Instead, program p of a kernel adds its share to row p
of a float32 buffer `partials`, and `sum_partials` adds up the rows in order.

In training, one buffer (P, W) has a column for each element of all vectors of a block: an operation
gets a vector's columns (P, C) in place of its gradient, and one launch sums up a whole block. An
operation that gets the gradient itself (C,) allocates such rows and sums them at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mantrans.kernels.triton.launch import (
    cdiv,
    check_tensor,
    launch,
    multiprocessors,
    refuse,
)

ROWS_A_MULTIPROCESSOR = 4  # programs of four warps that are resident at up to 128 registers a lane
BLOCK_ROWS = 64  # rows that `sum_partials` loads at once
BLOCK_COLUMNS = 32


@triton.jit
def compensated(total, lost, x):
    """total + x, and what it lost to rounding, for the next addition (Kahan 1965): hundreds of
    additions to one float32 keep its last digit."""
    y = x - lost
    new = total + y
    return new, (new - total) - y


@triton.jit(do_not_specialize=["n_rows"])
def sum_partials_kernel(
    partials_ptr,
    gradients_ptr,
    n_rows,
    n_columns,
    stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Program c adds the rows of column block c to the gradients, and sets them to zero.

    partials_ptr   (n_rows, n_columns) float32, rows `stride` apart
    gradients_ptr  (n_columns,) float32
    """
    columns = tl.program_id(0).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_columns = columns < n_columns
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for first in range(0, n_rows, BLOCK_ROWS):
        rows = first + tl.arange(0, BLOCK_ROWS)
        offsets = rows.to(tl.int64)[:, None] * stride + columns[None, :]
        mask = (rows < n_rows)[:, None] & in_columns[None, :]
        sums += tl.load(partials_ptr + offsets, mask=mask, other=0.0)
        tl.store(partials_ptr + offsets, tl.zeros_like(sums), mask=mask)
    gradients = tl.load(gradients_ptr + columns, mask=in_columns, other=0.0)
    tl.store(gradients_ptr + columns, gradients + tl.sum(sums, 0), mask=in_columns)


def sum_partials(partials: Tensor, gradients: Tensor) -> None:
    """gradients += partials.sum(0); then sets the partials to 0.

    partials (P, W) float32, last stride 1; gradients (W,) float32, contiguous.
    Raises ValueError for another dtype, shape, stride or device.
    """
    check_tensor("gradients", gradients, shape=(None,), dtype=torch.float32)
    check_partials("partials", partials, len(gradients), gradients.device)
    launch(
        sum_partials_kernel,
        (cdiv(len(gradients), BLOCK_COLUMNS),),
        partials,
        gradients,
        len(partials),
        len(gradients),
        partials.stride(0),
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_COLUMNS=BLOCK_COLUMNS,
        num_warps=4,
    )


def partial_rows(device: torch.device) -> int:
    """The number of rows of partial sums: as many as programs run at once on a full GPU."""
    return ROWS_A_MULTIPROCESSOR * multiprocessors(device)


class Rows(NamedTuple):
    """The rows to which the programs of a kernel write their sums."""

    tensors: list[Tensor | None]  # (P, C) float32 each, or None for no gradient
    stride: int  # elements from one row to the next, in all of them
    accumulate: bool  # whether programs add to their rows or overwrite them


@contextmanager
def rows_for(n_programs: int, *gradients: Tensor | None) -> Iterator[Rows]:
    """For each gradient the rows (at least n_programs, C) that programs write to.

    A gradient (P, C) is used as rows, which are added to; the caller sums them. For a vector (C,)
    new rows are written, then added to it; a single program adds to the vector directly.
    """
    to_sum: list[tuple[Tensor, Tensor]] = []

    def rows_of(gradient: Tensor | None) -> Tensor | None:
        if gradient is None or gradient.dim() == 2:
            return gradient
        if n_programs == 1:
            return gradient.view(1, -1)
        to_sum.append((gradient.new_empty(n_programs, len(gradient)), gradient))
        return to_sum[-1][0]

    rows = [rows_of(gradient) for gradient in gradients]
    stride = next((r.stride(0) for r in rows if r is not None), 0)
    yield Rows(rows, stride, not to_sum)
    for own, gradient in to_sum:
        sum_partials(own, gradient)


def most_programs(*gradients: Tensor | None) -> int | None:
    """The number of rows of the given gradients; None for any number."""
    rows = [len(g) for g in gradients if g is not None and g.dim() == 2]
    return min(rows, default=None)


def check_vector_gradient(argument: str, gradient: Tensor, C: int, device: torch.device) -> None:
    """Refuse anything but a vector's gradient (C,) or rows (P, C) of partial sums."""
    if isinstance(gradient, Tensor) and gradient.dim() == 2:
        check_partials(argument, gradient, C, device)
    else:
        check_tensor(argument, gradient, shape=(C,), dtype=torch.float32, device=device)


def check_partials(argument: str, partials: Tensor, C: int, device: torch.device) -> None:
    """Refuse anything but float32 rows (P, C) on the device."""
    check_tensor(
        argument, partials, shape=(None, C), dtype=torch.float32, device=device, contiguous=False
    )
    if partials.stride(1) != 1:
        refuse(argument, f"strides {partials.stride()}", "a last stride of 1")
