"""The L2 norm of the flat gradient buffer, in two steps of fixed order.

    norm = √(Σ_i g_i²)

The first kernel runs a fixed number of programs on every GPU; program p sums the squares of blocks
p, p + PROGRAMS, …, lane by lane. The second adds the PROGRAMS sums. So the same gradient has the
same norm, bit for bit, on any GPU with the same arithmetic. The norm stays on the device, where the
clip factor and the finite check are computed from it.

Sums are float64, in which the square of a float32 is exact: none is too large, too small or lost.
That is one conversion and one multiplication for every 4 bytes read, which even a GPU with a 64th
of its speed in float64 does while it waits for memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mantrans.kernels.triton.launch import check_tensor, launch

PROGRAMS = 1024  # with 8 warps each: a single wave on 132 multiprocessors with 64 warps
BLOCK = 2048  # two 16-byte loads of float32 in flight per lane
WARPS = 8


@triton.jit
def partial_squares_kernel(gradients_ptr, partials_ptr, n, BLOCK: tl.constexpr):
    """Program p of P sums the squares of blocks p, p + P, …

    gradients_ptr  (n,) float32; n is best a multiple of 16, which splits no load
    partials_ptr   (P,) float64: written
    """
    program = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(program * BLOCK, n, tl.num_programs(0).to(tl.int64) * BLOCK):
        index = first + tl.arange(0, BLOCK)
        g = tl.load(gradients_ptr + index, mask=index < n, other=0.0).to(tl.float64)
        total += g * g
    tl.store(partials_ptr + program, tl.sum(total, 0))


@triton.jit
def root_of_sum_kernel(partials_ptr, norm_ptr, PROGRAMS: tl.constexpr):
    """One program: norm = √(Σ partials).

    partials_ptr  (PROGRAMS,) float64
    norm_ptr      0-d float64: written
    """
    partials = tl.load(partials_ptr + tl.arange(0, PROGRAMS))
    tl.store(norm_ptr, tl.sqrt(tl.sum(partials, 0)))


def gradient_norm(gradients: Tensor) -> Tensor:
    """√(Σ g²), 0-d float64 on the device. Not finite if any gradient is not.

    gradients (P,) float32. Raises ValueError for another dtype, shape, stride or device.
    """
    check_tensor("gradients", gradients, shape=(None,), dtype=torch.float32)
    partials = gradients.new_empty(PROGRAMS, dtype=torch.float64)
    norm = gradients.new_empty((), dtype=torch.float64)
    launch(
        partial_squares_kernel,
        (PROGRAMS,),
        gradients,
        partials,
        gradients.numel(),
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    launch(root_of_sum_kernel, (1,), partials, norm, PROGRAMS=PROGRAMS, num_warps=4)
    return norm
