"""RMS normalization over the last axis (Zhang & Sennrich 2019), fused with the addition before.

    forward     x = residual + branch                 (add_rms_norm_forward; rounded, then used)
                r = 1 / √(mean(x²) + ε)      x̂ = x r
                y = γ x̂

    backward    g = γ dy
                dx = r (g - x̂ mean(g x̂)) + dresidual
                dγ += Σ_rows dy x̂      db += Σ_rows dx

db is the gradient of the branch's last bias: x = residual + branch, so dx is the branch's gradient.
Both directions read whole rows once (see `norm_tiles`). Sums are float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mantrans.kernels.triton.launch import check_tensor
from mantrans.kernels.triton.norm_tiles import (
    check_rows,
    check_statistic,
    check_vectors,
    launch_backward,
    launch_forward,
    load_row_vector,
    load_sum,
    store_sums,
)


@triton.jit(do_not_specialize=["n_rows"])
def rms_norm_forward_kernel(
    x_ptr,
    branch_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    rstd_ptr,
    n_rows,
    n_columns,
    eps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Program p normalizes rows p·BLOCK_ROWS and on. BLOCK_COLUMNS holds a whole row.

    x_ptr         (n_rows, n_columns) any float: read; written where a branch is added
    branch_ptr    (n_rows, n_columns) like x, or None: then x = residual + branch
    residual_ptr  (n_rows, n_columns) like x, or None: given with branch_ptr
    weight_ptr    (n_columns,) any float: γ
    y_ptr         (n_rows, n_columns) like x: written
    rstd_ptr      (n_rows,) float32: r, written
    eps           ε
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_COLUMNS)
    in_rows = rows < n_rows
    in_columns = columns < n_columns
    offsets = rows[:, None] * n_columns + columns[None, :]
    mask = in_rows[:, None] & in_columns[None, :]
    x = load_sum(x_ptr, branch_ptr, residual_ptr, offsets, mask)

    mean_square = tl.sum(x * (x * (1.0 / n_columns)), 1)  # the sum of the squares could overflow
    rstd = 1.0 / tl.sqrt(mean_square + eps)
    rstd = tl.where(mean_square < float("inf"), rstd, float("nan"))  # 1 / inf would make y 0
    y = x * rstd[:, None] * load_row_vector(weight_ptr, columns, in_columns)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(rstd_ptr + rows, rstd, mask=in_rows)


@triton.jit(do_not_specialize=["n_rows", "n_programs"])
def rms_norm_backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    dresidual_ptr,
    dx_ptr,
    dweight_ptr,
    dbranch_bias_ptr,
    n_rows,
    n_columns,
    n_programs,
    stride,
    ACCUMULATE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Program p processes row tiles p, p + n_programs, … and adds its sums to row p at the end.

    dy_ptr         (n_rows, n_columns) any float: the gradient of y
    x_ptr          (n_rows, n_columns) like dy: what was normalized
    weight_ptr     (n_columns,) any float: γ
    rstd_ptr       (n_rows,) float32: r
    dresidual_ptr  (n_rows, n_columns) like dy: added to dx, or None
    dx_ptr         (n_rows, n_columns) like dy: written
    dweight_ptr, dbranch_bias_ptr
                   (n_programs, n_columns) float32, rows `stride` apart: added to; or None
    """
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK_COLUMNS)
    in_columns = columns < n_columns
    weight = load_row_vector(weight_ptr, columns, in_columns)
    dweight = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    dbranch_bias = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)

    for tile in range(program, (n_rows - 1) // BLOCK_ROWS + 1, n_programs):  # cdiv can wrap
        rows = tl.cast(tile, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        in_rows = rows < n_rows
        offsets = rows[:, None] * n_columns + columns[None, :]
        mask = in_rows[:, None] & in_columns[None, :]
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=in_rows, other=0.0)[:, None]

        x_hat = x * rstd
        g = dy * weight
        mean_gx = tl.sum(g * x_hat, 1) / n_columns
        dx = rstd * (g - x_hat * mean_gx[:, None])
        if dresidual_ptr is not None:
            dx += tl.load(dresidual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        rounded = dx.to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + offsets, rounded, mask=mask)

        dweight += dy * x_hat
        if dbranch_bias_ptr is not None:  # a sum of the rounded dx, the branch's gradient
            dbranch_bias += tl.where(mask, rounded.to(tl.float32), 0.0)

    store_sums(dweight_ptr, dweight, program, stride, columns, in_columns, ACCUMULATE)
    store_sums(dbranch_bias_ptr, dbranch_bias, program, stride, columns, in_columns, ACCUMULATE)


# ---------------------------------------------------------------------------------- launchers


def normalize(
    x: Tensor, branch: Tensor | None, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel; returns y, rstd."""
    C = x.shape[-1]
    check_tensor("weight", weight, shape=(C,), device=x.device)
    y = torch.empty_like(x)
    rstd = torch.empty(x.numel() // C, dtype=torch.float32, device=x.device)
    arguments = (x, branch, residual, weight, y, rstd)
    launch_forward(rms_norm_forward_kernel, y, *arguments, eps=eps)
    return y, rstd


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y = γ x̂.

    x (..., C), weight (C,): float32, float16 or bfloat16, C up to 8192.
    Returns y (..., C), rstd (N,) float32. Elements may be as large as 1e18; where the mean of their
    squares is not finite y is NaN.
    Raises ValueError for another dtype, shape, stride or device.
    """
    check_rows("x", x)
    return normalize(x, None, None, weight, eps)


def add_rms_norm_forward(
    branch: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x = residual + branch, then y = γ x̂, in one pass.

    branch, residual (..., C) of one dtype; the rest as in `rms_norm_forward`.
    Returns y (..., C), x (..., C), rstd (N,).
    """
    check_rows("residual", residual, branch=branch)
    x = torch.empty_like(residual)
    y, rstd = normalize(x, branch, residual, weight, eps)
    return y, x, rstd


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    dweight: Tensor,
    dresidual: Tensor | None = None,
    dbranch_bias: Tensor | None = None,
) -> Tensor:
    """The gradient of x, plus `dresidual`; adds that of γ to dweight, and the column sums of what
    it returns to dbranch_bias.

    dy, x, dresidual (..., C) of one dtype; weight (C,); rstd (N,) from the forward; dweight,
    dbranch_bias (C,) float32, or partial sums (P, C), both of one row stride.
    Returns dx (..., C). Raises ValueError for another dtype, shape, stride or device.
    """
    C = check_rows("x", x, dy=dy, dresidual=dresidual)
    check_tensor("weight", weight, shape=(C,), device=x.device)
    check_statistic("rstd", rstd, x, torch.float32)
    vectors = check_vectors(x, dweight, dbranch_bias=dbranch_bias)
    dx = torch.empty_like(x)
    arguments = (dy, x, weight, rstd, dresidual, dx)
    launch_backward(rms_norm_backward_kernel, dx, *arguments, vectors=vectors)
    return dx
