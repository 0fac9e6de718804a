"""RMS norm of each head of q and of k, then RoPE, in one pass over the packed projection.

For a head x (D,) with the gain γ of its kind (q or k) and the angles of its position:

    forward     r = 1 / √(mean(x²) + ε)      x̂ = x r      y = R (γ x̂)
    backward    dn = Rᵀ dy                    dγ += Σ_heads dn x̂
                g = γ dn                      dx = r (g - x̂ mean(g x̂))

R is the rotation of `rotary`, in the layout of halves. The forward writes a new projection, because
the backward needs x; heads of v are copied in the same pass. The backward writes over dqkv, where
the gradient of v lies already: heads of v are neither read nor written.

Sums are float32. A head is a row of a tile, as in `rotary`. The backward runs a fixed number of
programs; each goes through its share of the heads of q, then of k, with the sums of dγ in registers
until the last, and adds them to one row of partial sums (see `partials`). So the gradient has the
same bits in every run.

Alphabet: that of `rotary`.
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
    refuse,
)
from mantrans.kernels.triton.partials import (
    ROWS_A_MULTIPROCESSOR,
    check_vector_gradient,
    most_programs,
    rows_for,
)
from mantrans.kernels.triton.rotary import (
    NUM_WARPS,
    check_rotary,
    heads_of_program,
    heads_of_tile,
    load_angles,
)


@triton.jit
def load_halves(ptrs, mask, HALF: tl.constexpr):
    """The halves of heads, or of a gain, as float32."""
    first = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    return first, tl.load(ptrs + HALF, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["n_rows", "n_heads", "n_turned", "n_all", "T"])
def norm_rotary_forward_kernel(
    y_ptr,
    x_ptr,
    q_weight_ptr,
    k_weight_ptr,
    rstd_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    n_rows,
    n_heads,
    n_turned,
    n_all,
    T,
    stride,
    eps,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Program p writes heads p·BLOCK_HEADS and on of all n_all = H + 2 H_kv heads of each row.

    y_ptr, x_ptr                (n_rows, stride) any float: written, read
    q_weight_ptr, k_weight_ptr  (2 HALF,) any float: γ of the first n_heads = H heads, and of those
                                after them before n_turned = H + H_kv
    rstd_ptr                    (n_rows, n_turned) float32: r, written
    cos_ptr, sin_ptr, positions_ptr, HALF as in `rotary_kernel`; eps ε
    """
    rows, heads, positions, there = heads_of_tile(
        tl.program_id(0), n_rows, n_all, T, positions_ptr, BLOCK_HEADS
    )
    columns = tl.arange(0, BLOCK_HALF)
    in_half = columns < HALF
    mask = there[:, None] & in_half[None, :]
    offsets = (rows * stride + heads * (2 * HALF))[:, None] + columns[None, :]
    x1, x2 = load_halves(x_ptr + offsets, mask, HALF)
    cos, sin = load_angles(cos_ptr, sin_ptr, positions, there, HALF, BLOCK_HALF)
    q1, q2 = load_halves(q_weight_ptr + columns, in_half, HALF)
    k1, k2 = load_halves(k_weight_ptr + columns, in_half, HALF)

    share = 1.0 / (2 * HALF)
    mean_square = tl.sum(x1 * (x1 * share) + x2 * (x2 * share), 1)
    rstd = 1.0 / tl.sqrt(mean_square + eps)
    rstd = tl.where(mean_square < float("inf"), rstd, float("nan"))  # 1 / inf would make y 0
    is_q = (heads < n_heads)[:, None]
    n1 = x1 * rstd[:, None] * tl.where(is_q, q1[None, :], k1[None, :])
    n2 = x2 * rstd[:, None] * tl.where(is_q, q2[None, :], k2[None, :])

    is_v = (heads >= n_turned)[:, None]
    y1 = tl.where(is_v, x1, n1 * cos - n2 * sin)
    y2 = tl.where(is_v, x2, n2 * cos + n1 * sin)
    tl.store(y_ptr + offsets, y1.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + offsets + HALF, y2.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(rstd_ptr + rows * n_turned + heads, rstd, mask=there & (heads < n_turned))


@triton.jit(do_not_specialize=["n_rows", "n_heads", "n_kv_heads", "T", "q_tiles", "k_tiles"])
def norm_rotary_backward_kernel(
    dy_ptr,
    x_ptr,
    q_weight_ptr,
    k_weight_ptr,
    rstd_ptr,
    cos_ptr,
    sin_ptr,
    dq_weight_ptr,
    dk_weight_ptr,
    n_rows,
    n_heads,
    n_kv_heads,
    T,
    q_tiles,
    k_tiles,
    stride,
    stride_partials,
    HALF: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Program p of n takes tiles p, p + n, … of the heads of q, then of k, and adds its sums to row
    p of both gradients' partial sums at the end.

    dy_ptr                        (n_rows, stride) any float: the gradient of y becomes that of x
    x_ptr, q_weight_ptr, k_weight_ptr, rstd_ptr, cos_ptr, sin_ptr, HALF as in the forward
    dq_weight_ptr, dk_weight_ptr  (n, 2 HALF) float32, rows stride_partials apart: added to
    n_heads, n_kv_heads           H, H_kv; q_tiles, k_tiles: of as many heads in all rows
    """
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK_HALF)
    in_half = columns < HALF
    for kind in tl.static_range(2):
        if kind == 0:
            n_here, begin, n_tiles = n_heads, 0, q_tiles
            weight_ptr, dweight_ptr = q_weight_ptr, dq_weight_ptr
        else:
            n_here, begin, n_tiles = n_kv_heads, n_heads, k_tiles
            weight_ptr, dweight_ptr = k_weight_ptr, dk_weight_ptr
        w1, w2 = load_halves(weight_ptr + columns, in_half, HALF)
        dw1 = tl.zeros((BLOCK_HEADS, BLOCK_HALF), tl.float32)
        dw2 = tl.zeros((BLOCK_HEADS, BLOCK_HALF), tl.float32)
        for tile in range(program, n_tiles, tl.num_programs(0)):
            rows, heads, positions, there = heads_of_tile(
                tile, n_rows, n_here, T, None, BLOCK_HEADS
            )
            heads += begin
            mask = there[:, None] & in_half[None, :]
            offsets = (rows * stride + heads * (2 * HALF))[:, None] + columns[None, :]
            dy1, dy2 = load_halves(dy_ptr + offsets, mask, HALF)
            x1, x2 = load_halves(x_ptr + offsets, mask, HALF)
            cos, sin = load_angles(cos_ptr, sin_ptr, positions, there, HALF, BLOCK_HALF)
            rstd_ptrs = rstd_ptr + rows * (n_heads + n_kv_heads) + heads
            rstd = tl.load(rstd_ptrs, mask=there, other=0.0)[:, None]

            dn1 = dy1 * cos + dy2 * sin
            dn2 = dy2 * cos - dy1 * sin
            dw1 += dn1 * (x1 * rstd)
            dw2 += dn2 * (x2 * rstd)
            g1 = dn1 * w1[None, :]
            g2 = dn2 * w2[None, :]
            mean_gx = tl.sum(g1 * x1 + g2 * x2, 1)[:, None] * (1.0 / (2 * HALF)) * rstd
            dx1 = rstd * (g1 - x1 * rstd * mean_gx)
            dx2 = rstd * (g2 - x2 * rstd * mean_gx)
            tl.store(dy_ptr + offsets, dx1.to(dy_ptr.dtype.element_ty), mask=mask)
            tl.store(dy_ptr + offsets + HALF, dx2.to(dy_ptr.dtype.element_ty), mask=mask)

        sums = dweight_ptr + tl.cast(program, tl.int64) * stride_partials + columns
        s1 = tl.sum(dw1, 0)
        s2 = tl.sum(dw2, 0)
        if ACCUMULATE:
            s1 += tl.load(sums, mask=in_half, other=0.0)
            s2 += tl.load(sums + HALF, mask=in_half, other=0.0)
        tl.store(sums, s1, mask=in_half)
        tl.store(sums + HALF, s2, mask=in_half)


# ------------------------------------------------------------------------------------- launchers


def norm_rotary_forward(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    n_heads: int,
    n_kv_heads: int | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """γ x̂ of each head of q and k, turned by the angles of its position; v is copied.

    qkv, cos, sin, n_heads, n_kv_heads, positions as in `rotary_forward`; qkv is not written to.
    q_weight, k_weight (D,) of any of the three dtypes. Elements may be as large as 1e18; where
    their squares are not finite y is NaN.
    Returns y (B, T, (H + 2 H_kv)·D) and rstd (N, H + H_kv) float32. ValueError as there.
    """
    H_kv, D = check_rotary("qkv", qkv, cos, sin, n_heads, n_kv_heads, positions)
    check_gains(q_weight, k_weight, D, qkv.device)
    B, T, stride = qkv.shape
    n_turned, n_all = n_heads + H_kv, n_heads + 2 * H_kv
    y = torch.empty_like(qkv)
    rstd = torch.empty(B * T, n_turned, dtype=torch.float32, device=qkv.device)
    block_heads, block_half = heads_of_program(D)
    launch(
        norm_rotary_forward_kernel,
        (cdiv(B * T * n_all, block_heads),),
        y,
        qkv,
        q_weight,
        k_weight,
        rstd,
        cos,
        sin,
        positions,
        B * T,
        n_heads,
        n_turned,
        n_all,
        T,
        stride,
        eps,
        HALF=D // 2,
        BLOCK_HEADS=block_heads,
        BLOCK_HALF=block_half,
        num_warps=NUM_WARPS,
    )
    return y, rstd


def norm_rotary_backward(
    dqkv: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rstd: Tensor,
    cos: Tensor,
    sin: Tensor,
    dq_weight: Tensor,
    dk_weight: Tensor,
    n_heads: int,
    n_kv_heads: int | None = None,
) -> Tensor:
    """The gradient of qkv, written over dqkv, that of the forward's y; positions are 0 .. T-1.

    dqkv as qkv; rstd (N, H + H_kv) from the forward; the rest as there. Adds to dq_weight and
    dk_weight: (D,) float32 both, or both rows of partial sums (P, D) of one stride.
    Returns dqkv. ValueError as there.
    """
    H_kv, D = check_rotary("qkv", qkv, cos, sin, n_heads, n_kv_heads, None)
    check_tensor("dqkv", dqkv, shape=qkv.shape, dtype=qkv.dtype, device=qkv.device)
    check_gains(q_weight, k_weight, D, qkv.device)
    B, T, stride = qkv.shape
    rows = (B * T, n_heads + H_kv)
    check_tensor("rstd", rstd, shape=rows, dtype=torch.float32, device=qkv.device)
    check_gain_gradients(dq_weight, dk_weight, D, qkv.device)
    block_heads, block_half = heads_of_program(D)
    q_tiles, k_tiles = (cdiv(B * T * n, block_heads) for n in (n_heads, H_kv))
    resident = ROWS_A_MULTIPROCESSOR * multiprocessors(qkv.device)
    n_programs = min(q_tiles, resident, most_programs(dq_weight, dk_weight) or resident)
    if not n_programs:
        return dqkv
    with rows_for(n_programs, dq_weight, dk_weight) as sums:
        launch(
            norm_rotary_backward_kernel,
            (n_programs,),
            dqkv,
            qkv,
            q_weight,
            k_weight,
            rstd,
            cos,
            sin,
            *sums.tensors,
            B * T,
            n_heads,
            H_kv,
            T,
            q_tiles,
            k_tiles,
            stride,
            sums.stride,
            HALF=D // 2,
            ACCUMULATE=sums.accumulate,
            BLOCK_HEADS=block_heads,
            BLOCK_HALF=block_half,
            num_warps=NUM_WARPS,
        )
    return dqkv


def check_gains(q_weight: Tensor, k_weight: Tensor, D: int, device: torch.device) -> None:
    """Refuse gains that are not (D,)."""
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        check_tensor(name, weight, shape=(D,), device=device)


def check_gain_gradients(
    dq_weight: Tensor, dk_weight: Tensor, D: int, device: torch.device
) -> None:
    """Refuse any but two vectors (D,), or rows of partial sums of one stride."""
    for name, gradient in (("dq_weight", dq_weight), ("dk_weight", dk_weight)):
        check_vector_gradient(name, gradient, D, device)
    if dk_weight.dim() != dq_weight.dim() or dk_weight.stride(0) != dq_weight.stride(0):
        refuse("dk_weight", f"strides {dk_weight.stride()}", f"{dq_weight.stride()}, of dq_weight")
