"""AdamW (Loshchilov & Hutter 2019, algorithm 2) over the flat buffer.

    m ← β₁ m + (1 - β₁) c g
    v ← β₂ v + (1 - β₂) (c g)²
    w ← w (1 - η λ)
    w ← w - η (m / (1 - β₁ᵗ)) / (√(v / (1 - β₂ᵗ)) + ε)

Each element is read once and written once: 16 bytes in (g, m, v, master), 14 out (m, v, master and
the bfloat16 weight). η, c, t and the finite flag are read from device memory, as a captured step
needs; if the flag is False nothing is written. The two bias corrections are computed in float64,
because 1 - 0.999 in float32 would keep only four digits; and once, by a launch of their own,
because many GPUs do float64 at a 64th of float32's speed.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from mantrans.kernels.triton.launch import launch, refuse
from mantrans.kernels.triton.weights import (
    BLOCK,
    WARPS,
    check_buffers,
    check_scalars,
    check_switches,
    grid,
    load_master,
    store_weights,
)

SMALLEST_BETA = 1e-300  # in place of 0, which has no logarithm; its powers underflow to 0


@triton.jit
def bias_corrections_kernel(
    step_ptr, corrections_ptr, LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr
):
    """One program: 1 / (1 - β₁ᵗ) and 1 / (1 - β₂ᵗ).

    step_ptr         0-d float32 or float64: t, 1 at the first update
    corrections_ptr  (2,) float32: written
    """
    step = tl.load(step_ptr).to(tl.float64)
    first = 1.0 - tl.exp(step * tl.full((), LOG_BETA1, tl.float64))
    second = 1.0 - tl.exp(step * tl.full((), LOG_BETA2, tl.float64))
    tl.store(corrections_ptr, (1.0 / first).to(tl.float32))
    tl.store(corrections_ptr + 1, (1.0 / second).to(tl.float32))


@triton.jit
def adamw_kernel(
    weights_ptr,
    master_ptr,
    gradients_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    corrections_ptr,
    learning_rate_ptr,
    clip_ptr,
    finite_ptr,
    seed_ptr,
    n,
    offset,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    WEIGHT_DECAY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program p updates elements p·BLOCK and on.

    weights_ptr        (n,) any float: written; read if there is no master
    master_ptr         (n,) float32: read and written, or None
    gradients_ptr      (n,) float32
    exp_avg_ptr        (n,) float32: m, read and written
    exp_avg_sq_ptr     (n,) float32: v, read and written
    corrections_ptr    (2,) float32: 1 / (1 - β₁ᵗ), 1 / (1 - β₂ᵗ)
    learning_rate_ptr  0-d float32 or float64: η
    clip_ptr           0-d float32 or float64: c
    finite_ptr         0-d bool
    seed_ptr           0-d int64: round the weights stochastically with it, or None
    n                  best a multiple of 16, which splits no load
    offset             of the first element in the whole buffer
    """
    if tl.load(finite_ptr):
        index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = index < n
        g = tl.load(gradients_ptr + index, mask=mask, other=0.0)
        m = tl.load(exp_avg_ptr + index, mask=mask, other=0.0)
        v = tl.load(exp_avg_sq_ptr + index, mask=mask, other=0.0)
        w = load_master(weights_ptr, master_ptr, index, mask)

        rate = tl.load(learning_rate_ptr).to(tl.float32)
        g *= tl.load(clip_ptr).to(tl.float32)
        m = m * BETA1 + g * (1.0 - BETA1)
        v = v * BETA2 + g * g * (1.0 - BETA2)
        m_hat = m * tl.load(corrections_ptr)
        v_hat = v * tl.load(corrections_ptr + 1)
        w *= 1.0 - rate * WEIGHT_DECAY
        w -= rate * m_hat / (tl.sqrt(v_hat) + EPS)

        tl.store(exp_avg_ptr + index, m, mask=mask)
        tl.store(exp_avg_sq_ptr + index, v, mask=mask)
        store_weights(w, weights_ptr, master_ptr, seed_ptr, index, offset, mask)


def log_of_beta(name: str, beta: float) -> float:
    """ln β. Raises ValueError for a β that is none."""
    if not 0 <= beta < 1:
        refuse(name, beta, "at least 0 and below 1")
    return math.log(max(beta, SMALLEST_BETA))


def adamw_update(
    weights: Tensor,
    master: Tensor | None,
    gradients: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    learning_rate: Tensor,
    clip: Tensor,
    finite: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    rounding_seed: Tensor | None = None,
    offset: int = 0,
) -> None:
    """One step, in place. See `reference.adamw_update`.

    weights (P,) float32, float16 or bfloat16; master (P,) float32 or None; gradients, exp_avg,
    exp_avg_sq (P,) float32; step, learning_rate, clip 0-d float32 or float64; finite 0-d bool;
    rounding_seed 0-d int64 or None. Raises ValueError for another dtype, shape, stride or device.
    """
    check_buffers(weights, master, gradients=gradients, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    check_scalars(weights.device, step=step, learning_rate=learning_rate, clip=clip)
    check_switches(weights, finite, rounding_seed)
    corrections = exp_avg.new_empty(2)
    logs = {"LOG_BETA1": log_of_beta("beta1", beta1), "LOG_BETA2": log_of_beta("beta2", beta2)}
    launch(bias_corrections_kernel, (1,), step, corrections, **logs, num_warps=1)
    launch(
        adamw_kernel,
        grid(weights),
        weights,
        master,
        gradients,
        exp_avg,
        exp_avg_sq,
        corrections,
        learning_rate,
        clip,
        finite,
        rounding_seed,
        weights.numel(),
        offset,
        BETA1=beta1,
        BETA2=beta2,
        EPS=eps,
        WEIGHT_DECAY=weight_decay,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
