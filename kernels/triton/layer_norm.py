"""Layer normalization over the last axis (Ba, Kiros & Hinton 2016), fused with the addition before.

    forward     x = residual + branch                 (add_layer_norm_forward; rounded, then used)
                μ = mean(x)      r = 1 / √(mean((x - μ)²) + ε)      x̂ = (x - μ) r
                y = γ x̂ + β

    backward    g = γ dy
                dx = r (g - mean(g) - x̂ mean(g x̂)) + dresidual
                dγ += Σ_rows dy x̂      dβ += Σ_rows dy      db += Σ_rows dx

db is the gradient of the branch's last bias: x = residual + branch, so dx is the branch's gradient.

Both directions read whole rows once (see `norm_tiles`). Sums are float32. The mean is kept in
float64: a large one, rounded to float32, would shift all deviations from it.
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
def layer_norm_forward_kernel(
    x_ptr,
    branch_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
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
    bias_ptr      (n_columns,) any float: β, or None
    y_ptr         (n_rows, n_columns) like x: written
    mean_ptr      (n_rows,) float64: μ, written
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

    share = 1.0 / n_columns
    mean = tl.sum(x * share, 1)
    centered = tl.where(mask, x - mean[:, None], 0.0)
    # What the rounding of the mean left. Of a constant row it is a few units of the last place, so
    # that sum and (exactly rounded) quotient are exact, and the difference is 0.
    rest = tl.div_rn(tl.sum(centered, 1), n_columns * 1.0)
    centered = tl.where(mask, centered - rest[:, None], 0.0)
    variance = tl.sum(centered * (centered * share), 1)
    rstd = 1.0 / tl.sqrt(variance + eps)
    rstd = tl.where(variance < float("inf"), rstd, float("nan"))  # 1 / inf would make y 0
    y = centered * rstd[:, None] * load_row_vector(weight_ptr, columns, in_columns)
    if bias_ptr is not None:
        y += load_row_vector(bias_ptr, columns, in_columns)

    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + rows, mean.to(tl.float64) + rest, mask=in_rows)
    tl.store(rstd_ptr + rows, rstd, mask=in_rows)


@triton.jit(do_not_specialize=["n_rows", "n_programs"])
def layer_norm_backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dresidual_ptr,
    dx_ptr,
    dweight_ptr,
    dbias_ptr,
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
    mean_ptr       (n_rows,) float64: μ
    rstd_ptr       (n_rows,) float32: r
    dresidual_ptr  (n_rows, n_columns) like dy: added to dx, or None
    dx_ptr         (n_rows, n_columns) like dy: written
    dweight_ptr, dbias_ptr, dbranch_bias_ptr
                   (n_programs, n_columns) float32, rows `stride` apart: added to; or None
    """
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK_COLUMNS)
    in_columns = columns < n_columns
    weight = load_row_vector(weight_ptr, columns, in_columns)
    dweight = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    dbias = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    dbranch_bias = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)

    for tile in range(program, (n_rows - 1) // BLOCK_ROWS + 1, n_programs):  # cdiv can wrap
        rows = tl.cast(tile, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        in_rows = rows < n_rows
        offsets = rows[:, None] * n_columns + columns[None, :]
        mask = in_rows[:, None] & in_columns[None, :]
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=in_rows, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=in_rows, other=0.0)[:, None]

        rounded_mean = mean.to(tl.float32)
        centered = x - rounded_mean - (mean - rounded_mean).to(tl.float32)
        x_hat = centered * rstd
        g = dy * weight
        mean_g = tl.sum(g, 1) / n_columns
        # of g x_hat; beyond the columns g = 0, where x_hat may be infinite
        mean_gx = (tl.sum(g * centered, 1) / n_columns)[:, None] * rstd
        dx = rstd * (g - mean_g[:, None] - x_hat * mean_gx)
        if dresidual_ptr is not None:
            dx += tl.load(dresidual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        rounded = dx.to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + offsets, rounded, mask=mask)

        dweight += dy * x_hat
        if dbias_ptr is not None:
            dbias += dy
        if dbranch_bias_ptr is not None:  # a sum of the rounded dx, the branch's gradient
            dbranch_bias += tl.where(mask, rounded.to(tl.float32), 0.0)

    store_sums(dweight_ptr, dweight, program, stride, columns, in_columns, ACCUMULATE)
    store_sums(dbias_ptr, dbias, program, stride, columns, in_columns, ACCUMULATE)
    store_sums(dbranch_bias_ptr, dbranch_bias, program, stride, columns, in_columns, ACCUMULATE)


# ---------------------------------------------------------------------------------- launchers


def normalize(
    x: Tensor,
    branch: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward kernel; returns y, mean, rstd."""
    C = x.shape[-1]
    check_tensor("weight", weight, shape=(C,), device=x.device)
    if bias is not None:
        check_tensor("bias", bias, shape=(C,), device=x.device)
    N = x.numel() // C
    y = torch.empty_like(x)
    mean = torch.empty(N, dtype=torch.float64, device=x.device)
    rstd = torch.empty(N, dtype=torch.float32, device=x.device)
    arguments = (x, branch, residual, weight, bias, y, mean, rstd)
    launch_forward(layer_norm_forward_kernel, y, *arguments, eps=eps)
    return y, mean, rstd


def layer_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y = γ x̂ + β.

    x (..., C), weight (C,), bias (C,) or None: float32, float16 or bfloat16, C up to 8192.
    Returns y (..., C), mean (N,) float64, rstd (N,) float32. A row that is far from zero, or of
    equal elements, is as exact as any other. Deviations may be as large as 1e18; where their
    squares are not finite y is NaN.
    Raises ValueError for another dtype, shape, stride or device.
    """
    check_rows("x", x)
    return normalize(x, None, None, weight, bias, eps)


def add_layer_norm_forward(
    branch: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x = residual + branch, then y = γ x̂ + β, in one pass.

    branch, residual (..., C) of one dtype; the rest as in `layer_norm_forward`.
    Returns y (..., C), x (..., C), mean (N,), rstd (N,).
    """
    check_rows("residual", residual, branch=branch)
    x = torch.empty_like(residual)
    y, mean, rstd = normalize(x, branch, residual, weight, bias, eps)
    return y, x, mean, rstd


def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dweight: Tensor,
    dbias: Tensor | None = None,
    dresidual: Tensor | None = None,
    dbranch_bias: Tensor | None = None,
) -> Tensor:
    """The gradient of x, plus `dresidual`; adds those of γ and β to dweight and dbias, and the
    column sums of what it returns to dbranch_bias.

    dy, x, dresidual (..., C) of one dtype; weight (C,); mean, rstd (N,) from the forward;
    dweight, dbias, dbranch_bias (C,) float32, or partial sums (P, C), all of one row stride.
    Returns dx (..., C). Raises ValueError for another dtype, shape, stride or device.
    """
    C = check_rows("x", x, dy=dy, dresidual=dresidual)
    check_tensor("weight", weight, shape=(C,), device=x.device)
    check_statistic("mean", mean, x, torch.float64)
    check_statistic("rstd", rstd, x, torch.float32)
    vectors = check_vectors(x, dweight, dbias=dbias, dbranch_bias=dbranch_bias)
    dx = torch.empty_like(x)
    arguments = (dy, x, weight, mean, rstd, dresidual, dx)
    launch_backward(layer_norm_backward_kernel, dx, *arguments, vectors=vectors)
    return dx
