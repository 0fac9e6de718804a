"""Rotary position embedding (RoPE: Su et al. 2021) of q and k, in place, in the layout of halves.

For a head x (D,) at position t, with the angle's cos and sin (D/2,):

    forward     y_i       = x_i       cos_ti - x_{i+D/2} sin_ti
                y_{i+D/2} = x_{i+D/2} cos_ti + x_i       sin_ti
    backward    the same with -sin: a rotation's transpose turns back

The packed projection (B, T, (H + 2 H_kv)·D) has the heads of q, then k, then v. Only those of q and
k are read and written, once; what a row holds of v is not touched. Products are float32.

A tile is a number of heads: rows of halves (BLOCK_HALF), as many as give each lane one 16-byte load
of each half. Heads are counted through all positions, so that no tile is wasted on a number of
heads that is not a power of two.

Alphabet: B batch, T sequence, N = B·T positions, H heads of q, H_kv of k and of v, D head width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mantrans.kernels.reference import rotary_sizes
from mantrans.kernels.triton.attention_tiles import accepted_width
from mantrans.kernels.triton.launch import cdiv, check_tensor, launch, next_power_of_two, refuse

PAIRS = 1024  # (x_i, x_{i+D/2}) a program: of 16-bit numbers a lane loads 16 bytes of each half
NUM_WARPS = 4


@triton.jit
def heads_of_tile(tile, n_rows, n_heads, T, positions_ptr, BLOCK_HEADS: tl.constexpr):
    """Heads tile·BLOCK_HEADS and on, counted through all rows: their rows (int64), their numbers in
    the row, their positions, and which of them exist. All (BLOCK_HEADS,).

    Long divisions are those of one number, for the first head."""
    first = tl.cast(tile, tl.int64) * BLOCK_HEADS
    first_row = first // n_heads
    counted = (first - first_row * n_heads).to(tl.int32) + tl.arange(0, BLOCK_HEADS)
    below = counted // n_heads
    rows = first_row + below
    there = rows < n_rows
    if positions_ptr is None:
        positions = (((first_row % T).to(tl.int32) + below) % T).to(tl.int64)
    else:
        positions = tl.load(positions_ptr + rows, mask=there, other=0)
    return rows, counted % n_heads, positions, there


@triton.jit
def load_angles(cos_ptr, sin_ptr, positions, there, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """cos and sin of each head's position, (BLOCK_HEADS, BLOCK_HALF)."""
    columns = tl.arange(0, BLOCK_HALF)
    offsets = positions[:, None] * HALF + columns[None, :]
    mask = there[:, None] & (columns < HALF)[None, :]
    cos = tl.load(cos_ptr + offsets, mask=mask, other=0.0)
    return cos, tl.load(sin_ptr + offsets, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["n_rows", "n_heads", "T"])
def rotary_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    n_rows,
    n_heads,
    T,
    stride,
    HALF: tl.constexpr,
    BACK: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Program p turns heads p·BLOCK_HEADS and on of the first n_heads of each row.

    x_ptr             (n_rows, stride) any float: read and written
    cos_ptr, sin_ptr  (T_max, HALF) float32
    positions_ptr     (n_rows,) int64: rows of cos and sin; None: row % T
    HALF              D/2; BACK: turn by minus the angle
    """
    rows, heads, positions, there = heads_of_tile(
        tl.program_id(0), n_rows, n_heads, T, positions_ptr, BLOCK_HEADS
    )
    cos, sin = load_angles(cos_ptr, sin_ptr, positions, there, HALF, BLOCK_HALF)
    if BACK:
        sin = -sin
    columns = tl.arange(0, BLOCK_HALF)
    mask = there[:, None] & (columns < HALF)[None, :]
    first = x_ptr + (rows * stride + heads * (2 * HALF))[:, None] + columns[None, :]
    x1 = tl.load(first, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(first + HALF, mask=mask, other=0.0).to(tl.float32)
    tl.store(first, (x1 * cos - x2 * sin).to(x_ptr.dtype.element_ty), mask=mask)
    tl.store(first + HALF, (x2 * cos + x1 * sin).to(x_ptr.dtype.element_ty), mask=mask)


# ------------------------------------------------------------------------------------- launchers


def heads_of_program(D: int, pairs: int = PAIRS) -> tuple[int, int]:
    """(BLOCK_HEADS, BLOCK_HALF) of a tile of `pairs`."""
    block_half = next_power_of_two(D // 2)
    return max(1, pairs // block_half), block_half


def rotary_forward(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    n_heads: int,
    n_kv_heads: int | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Turn the heads of q and k, each pair (x_i, x_{i+D/2}) by the angle of its position.

    qkv (B, T, (H + 2 H_kv)·D) float32, float16 or bfloat16, contiguous; D even, at most 256.
    n_kv_heads: H_kv, which divides H; None for H; 0: queries alone, (B, T, H·D). cos, sin (T_max,
    D/2) float32. positions (B, T) int64, below T_max (not checked: that would wait for the GPU);
    None: 0 .. T-1, T <= T_max.
    Returns qkv, which is written over. ValueError, before any launch, names an argument whose
    device, dtype, shape or stride is wrong.
    """
    H_kv, _ = check_rotary("qkv", qkv, cos, sin, n_heads, n_kv_heads, positions)
    return turn(qkv, cos, sin, n_heads + H_kv, positions, back=False)


def rotary_backward(
    dqkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv_heads: int | None = None
) -> Tensor:
    """Turn back, at positions 0 .. T-1. The arguments are those of `rotary_forward`; dqkv
    (B, T, (H + 2 H_kv)·D), the gradient of its result, is written over and returned."""
    H_kv, _ = check_rotary("dqkv", dqkv, cos, sin, n_heads, n_kv_heads, None)
    return turn(dqkv, cos, sin, n_heads + H_kv, None, back=True)


def turn(
    x: Tensor, cos: Tensor, sin: Tensor, n_turned: int, positions: Tensor | None, back: bool
) -> Tensor:
    """Launch the kernel on the first n_turned heads of each row of x (B, T, P)."""
    if not x.numel():
        return x
    B, T, stride = x.shape
    HALF = cos.shape[1]
    block_heads, block_half = heads_of_program(2 * HALF)
    launch(
        rotary_kernel,
        (cdiv(B * T * n_turned, block_heads),),
        x,
        cos,
        sin,
        positions,
        B * T,
        n_turned,
        T,
        stride,
        HALF=HALF,
        BACK=back,
        BLOCK_HEADS=block_heads,
        BLOCK_HALF=block_half,
        num_warps=NUM_WARPS,
    )
    return x


def check_rotary(
    argument: str,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    n_heads: int,
    n_kv_heads: int | None,
    positions: Tensor | None,
) -> tuple[int, int]:
    """(H_kv, D). ValueError as `rotary_forward`."""
    check_tensor(argument, x, shape=(None, None, None))
    H_kv, D = rotary_sizes(x.shape[2], n_heads, n_kv_heads)
    if accepted_width(D) % 2:
        refuse("head width", D, "an even number, to turn pairs")
    for name, table in (("cos", cos), ("sin", sin)):
        check_tensor(name, table, shape=(None, D // 2), dtype=torch.float32, device=x.device)
    if len(sin) != len(cos):
        refuse("sin", tuple(sin.shape), f"shape {tuple(cos.shape)}, that of cos")
    if positions is not None:
        check_tensor("positions", positions, shape=x.shape[:2], dtype=torch.int64, device=x.device)
    elif x.shape[1] > len(cos):
        refuse(argument, f"{x.shape[1]} positions", f"at most {len(cos)}, the rows of cos")
    return H_kv, D
