"""Causal attention on a packed projection, forward and backward, without the (T, T) matrix.

For each head, with q, k, v (T, D) side by side in the rows of qkv and s_ij = q_i · k_j / √D for the
keys j that query i sees (document_start_i <= j <= i; document_start does not fall as i grows):

    forward     o_i = Σ_j p_ij v_j     with p_ij = exp(s_ij) / Σ_j exp(s_ij)
    backward    δ_i = do_i · o_i       ds_ij = p_ij (do_i · v_j - δ_i)
                dv_j = Σ_i p_ij do_i   dk_j = Σ_i ds_ij q_i / √D   dq_i = Σ_j ds_ij k_j / √D

Keys come in blocks. Over the blocks seen so far the forward holds per row the largest score m, the
sum l = Σ_j exp(s_ij - m) and the sum of exp(s_ij - m) v_j; a block with a larger score rescales the
last two by exp(m_old - m_new) (online softmax: Milakov & Gimelshein 2018). What stays for the
backward are the statistics m and log l, from which p_ij = exp(s_ij - m_i - log l_i) comes back
(FlashAttention: Dao et al. 2022; the work split over rows and columns: FlashAttention-2, Dao 2023).
Their sum would be one number instead of two, but beside a large m the digits of log l are lost.

All exponentials are to base 2, because that is the GPU's instruction: m is the largest product
q · k, differences from it are multiplied by log2(e) / √D in float32, and what is kept is log2 l.
The difference comes first, so that it is 0 for the largest score whatever its size: s·c - m·c is
one instruction, which rounds m·c but not s·c, and what lies between the two grows with m.

The backward is three kernels in a fixed order of summation, so its bits repeat: δ; then dk and dv,
one program per block of keys; then dq, one program per block of queries. The scores are computed
twice that way (7 products instead of 5); in return no two programs add to the same element.

Two habits keep Hopper's compilers honest. The dk/dv kernel works on transposed scores, Sᵀ = K Qᵀ,
from the start: transposing the *result* of a product and feeding it to another one is silently
miscompiled by Triton 3.4 and later (flash-linear-attention issues 640, 984). Transposing a loaded
tile is only another way to read shared memory. And a product whose left side lies in registers
(p, ds) is waited for at once, see `wait_for_product`.

With documents, a program visits only the blocks that some of its rows can see, in both directions.
A GROUP of neighboring heads of queries may share one head of keys and of values (Ainslie et al.
2023). One program of the dk/dv kernel then goes through the queries of the whole group, in each
block of positions head after head, so that nothing changes in what is said above.

Alphabet: B batch, T sequence, H heads of queries, H_kv of keys and as many of values, D head width,
P = (H + 2 H_kv)·D; M rows of a block of queries, N of a block of keys; a "pair" is one (batch,
head). In comments (M,D)(D,N) -> (M,N) is the shape of a product.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mantrans.kernels.triton.attention_tiles import (
    Problem,
    check_documents,
    empty_row_statistics,
    empty_rows,
    problem_of,
    row_statistics,
    tiles_of,
)
from mantrans.kernels.triton.launch import (
    cdiv,
    check_tensor,
    launch,
    refuse,
)

LOG2_E = tl.constexpr(math.log2(math.e))
LOWEST = tl.constexpr(-3.4028234663852886e38)  # no number is less; -inf - -inf would be NaN

# ------------------------------------------------------------------------------- shared pieces


@triton.jit
def heaviest_first(n_blocks, n_pairs, pairs_together):
    """(rank, pair) of this program: rank 0 is the block with most work, and is started first.

    Long programs started last would leave the GPU waiting for them. Pairs go in groups of
    pairs_together, whose tiles fit in the L2 cache together.
    """
    program = tl.program_id(0)
    group = program // (n_blocks * pairs_together)
    within = program % (n_blocks * pairs_together)
    first = group * pairs_together
    size = tl.minimum(pairs_together, n_pairs - first)
    return within // size, first + within % size


@triton.jit
def load_tile(
    source,
    batch,
    head,
    row,
    T,
    stride_b,
    stride_t,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
):
    """Rows row .. row + ROWS of one head as (ROWS, BLOCK_D); zero beyond T and beyond D.

    source: with TMA a descriptor made by `tiles_of`, else a pointer to (B, T, heads·D). A packed
    qkv has H + 2 H_kv heads here: those of queries, of keys and of values.
    """
    if TMA:
        return tl.reshape(source.load([batch, head, row, 0]), (ROWS, BLOCK_D))
    else:
        corner = source + tl.cast(batch, tl.int64) * stride_b + head * D
        corner += tl.cast(row, tl.int64) * stride_t
        rows = tl.arange(0, ROWS)[:, None]
        columns = tl.arange(0, BLOCK_D)[None, :]
        inside = (row + rows < T) & (columns < D)
        offsets = rows.to(tl.int64) * stride_t + columns
        return tl.load(corner + offsets, mask=inside, other=0.0)


@triton.jit
def key_head(head, n_heads, GROUP: tl.constexpr):
    """Which head of a packed qkv holds the keys that query head `head` reads."""
    return n_heads + head // GROUP


@triton.jit
def value_head(head, n_heads, GROUP: tl.constexpr):
    """Which head of a packed qkv holds the values that query head `head` reads."""
    return n_heads + n_heads // GROUP + head // GROUP


@triton.jit
def store_tile(
    target,
    tile,
    batch,
    head,
    row,
    T,
    width,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Writes tile (ROWS, BLOCK_D), as far as it lies within T and D, into (B, T, width)."""
    corner = target + (batch.to(tl.int64) * T + row) * width + head * D
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK_D)[None, :]
    inside = (row + rows < T) & (columns < D)
    offsets = rows.to(tl.int64) * width + columns
    tl.store(corner + offsets, tile.to(target.dtype.element_ty), mask=inside)


