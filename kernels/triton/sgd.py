"""Plain gradient descent over the flat buffer, one launch.

    w ← w (1 - η λ)
    w ← w - η (c g)

η is the learning rate, λ the weight decay, c the clip factor. η, c and the finite flag are read
from device memory, as a captured step needs; if the flag is False nothing is written.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mantrans.kernels.triton.launch import check_tensor, launch
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


@triton.jit
def sgd_kernel(
    weights_ptr,
    master_ptr,
    gradients_ptr,
    learning_rate_ptr,
    clip_ptr,
    finite_ptr,
    seed_ptr,
    n,
    offset,
    WEIGHT_DECAY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program p updates elements p·BLOCK and on.

    weights_ptr        (n,) any float: written; read if there is no master
    master_ptr         (n,) float32: read and written, or None
    gradients_ptr      (n,) any float
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
        rate = tl.load(learning_rate_ptr).to(tl.float32)
        g = tl.load(gradients_ptr + index, mask=mask, other=0.0).to(tl.float32)
        w = load_master(weights_ptr, master_ptr, index, mask)
        w *= 1.0 - rate * WEIGHT_DECAY
        w -= rate * (tl.load(clip_ptr).to(tl.float32) * g)
        store_weights(w, weights_ptr, master_ptr, seed_ptr, index, offset, mask)


def sgd_update(
    weights: Tensor,
    master: Tensor | None,
    gradients: Tensor,
    learning_rate: Tensor,
    clip: Tensor,
    finite: Tensor,
    weight_decay: float,
    rounding_seed: Tensor | None = None,
    offset: int = 0,
) -> None:
    """One step, in place. See `reference.sgd_update`.

    weights, gradients (P,) float32, float16 or bfloat16; master (P,) float32 or None;
    learning_rate, clip 0-d float32 or float64; finite 0-d bool; rounding_seed 0-d int64 or None.
    Raises ValueError for another dtype, shape, stride or device.
    """
    check_buffers(weights, master)
    check_tensor("gradients", gradients, shape=weights.shape, device=weights.device)
    check_scalars(weights.device, learning_rate=learning_rate, clip=clip)
    check_switches(weights, finite, rounding_seed)
    launch(
        sgd_kernel,
        grid(weights),
        weights,
        master,
        gradients,
        learning_rate,
        clip,
        finite,
        rounding_seed,
        weights.numel(),
        offset,
        WEIGHT_DECAY=weight_decay,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
