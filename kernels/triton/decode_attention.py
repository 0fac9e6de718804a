"""Attention of one new position per sequence over its key/value cache: the step of generation.

For each head, with the newest query q (D,) and the cached k_j, v_j (D,) of 0 <= j < length:

    o = Σ_j p_j v_j     with p_j = exp(s_j) / Σ_j exp(s_j)  and  s_j = q · k_j / √D

With a window the keys begin at length - window instead of 0.

There is one row of scores, so nothing here is a matrix product: the time is that of reading the
cache once. Few sequences alone would leave most of the GPU idle, therefore the keys of a sequence
are split among programs, each with an online softmax over its share (Milakov & Gimelshein 2018). A
share ends as its largest score m_s, l_s = Σ_{j in s} exp(s_j - m_s) and a_s = Σ_{j in s} exp(s_j -
m_s) v_j, and a second kernel merges the shares in a fixed order:

    o = Σ_s w_s a_s / Σ_s w_s l_s     with w_s = exp(m_s - m), m the largest of all m_s

How a sequence is split depends on its length and the sizes of the call alone: the same call gives
the same bits. Exponentials are to base 2 as in `attention`.

Alphabet: B batch, Tmax the cache's positions, H heads of queries, H_kv of keys and of values, D
head width, N keys of a block, S shares of a sequence; a "pair" is one (batch, query head).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mantrans.kernels.reference import check_window
from mantrans.kernels.triton.attention_tiles import accepted_head_sizes, padded
from mantrans.kernels.triton.launch import (
    cdiv,
    check_tensor,
    launch,
    multiprocessors,
    next_power_of_two,
    refuse,
)

LOG2_E = tl.constexpr(math.log2(math.e))
LOWEST = tl.constexpr(-3.4028234663852886e38)  # no number is less; -inf - -inf would be NaN

BLOCK_ELEMENTS = 4096  # of a block of keys: 32 registers a thread for keys, as many for values
SCATTERED_ELEMENTS = 2048  # where each element is loaded by itself: two registers more an address
SMALLEST_SHARE = 256  # keys; less work than this is not worth a program
PROGRAMS_PER_MULTIPROCESSOR = 4  # that the splitting aims at
NUM_WARPS = 4


@triton.jit(do_not_specialize=["T", "shares", "window"])
def share_kernel(
    partial,
    statistics,
    q,
    k_cache,
    v_cache,
    lengths,
    T,
    stride_q,
    stride_kb,
    stride_kt,
    stride_vb,
    stride_vt,
    n_heads,
    shares,
    window,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    N: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One program: one pair's query against one share of its keys.

    partial (B·H, S, D) float32, written: a_s, zero where the share is empty.
    statistics (B·H, S, 2) float32, written: m_s, LOWEST where the share is empty, and l_s.
    q (B, H·D), rows stride_q apart; k_cache, v_cache (B, Tmax, H_kv·D), batches stride_?b and
    positions stride_?t apart: float32, float16 or bfloat16. GROUP = H / H_kv.
    lengths (B,) int64: how many positions of each cache row count; at most T = Tmax are read, and
    of these the last `window`.
    """
    pair = tl.program_id(0).to(tl.int64)
    share = tl.program_id(1)
    batch = pair // n_heads
    head = pair % n_heads
    columns = tl.arange(0, BLOCK_D)
    inside = columns < D

    query = tl.load(q + batch * stride_q + head * D + columns, mask=inside, other=0.0)
    query = query.to(tl.float32) * scale
    k_cache += batch * stride_kb + head // GROUP * D
    v_cache += batch * stride_vb + head // GROUP * D
    length = tl.minimum(tl.load(lengths + batch), T)
    first = tl.maximum(length - window, 0)
    size = tl.cdiv(tl.cdiv(length - first, shares), N) * N
    begin = first + share * size
    end = tl.minimum(begin + size, length)

    # each of the N places of a block keeps a maximum and sums of its own until the end
    acc = tl.zeros((N, BLOCK_D), tl.float32)
    place_max = tl.full((N,), LOWEST, tl.float32)
    place_sum = tl.zeros((N,), tl.float32)
    for n in tl.range(begin, end, N):
        keys = n + tl.arange(0, N)
        there = keys < end
        tile = there[:, None] & inside[None, :]
        rows = keys[:, None]
        k = tl.load(k_cache + rows * stride_kt + columns[None, :], mask=tile, other=0.0)
        v = tl.load(v_cache + rows * stride_vt + columns[None, :], mask=tile, other=0.0)
        s = tl.where(there, tl.sum(k.to(tl.float32) * query[None, :], 1), -float("inf"))
        new_max = tl.maximum(place_max, s)
        p = tl.math.exp2((s - new_max) * LOG2_E)
        rescale = tl.math.exp2((place_max - new_max) * LOG2_E)
        acc = acc * rescale[:, None] + p[:, None] * v.to(tl.float32)
        place_sum = place_sum * rescale + p
        place_max = new_max

    largest = tl.max(place_max, 0)
    weight = tl.math.exp2((place_max - largest) * LOG2_E)
    slot = pair * shares + share
    tl.store(partial + slot * D + columns, tl.sum(acc * weight[:, None], 0), mask=inside)
    tl.store(statistics + slot * 2, largest)
    tl.store(statistics + slot * 2 + 1, tl.sum(place_sum * weight, 0))