@triton.jit
def load_row_statistic(source, pair, row, T, stride, ROWS: tl.constexpr, TMA: tl.constexpr):
    """One number of each of the queries row .. row + ROWS, (ROWS,) float32; zero beyond T.

    source: rows of T numbers, of which this is row `pair`. Zero is harmless beyond T: q and do are
    zero there too, so p = 1 meets do = 0 and ds = 0.
    """
    if TMA:
        return tl.reshape(source.load([pair, row]), (ROWS,))
    else:
        rows = row + tl.arange(0, ROWS)
        return tl.load(source + pair.to(tl.int64) * stride + rows, mask=rows < T, other=0.0)


@triton.jit
def probabilities(products, largest, log2_sum, to_log2):
    """p of the forward again, from q · k and the two statistics of each row, which broadcast."""
    return tl.math.exp2((products - largest) * to_log2 - log2_sum)


@triton.jit
def rows_times_rows(a, b):
    """a bᵀ for tiles a (M, D) and b (N, D) of loaded rows: (M,D)(D,N) -> (M,N), float32.

    float32 products have no tensor cores: each thread holds the operands of its sums in registers,
    D of each, and would spill them. Sixteen at a time, in D/16 partial products, they fit.
    """
    M: tl.constexpr = a.shape[0]
    N: tl.constexpr = b.shape[0]
    PARTS: tl.constexpr = a.shape[1] // 16
    if a.dtype == tl.float32 and PARTS > 1:
        a_parts = tl.permute(tl.reshape(a, (M, PARTS, 16)), (1, 0, 2))
        b_parts = tl.permute(tl.reshape(b, (N, PARTS, 16)), (1, 2, 0))
        return tl.sum(tl.dot(a_parts, b_parts, input_precision="ieee"), 0)
    else:
        return tl.dot(a, tl.trans(b), input_precision="ieee")


@triton.jit
def visible(rows, keys, document_start, T):
    """Which of `keys` each of `rows` sees; one is (·, 1) and the other (1, ·).

    document_start: of this sequence, (T,) int32, or None.
    """
    seen = keys <= rows
    if document_start is not None:
        seen = seen & (keys >= tl.load(document_start + rows, mask=rows < T, other=0))
    return seen


