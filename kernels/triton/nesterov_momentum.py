"""Muon's momentum over the flat buffer, one launch (Jordan et al. 2024).

    m ← β m + (1 - β) c g
    u = β m + (1 - β) c g

Each element is read once and written once: 8 bytes in (g, m), 6 out (m, and u in bfloat16, from
which `orthogonalize` makes the step). c and the finite flag are read from device memory, as a
captured step needs; if the flag is False nothing is written.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mantrans.kernels.triton.launch import launch
from mantrans.kernels.triton.weights import (
    BLOCK,
    WARPS,
    check_buffers,
    check_scalars,
    check_switches,
    grid,
)


@triton.jit
def nesterov_momentum_kernel(
    exp_avg_ptr,
    gradients_ptr,
    clip_ptr,
    finite_ptr,
    update_ptr,
    n,
    BETA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program p computes elements p·BLOCK and on.

    exp_avg_ptr    (n,) float32: m, read and written
    gradients_ptr  (n,) float32
    clip_ptr       0-d float32 or float64: c
    finite_ptr     0-d bool
    update_ptr     (n,) any float: u, written
    n              best a multiple of 16, which splits no load
    """
    if tl.load(finite_ptr):
        index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = index < n
        g = tl.load(gradients_ptr + index, mask=mask, other=0.0)
        m = tl.load(exp_avg_ptr + index, mask=mask, other=0.0)
        g *= (1.0 - BETA) * tl.load(clip_ptr).to(tl.float32)
        m = m * BETA + g
        tl.store(exp_avg_ptr + index, m, mask=mask)
        tl.store(update_ptr + index, (m * BETA + g).to(update_ptr.dtype.element_ty), mask=mask)


def nesterov_momentum(
    exp_avg: Tensor,
    gradients: Tensor,
    clip: Tensor,
    finite: Tensor,
    beta: float,
    update: Tensor,
) -> None:
    """See `reference.nesterov_momentum`.

    exp_avg, gradients (P,) float32; update (P,) float32, float16 or bfloat16; clip 0-d float32 or
    float64; finite 0-d bool. Raises ValueError for another dtype, shape, stride or device.
    """
    check_buffers(update, None, exp_avg=exp_avg, gradients=gradients)
    check_scalars(update.device, clip=clip)
    check_switches(update, finite, None)
    launch(
        nesterov_momentum_kernel,
        grid(update),
        exp_avg,
        gradients,
        clip,
        finite,
        update,
        update.numel(),
        BETA=beta,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