@triton.jit(do_not_specialize=["shares"])
def merge_kernel(
    out,
    partial,
    statistics,
    shares,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One program: the shares of one pair become its output.

    out (B·H, D), which is (B, H·D), in the dtype of the cache, written.
    partial (B·H, S, D) and statistics (B·H, S, 2) float32, from `share_kernel`; S <= BLOCK_S.
    """
    pair = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < D
    share = tl.arange(0, BLOCK_S)
    there = share < shares
    slots = pair * shares + share
    largest = tl.load(statistics + slots * 2, mask=there, other=-float("inf"))
    total = tl.load(statistics + slots * 2 + 1, mask=there, other=0.0)
    weight = tl.math.exp2((largest - tl.max(largest, 0)) * LOG2_E)
    tile = there[:, None] & inside[None, :]
    o = tl.load(partial + slots[:, None] * D + columns[None, :], mask=tile, other=0.0)
    output = tl.sum(o * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out + pair * D + columns, output.to(out.dtype.element_ty), mask=inside)


# -------------------------------------------------------------------------------------- launcher


class Split(NamedTuple):
    """How a call is cut up: padded head width, keys a block, shares a sequence."""

    BLOCK_D: int
    N: int
    shares: int


LARGEST_SPLIT = 32  # shares of a sequence: one tile of merge_kernel


def split(pairs: int, T: int, D: int, caches: Sequence[Tensor]) -> Split:
    """Enough shares to fill the device, each with enough keys to be worth a program."""
    BLOCK_D = padded(D)
    device = caches[0].device
    starts = [D, *(n for x in caches for n in (x.data_ptr(), *x.stride()[:2]))]
    elements = SCATTERED_ELEMENTS if any(n % 16 for n in starts) else BLOCK_ELEMENTS
    wanted = cdiv(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(device), pairs)
    shares = max(1, min(wanted, cdiv(T, SMALLEST_SHARE), LARGEST_SPLIT))
    return Split(BLOCK_D, elements // BLOCK_D, shares)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    n_heads: int,
    n_kv_heads: int | None = None,
    window: int | None = None,
) -> Tensor:
    """Row b of q attends to the keys 0 .. lengths[b]-1 of its cache, per head, or to the last
    `window` of these: none before them is loaded. No backward.

    q (B, H·D); k_cache, v_cache (B, Tmax, H_kv·D) in q's dtype: float32, float16 or bfloat16; last
    strides 1, so that they may be slices of a packed projection. n_kv_heads: H_kv, which divides H;
    None for H. D <= 256. lengths (B,) int64, each in 1 .. Tmax. window: at least 1, None for all.
    Returns out (B, H·D), contiguous.
    ValueError, before any launch, names an argument whose device, dtype, shape or stride is wrong.
    """
    H_kv, D = check_arguments(q, k_cache, v_cache, lengths, n_heads, n_kv_heads)
    B, T, _ = k_cache.shape
    pairs = B * n_heads
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not pairs:
        return out
    check_window(window)
    window = T if window is None else min(window, T)
    BLOCK_D, N, shares = split(pairs, window, D, (k_cache, v_cache))
    partial = torch.empty((pairs, shares, D), dtype=torch.float32, device=q.device)
    statistics = torch.empty((pairs, shares, 2), dtype=torch.float32, device=q.device)
    launch(
        share_kernel,
        (pairs, shares),
        partial,
        statistics,
        q,
        k_cache,
        v_cache,
        lengths,
        T,
        q.stride(0),
        *k_cache.stride()[:2],
        *v_cache.stride()[:2],
        n_heads,
        shares,
        window,
        D**-0.5,
        D=D,
        BLOCK_D=BLOCK_D,
        N=N,
        GROUP=n_heads // H_kv,
        num_warps=NUM_WARPS,
    )
    launch(
        merge_kernel,
        (pairs,),
        out,
        partial,
        statistics,
        shares,
        D=D,
        BLOCK_D=BLOCK_D,
        BLOCK_S=next_power_of_two(shares),
        num_warps=NUM_WARPS,
    )
    return out


def check_arguments(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    n_heads: int,
    n_kv_heads: int | None,
) -> tuple[int, int]:
    """(H_kv, D). ValueError as `decode_attention`."""
    check_tensor("q", q, shape=(None, None), contiguous=False)
    check_tensor("k_cache", k_cache, shape=(len(q), None, None), contiguous=False)
    H_kv, D = accepted_head_sizes(q.shape[1] + 2 * k_cache.shape[2], n_heads, n_kv_heads)
    cache = (len(q), k_cache.shape[1], q.shape[1] // n_heads * H_kv)
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_tensor(name, x, shape=cache, dtype=q.dtype, device=q.device, contiguous=False)
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        if x.stride(-1) != 1:
            refuse(name, f"strides {x.stride()}", "a last stride of 1")
    if not k_cache.shape[1]:
        refuse("k_cache", f"shape {tuple(k_cache.shape)}", "at least one position")
    check_tensor("lengths", lengths, shape=cache[:1], dtype=torch.int64, device=q.device)
    return H_kv, D