@triton.jit
def wait_for_product(x, WAIT: tl.constexpr):
    """x, a float32 product; with WAIT the matrix unit is done with it before anything else happens.

    Hopper's products run asynchronously. Left alone, Triton lets one run on into the next round of
    the loop while its left side still lies in registers. The assemblers that come with Triton 3.6
    to 3.9 (CUDA 12.8, 12.9) may hand those registers to somebody else too early (Triton pull
    request 11781), and where they see the danger they make every single instruction wait instead
    (warning C7515). An empty instruction that uses x costs nothing and rules out both.
    """
    if WAIT:
        return tl.inline_asm_elementwise("", "=f,0", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return x


# ------------------------------------------------------------------------------------- forward


@triton.jit
def key_range(row, document_start, T, M: tl.constexpr, N: tl.constexpr):
    """Of the queries row .. row + M: where their keys begin, are seen by all of them, meet the
    diagonal, and stop. Multiples of N but for the last. From `clear` to `diagonal` no mask is due.
    """
    first = row * 0
    clear = row * 0
    diagonal = row // N * N
    if document_start is not None:
        first = tl.maximum(tl.load(document_start + row), 0) // N * N
        last_start = tl.load(document_start + tl.minimum(row + M, T) - 1)
        clear = tl.minimum(tl.cdiv(tl.maximum(last_start, 0), N) * N, diagonal)
    return first, clear, diagonal, tl.minimum(row + M, T)


@triton.jit(do_not_specialize=["T", "n_pairs", "pairs_together"])
def forward_kernel(
    out,
    statistics,
    q_tiles,
    kv_tiles,
    document_start,
    T,
    stride_b,
    stride_t,
    stride_statistics,
    n_heads,
    n_pairs,
    pairs_together,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    WAIT: tl.constexpr,
):
    """One program: M queries of one pair against the keys they see.

    out (B, T, H·D) dtype of qkv, written; statistics (2·B·H, T) float32, rows stride_statistics
    apart, written: the largest q · k of each query, for all pairs, and then log2 of the sum l.
    q_tiles, kv_tiles: qkv (B, T, P) 16 or 32-bit float, batches stride_b and positions stride_t
    apart, as `load_tile` takes it, in tiles of M and N rows.
    document_start (B, T) int32 or None. GROUP = H / H_kv.
    """
    rank, pair = heaviest_first(tl.cdiv(T, M), n_pairs, pairs_together)
    batch = pair // n_heads
    head = pair % n_heads
    row = (tl.cdiv(T, M) - 1 - rank) * M
    rows = row + tl.arange(0, M)
    to_log2 = scale * LOG2_E
    if document_start is not None:
        document_start += batch.to(tl.int64) * T

    q = load_tile(q_tiles, batch, head, row, T, stride_b, stride_t, M, D, BLOCK_D, TMA)
    acc = tl.zeros((M, BLOCK_D), tl.float32)
    row_max = tl.full((M,), LOWEST, tl.float32)
    row_sum = tl.zeros((M,), tl.float32)

    first, clear, diagonal, stop = key_range(row, document_start, T, M, N)
    # three loops: where documents begin (masked), in full view, on the diagonal (masked)
    for part in tl.static_range(0 if document_start is not None else 1, 3):
        begin = first if part == 0 else (clear if part == 1 else diagonal)
        end = clear if part == 0 else (diagonal if part == 1 else stop)
        for n in tl.range(begin, end, N):
            kv_head = key_head(head, n_heads, GROUP)
            k = load_tile(kv_tiles, batch, kv_head, n, T, stride_b, stride_t, N, D, BLOCK_D, TMA)
            s = rows_times_rows(q, k)  # (M,D)(D,N) -> (M,N)
            if part != 1:
                keys = n + tl.arange(0, N)
                seen = visible(rows[:, None], keys[None, :], document_start, T)
                s = tl.where(seen, s, -float("inf"))
            new_max = tl.maximum(row_max, tl.max(s, 1))
            p = tl.math.exp2((s - new_max[:, None]) * to_log2)
            rescale = tl.math.exp2((row_max - new_max) * to_log2)
            row_sum = row_sum * rescale + tl.sum(p, 1)
            row_max = new_max
            kv_head = value_head(head, n_heads, GROUP)
            v = load_tile(kv_tiles, batch, kv_head, n, T, stride_b, stride_t, N, D, BLOCK_D, TMA)
            acc = acc * rescale[:, None]
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")  # (M,N)(N,D) -> (M,D)
            acc = wait_for_product(acc, WAIT)

    store_tile(out, acc / row_sum[:, None], batch, head, row, T, n_heads * D, M, D, BLOCK_D)
    statistics += pair.to(tl.int64) * stride_statistics
    tl.store(statistics + rows, row_max, mask=rows < T)
    statistics += tl.cast(n_pairs, tl.int64) * stride_statistics
    tl.store(statistics + rows, tl.math.log2(row_sum), mask=rows < T)


# ------------------------------------------------------------------------------------ backward


@triton.jit(do_not_specialize=["T"])
def delta_kernel(
    delta,
    seen_until,
    out,
    dout,
    document_start,
    T,
    stride_delta,
    n_heads,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    M: tl.constexpr,
):
    """One program: δ = do · o of M rows of one pair; the first head also finds `seen_until`.

    delta (B·H, T) float32, rows stride_delta apart, written.
    seen_until (B, T) int32, written: the first query after key j that does not see it, or T. None
    without documents.
    out, dout (B, T, H·D) float; document_start (B, T) int32 or None.
    """
    pair = tl.program_id(0)  # on the axis that has room for 2³¹ programs, not 65,535
    batch = pair // n_heads
    head = pair % n_heads
    row = tl.program_id(1) * M
    rows = row + tl.arange(0, M)
    C = n_heads * D
    stride_b = tl.cast(T, tl.int64) * C
    o = load_tile(out, batch, head, row, T, stride_b, C, M, D, BLOCK_D, False)
    do = load_tile(dout, batch, head, row, T, stride_b, C, M, D, BLOCK_D, False)
    products = o.to(tl.float32) * do.to(tl.float32)
    delta += pair.to(tl.int64) * stride_delta
    tl.store(delta + rows, tl.sum(products, 1), mask=rows < T)
    if document_start is not None:  # noqa: SIM102 - decided when compiling, the next when running
        if head == 0:
            document_start += batch.to(tl.int64) * T
            low = tl.minimum(rows + 1, T)
            high = tl.full((M,), 0, tl.int32) + T
            left = T
            while left > 0:  # halve low .. high, T at most, until nothing is left
                middle = low + (high - low) // 2
                start = tl.load(document_start + middle, mask=low < high, other=0)
                sees = (low < high) & (start <= rows)
                low = tl.where(sees, middle + 1, low)
                high = tl.where(sees, high, middle)
                left = left // 2
            tl.store(seen_until + batch.to(tl.int64) * T + rows, low, mask=rows < T)


@triton.jit
def query_range(key, seen_until, T, M: tl.constexpr, N: tl.constexpr):
    """Of the keys key .. key + N: where the queries that see them begin, have passed the diagonal,
    do no longer see all of them, and stop. Multiples of M, or the end. From `below` to `clear` no
    mask is due.
    """
    stop = T
    clear = T
    if seen_until is not None:
        stop = tl.load(seen_until + tl.minimum(key + N, T) - 1)
        clear = tl.load(seen_until + key)
        clear = tl.where(clear == T, T, clear // M * M)
    below = tl.minimum(tl.cdiv(key + N, M) * M, stop)
    return key // M * M, below, tl.maximum(below, clear), stop


@triton.jit
def in_turns(row, M: tl.constexpr, GROUP: tl.constexpr):
    """Where a loop over blocks of M rows is at `row` if it visits each once for every head."""
    if GROUP == 1:
        return row
    else:
        return tl.cdiv(row, M) * (M * GROUP)


@triton.jit
def block_and_head(i, M: tl.constexpr, GROUP: tl.constexpr):
    """Which block of queries, and which head of the group, is due at i of such a loop."""
    if GROUP == 1:
        return i, 0
    else:
        return i // (M * GROUP) * M, i // M % GROUP


@triton.jit(do_not_specialize=["T", "n_pairs", "pairs_together"])
def dkdv_kernel(
    dqkv,
    q_tiles,
    kv_tiles,
    do_tiles,
    statistics,
    delta,
    document_start,
    seen_until,
    T,
    stride_b,
    stride_t,
    stride_statistics,
    n_heads,
    n_pairs,
    pairs_together,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    WAIT: tl.constexpr,
):
    """One program: dk and dv of N keys of one pair, over the queries that see them.

    dqkv (B, T, P) dtype of qkv; its columns of keys and values are written.
    q_tiles, kv_tiles: qkv (B, T, P) as in `forward_kernel`; do_tiles: dout (B, T, H·D) in tiles of
    M rows; statistics (2·B·H, T), as `forward_kernel` wrote them, and delta (B·H, T) float32, rows
    stride_statistics apart: see `load_row_statistic`.
    document_start, seen_until (B, T) int32, the latter from `delta_kernel`, or None.
    n_pairs: B·H_kv; GROUP = H / H_kv.
    """
    rank, pair = heaviest_first(tl.cdiv(T, N), n_pairs, pairs_together)
    n_kv_heads = n_heads // GROUP
    batch = pair // n_kv_heads
    head = pair % n_kv_heads * GROUP  # the group's first
    key = rank * N
    keys = key + tl.arange(0, N)
    C = n_heads * D
    stride_do = tl.cast(T, tl.int64) * C
    to_log2 = scale * LOG2_E
    if document_start is not None:
        document_start += batch.to(tl.int64) * T
        seen_until += batch.to(tl.int64) * T

    kv_head = key_head(head, n_heads, GROUP)
    k = load_tile(kv_tiles, batch, kv_head, key, T, stride_b, stride_t, N, D, BLOCK_D, TMA)
    kv_head = value_head(head, n_heads, GROUP)
    v = load_tile(kv_tiles, batch, kv_head, key, T, stride_b, stride_t, N, D, BLOCK_D, TMA)
    dk = tl.zeros((N, BLOCK_D), tl.float32)
    dv = tl.zeros((N, BLOCK_D), tl.float32)

    first, below, clear, stop = query_range(key, seen_until, T, M, N)
    # three loops: on the diagonal (masked), in full view, where documents end (masked)
    for part in tl.static_range(3 if document_start is not None else 2):
        begin = first if part == 0 else (below if part == 1 else clear)
        end = below if part == 0 else (clear if part == 1 else stop)
        for i in tl.range(in_turns(begin, M, GROUP), in_turns(end, M, GROUP), M):
            m, g = block_and_head(i, M, GROUP)
            q = load_tile(q_tiles, batch, head + g, m, T, stride_b, stride_t, M, D, BLOCK_D, TMA)
            s_t = rows_times_rows(k, q)  # (N,D)(D,M) -> (N,M)
            of_row = pair * GROUP + g
            largest = load_row_statistic(statistics, of_row, m, T, stride_statistics, M, TMA)
            of_row += n_pairs * GROUP
            log2_sum = load_row_statistic(statistics, of_row, m, T, stride_statistics, M, TMA)
            p_t = probabilities(s_t, largest[None, :], log2_sum[None, :], to_log2)
            if part != 1:
                rows = m + tl.arange(0, M)
                seen = visible(rows[None, :], keys[:, None], document_start, T)
                p_t = tl.where(seen, p_t, 0.0)
            do = load_tile(do_tiles, batch, head + g, m, T, stride_do, C, M, D, BLOCK_D, TMA)
            dv = tl.dot(p_t.to(do.dtype), do, dv, input_precision="ieee")  # (N,M)(M,D) -> (N,D)
            dp_t = rows_times_rows(v, do)  # (N,D)(D,M) -> (N,M)
            of_row = pair * GROUP + g
            delta_m = load_row_statistic(delta, of_row, m, T, stride_statistics, M, TMA)
            ds_t = p_t * (dp_t - delta_m[None, :])
            dk = tl.dot(ds_t.to(q.dtype), q, dk, input_precision="ieee")  # (N,M)(M,D) -> (N,D)
            dv = wait_for_product(dv, WAIT)
            dk = wait_for_product(dk, WAIT)

    dk *= scale
    kv_head = key_head(head, n_heads, GROUP)
    width = C + 2 * (C // GROUP)
    store_tile(dqkv, dk, batch, kv_head, key, T, width, N, D, BLOCK_D)
    kv_head = value_head(head, n_heads, GROUP)
    store_tile(dqkv, dv, batch, kv_head, key, T, width, N, D, BLOCK_D)


@triton.jit(do_not_specialize=["T", "n_pairs", "pairs_together"])
def dq_kernel(
    dqkv,
    q_tiles,
    kv_tiles,
    do_tiles,
    statistics,
    delta,
    document_start,
    T,
    stride_b,
    stride_t,
    stride_statistics,
    n_heads,
    n_pairs,
    pairs_together,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    WAIT: tl.constexpr,
):
    """One program: dq of M queries of one pair, over the keys they see.

    dqkv (B, T, P) dtype of qkv; its first H·D columns are written. statistics and delta come as
    pointers; n_pairs: B·H. The other arguments as in `dkdv_kernel`.
    """
    rank, pair = heaviest_first(tl.cdiv(T, M), n_pairs, pairs_together)
    batch = pair // n_heads
    head = pair % n_heads
    row = (tl.cdiv(T, M) - 1 - rank) * M
    rows = row + tl.arange(0, M)
    C = n_heads * D
    to_log2 = scale * LOG2_E
    if document_start is not None:
        document_start += batch.to(tl.int64) * T

    q = load_tile(q_tiles, batch, head, row, T, stride_b, stride_t, M, D, BLOCK_D, TMA)
    stride_do = tl.cast(T, tl.int64) * C
    do = load_tile(do_tiles, batch, head, row, T, stride_do, C, M, D, BLOCK_D, TMA)
    largest = load_row_statistic(statistics, pair, row, T, stride_statistics, M, False)
    log2_sum = load_row_statistic(statistics, n_pairs + pair, row, T, stride_statistics, M, False)
    delta_m = load_row_statistic(delta, pair, row, T, stride_statistics, M, False)
    dq = tl.zeros((M, BLOCK_D), tl.float32)

    first, clear, diagonal, stop = key_range(row, document_start, T, M, N)
    for part in tl.static_range(0 if document_start is not None else 1, 3):  # as in the forward
        begin = first if part == 0 else (clear if part == 1 else diagonal)
        end = clear if part == 0 else (diagonal if part == 1 else stop)
        for n in tl.range(begin, end, N):
            kv_head = key_head(head, n_heads, GROUP)
            k = load_tile(kv_tiles, batch, kv_head, n, T, stride_b, stride_t, N, D, BLOCK_D, TMA)
            s = rows_times_rows(q, k)  # (M,D)(D,N) -> (M,N)
            p = probabilities(s, largest[:, None], log2_sum[:, None], to_log2)
            if part != 1:
                keys = n + tl.arange(0, N)
                seen = visible(rows[:, None], keys[None, :], document_start, T)
                p = tl.where(seen, p, 0.0)
            kv_head = value_head(head, n_heads, GROUP)
            v = load_tile(kv_tiles, batch, kv_head, n, T, stride_b, stride_t, N, D, BLOCK_D, TMA)
            dp = rows_times_rows(do, v)  # (M,D)(D,N) -> (M,N)
            ds = p * (dp - delta_m[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")  # (M,N)(N,D) -> (M,D)
            dq = wait_for_product(dq, WAIT)

    store_tile(dqkv, dq * scale, batch, head, row, T, C + 2 * (C // GROUP), M, D, BLOCK_D)


# ------------------------------------------------------------------------------------- launchers

KERNELS = {"forward": forward_kernel, "dkdv": dkdv_kernel, "dq": dq_kernel}
DELTA_ELEMENTS = 8192  # of a tile of delta_kernel, in at most 64 rows


def attention_forward(
    qkv: Tensor,
    n_heads: int,
    document_start: Tensor | None = None,
    n_kv_heads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """o = softmax(q kᵀ / √D + mask) v per head, causal (the file's docstring has the equations).

    qkv (B, T, (H + 2 H_kv)·D) float32, float16 or bfloat16, last stride 1: H heads of queries, H_kv
    of keys and H_kv of values side by side, each of width D <= 256. document_start (B, T) int32, or
    None for one document: query i sees the keys document_start[i] <= j <= i; it may not fall as i
    grows, and document_start[i] <= i (not checked: that would wait for the GPU). n_kv_heads: H_kv,
    which divides H; None for H. Right where q · k and score · log2(e) are finite in float32.
    Returns out (B, T, H·D), and for the backward statistics (2, B, H, T) float32.
    ValueError, before any launch, names an argument whose device, dtype, shape or stride is wrong.
    """
    problem = problem_of(qkv, n_heads, n_kv_heads)
    check_documents(document_start, problem, qkv.device)
    shape = (problem.B, problem.T, n_heads * problem.D)
    out = torch.empty(shape, dtype=qkv.dtype, device=qkv.device)
    statistics = empty_row_statistics(2, qkv, problem)
    if not qkv.numel():
        return out, statistics
    documents = document_start is not None
    tiles = problem.tiles("forward", documents)
    grid, n_pairs, pairs_together = problem.schedule(tiles.M, n_heads)
    launch(
        forward_kernel,
        grid,
        out,
        statistics,
        tiles_of(qkv, problem, tiles.M),
        tiles_of(qkv, problem, tiles.N),
        document_start,
        problem.T,
        qkv.stride(0),
        qkv.stride(1),
        statistics.stride(2),
        n_heads,
        n_pairs,
        pairs_together,
        problem.scale,
        **problem.constants("forward", documents),
    )
    return out, statistics


def empty_statistics(qkv: Tensor, n_heads: int, n_kv_heads: int | None = None) -> Tensor:
    """Unwritten statistics as `attention_forward` makes them."""
    return empty_rows(2, qkv.shape[0], n_heads, qkv.shape[1], qkv.device)


def attention_backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    statistics: Tensor,
    n_heads: int,
    document_start: Tensor | None = None,
    n_kv_heads: int | None = None,
) -> Tensor:
    """dqkv, from what `attention_forward` took and gave (the file's docstring has the equations).

    dout, out (B, T, H·D) contiguous, dtype of qkv; out and statistics as the forward returned them;
    the rest as there. Returns dqkv, of qkv's shape, contiguous. Same bits whenever called
    again. ValueError as `attention_forward`.
    """
    problem = problem_of(qkv, n_heads, n_kv_heads)
    check_backward(dout, qkv, out, statistics, document_start, problem)
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    if not qkv.numel():
        return dqkv
    if dout.data_ptr() % 16:
        dout = dout.clone()
    delta, seen_until = output_gradient_statistics(dout, out, document_start, problem)
    sizes = (problem.T, qkv.stride(0), qkv.stride(1), statistics.stride(2), n_heads)

    documents = document_start is not None
    tiles = problem.tiles("dkdv", documents)
    grid, n_pairs, pairs_together = problem.schedule(tiles.N, problem.H_kv)
    launch(
        dkdv_kernel,
        grid,
        dqkv,
        tiles_of(qkv, problem, tiles.M),
        tiles_of(qkv, problem, tiles.N),
        tiles_of(dout, problem, tiles.M),
        row_statistics(statistics, problem, tiles.M),
        row_statistics(delta, problem, tiles.M),
        document_start,
        seen_until,
        *sizes,
        n_pairs,
        pairs_together,
        problem.scale,
        **problem.constants("dkdv", documents),
    )

    tiles = problem.tiles("dq", documents)
    grid, n_pairs, pairs_together = problem.schedule(tiles.M, n_heads)
    launch(
        dq_kernel,
        grid,
        dqkv,
        tiles_of(qkv, problem, tiles.M),
        tiles_of(qkv, problem, tiles.N),
        tiles_of(dout, problem, tiles.M),
        statistics,
        delta,
        document_start,
        *sizes,
        n_pairs,
        pairs_together,
        problem.scale,
        **problem.constants("dq", documents),
    )
    return dqkv


def check_backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    statistics: Tensor,
    document_start: Tensor | None,
    problem: Problem,
) -> None:
    """ValueError as `attention_backward`."""
    B, T, H, D = problem.B, problem.T, problem.H, problem.D
    for name, x in (("dout", dout), ("out", out)):
        check_tensor(name, x, shape=(B, T, H * D), dtype=qkv.dtype, device=qkv.device)
    check_tensor(
        "statistics",
        statistics,
        shape=(2, B, H, T),
        dtype=torch.float32,
        device=qkv.device,
        contiguous=False,
    )
    expected = empty_row_statistics(2, statistics.new_empty(0, device="meta"), problem).stride()
    if statistics.numel() and statistics.stride() != expected:
        refuse(
            "statistics",
            f"strides {statistics.stride()}",
            f"strides {expected}, as attention_forward made them",
        )
    check_documents(document_start, problem, qkv.device)


def output_gradient_statistics(
    dout: Tensor, out: Tensor, document_start: Tensor | None, problem: Problem
) -> tuple[Tensor, Tensor | None]:
    """delta (1, B, H, T) = do · o, and seen_until (B, T): see `delta_kernel`."""
    delta = empty_row_statistics(1, out, problem)
    rows = min(64, DELTA_ELEMENTS // problem.BLOCK_D)
    seen_until = None if document_start is None else torch.empty_like(document_start)
    launch(
        delta_kernel,
        (problem.B * problem.H, cdiv(problem.T, rows)),
        delta,
        seen_until,
        out,
        dout,
        document_start,
        problem.T,
        delta.stride(2),
        problem.H,
        D=problem.D,
        BLOCK_D=problem.BLOCK_D,
        M=rows,
        num_warps=4,
    )
    return delta, seen_until
