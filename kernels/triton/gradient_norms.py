"""The L2 norms of equal pieces of the flat gradient buffer, in two steps of fixed order.

    norm_j = √(Σ_i g_ji²)

In the first kernel a number of programs that depends only on a piece's size share each piece;
program p sums the squares of blocks p, p + programs, …, lane by lane. The second adds a piece's
sums. So a piece has the same norm, bit for bit, on any GPU with the same arithmetic, and however
many of the pieces a rank owns. The norms stay on the device, where the clip factor and the finite
check are computed from them.

Sums are float64, in which the square of a float32 is exact: none is too large, too small or lost.
That is one conversion and one multiplication for every 4 bytes read, which even a GPU with a 64th
of its speed in float64 does while it waits for memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mantrans.kernels.triton.launch import cdiv, check_tensor, launch, next_power_of_two, refuse

PROGRAMS = 32  # at most, for a piece: 64 pieces fill a GPU, and so do the few of one rank
BLOCKS = 4  # at least, of a program
BLOCK = 2048  # two 16-byte loads of float32 in flight per lane
WARPS = 8


@triton.jit
def partial_squares_kernel(gradients_ptr, partials_ptr, size, BLOCK: tl.constexpr):
    """Program (p, j) of (P, pieces) sums the squares of blocks p, p + P, … of piece j.

    gradients_ptr  (pieces, size) float32; size is best a multiple of 16, which splits no load
    partials_ptr   (pieces, P) float64: written
    """
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    piece = tl.program_id(1).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(program * BLOCK, size, programs * BLOCK):
        index = first + tl.arange(0, BLOCK)
        g = tl.load(gradients_ptr + piece * size + index, mask=index < size, other=0.0)
        g = g.to(tl.float64)
        total += g * g
    tl.store(partials_ptr + piece * programs + program, tl.sum(total, 0))


@triton.jit
def roots_of_sums_kernel(partials_ptr, norms_ptr, programs, BLOCK: tl.constexpr):
    """Program j: norm_j = √(Σ partials of piece j).

    partials_ptr  (pieces, programs) float64, programs <= BLOCK
    norms_ptr     (pieces,) float64: written
    """
    piece = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    partials = tl.load(partials_ptr + piece * programs + lane, mask=lane < programs, other=0.0)
    tl.store(norms_ptr + piece, tl.sqrt(tl.sum(partials, 0)))


def gradient_norms(gradients: Tensor, pieces: int) -> Tensor:
    """√(Σ g²) of each of `pieces` equal parts, (pieces,) float64 on the device.

    Not finite where any gradient is not. gradients (P,) float32, P a multiple of pieces.
    Raises ValueError for another dtype, shape, stride or device.
    """
    check_tensor("gradients", gradients, shape=(None,), dtype=torch.float32)
    if pieces < 1 or gradients.numel() % pieces:
        refuse("gradients", gradients.numel(), f"a multiple of {pieces} pieces")
    size = gradients.numel() // pieces
    programs = max(1, min(PROGRAMS, cdiv(cdiv(size, BLOCK), BLOCKS)))
    partials = gradients.new_empty(pieces, programs, dtype=torch.float64)
    norms = gradients.new_empty(pieces, dtype=torch.float64)
    launch(
        partial_squares_kernel,
        (programs, pieces),
        gradients,
        partials,
        size,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    launch(
        roots_of_sums_kernel,
        (pieces,),
        partials,
        norms,
        programs,
        BLOCK=next_power_of_two(programs),
        num_warps=1,
    )
    return norms
