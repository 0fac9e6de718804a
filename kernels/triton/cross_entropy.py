"""Softmax cross-entropy with its gradient in place, alone and together with the output projection.

    m_n = max_v z_nv      e_nv = exp(z_nv - m_n)      s_n = Σ e_nv over all v but the target

    forward     loss_n = (m_n - z_n,target) + log1p(s_n - (1 - e_n,target))
    backward    dz_nv = e_nv / (s_n + e_n,target) · scale, at the target -s_n / (…) · scale

Only differences of logits enter, so the loss does not depend on what all of them have in common;
leaving out the target keeps the digits of a small loss, and makes the row's gradients sum to 0.

One program processes one row of logits. In the first pass each of LANES lanes keeps a running
maximum m and the sum s of exp(z - m) over its columns (Milakov & Gimelshein 2018):

    m' = max(m, z)      s' = s · exp(m - m') + exp(z - m')

so that lanes are combined only at the end of the row. The second pass reads the row again, from
cache if it fits, and overwrites it with the softmax; the target's column, the only one that
differs, is then written again. The loss is computed in float32 before anything is overwritten.

Ignored rows have loss 0 and gradient exactly 0. Columns from vocab_size on are padding: not in the
sum, gradient exactly 0. A target outside the vocabulary gives a NaN loss, which the training step
notices, and never an access outside the row.

`linear_cross_entropy_*` computes x Wᵀ a chunk of rows at a time in one workspace: the logits of the
whole batch, by far the largest tensor of a language model, are never in memory at once.

    dx = dz W           dW += dzᵀ x
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from mantrans.kernels.native import row_chunks, weight_gradient
from mantrans.kernels.reference import IGNORE_INDEX
from mantrans.kernels.triton.launch import (
    MOST_THREADS,
    cdiv,
    check_tensor,
    lanes_of_warp,
    launch,
    next_power_of_two,
    refuse,
)

WORKSPACE_BYTES = 256 * 2**20  # of logits at a time: large enough to keep the products efficient
CHUNK_ROW_MULTIPLE = 128  # so that the products' tiles are full

BYTES_A_LANE = 16  # a lane's columns of a block are adjacent: one load
LANES_A_THREAD = 2  # loads in flight per thread
MAX_WARPS = 32  # of a row of 16-bit logits; half for float32, with which ptxas would spill

LOG2_E = tl.constexpr(1.4426950408889634)
# The maximum of no logits: no finite one lies below it, and unlike -inf it can be subtracted.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def block_columns(LANES: tl.constexpr, COLUMNS: tl.constexpr):
    """The columns of a block, shape (LANES, COLUMNS); a lane's columns are adjacent."""
    return tl.arange(0, LANES)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def exponential(x):
    """exp(x) of a difference of logits. The difference comes first: the product of a large logit
    and log₂ e would be rounded by more than 1."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def log1p(x):
    """log(1 + x), x >= 0, also for an x that 1 + x would lose (W. Kahan, HP-15C, 1982)."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / (y - 1.0)))


@triton.jit
def partial_sum(
    row_ptr,
    without,
    begin,
    end,
    n_columns,
    MASKED: tl.constexpr,
    LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """(m, Σ exp(z - m)) over columns begin … end - 1, m their maximum; lanes are combined last.

    without: a column that is left out, or None.

    Without MASKED, end - begin must be a multiple of the block.
    """
    lane_max = tl.full((LANES,), LOWEST, tl.float32)
    lane_sum = tl.zeros((LANES,), tl.float32)
    for first in range(begin, end, LANES * COLUMNS):
        columns = first + block_columns(LANES, COLUMNS)
        if MASKED:
            # masked by n_columns, a multiple of 128 in a model: an odd `end` would split loads
            z = tl.load(row_ptr + columns, mask=columns < n_columns, other=0.0).to(tl.float32)
            z = tl.where(columns < end, z, float("-inf"))
        else:  # the second pass reads these again
            z = tl.load(row_ptr + columns, eviction_policy="evict_last").to(tl.float32)
        if without is not None:
            z = tl.where(columns == without, float("-inf"), z)
        new_max = tl.maximum(lane_max, tl.max(z, 1))
        lane_sum *= exponential(lane_max - new_max)
        lane_sum += tl.sum(exponential(z - new_max[:, None]), 1)
        lane_max = new_max
    top = tl.max(lane_max, 0)
    return top, tl.sum(lane_sum * exponential(lane_max - top), 0)


@triton.jit
def row_sums(
    row_ptr, without, z_target, n_columns, vocab_size, LANES: tl.constexpr, COLUMNS: tl.constexpr
):
    """(m, s) of the first vocab_size of a row's n_columns logits. without: the target's column, or
    None if -inf is written there.

    Whole blocks need no mask; the rest is processed in quarter blocks, to waste fewer lanes.
    """
    whole = vocab_size // (LANES * COLUMNS) * (LANES * COLUMNS)
    REST: tl.constexpr = (LANES + 3) // 4
    m1, s1 = partial_sum(row_ptr, without, 0, whole, n_columns, False, LANES, COLUMNS)
    m2, s2 = partial_sum(row_ptr, without, whole, vocab_size, n_columns, True, REST, COLUMNS)
    m = tl.maximum(tl.maximum(m1, m2), z_target)
    return m, s1 * exponential(m1 - m) + s2 * exponential(m2 - m)


@triton.jit
def row_loss(m, s, z_target):
    """The loss of a row from its sums and its target's logit."""
    return (m - z_target) + log1p(s - (1.0 - exponential(z_target - m)))


@triton.jit
def target_column(row_ptr, target, vocab_size):
    """(column, logit) of the target; (-1, NaN) for a target outside the vocabulary."""
    exists = (target >= 0) & (target < vocab_size)
    z_target = tl.load(row_ptr + target, mask=exists, other=float("nan")).to(tl.float32)
    return tl.where(exists, target, -1).to(tl.int32), z_target


@triton.jit
def write_softmax(
    row_ptr,
    m,
    factor,
    begin,
    end,
    n_columns,
    MASKED: tl.constexpr,
    LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """z ← exp(z - m) · factor for columns begin … end - 1; with MASKED 0 from end on."""
    for first in range(begin, n_columns if MASKED else end, LANES * COLUMNS):
        columns = first + block_columns(LANES, COLUMNS)
        if MASKED:
            z = tl.load(row_ptr + columns, mask=columns < n_columns, other=0.0).to(tl.float32)
        else:
            z = tl.load(row_ptr + columns, eviction_policy="evict_first").to(tl.float32)
        dz = exponential(z - m) * factor
        if MASKED:
            dz = tl.where(columns < end, dz, 0.0).to(row_ptr.dtype.element_ty)
            tl.store(row_ptr + columns, dz, mask=columns < n_columns)
        else:
            tl.store(row_ptr + columns, dz.to(row_ptr.dtype.element_ty))


@triton.jit
def write_gradient(
    row_ptr,
    z_target,
    m,
    s,
    column,
    scale,
    n_columns,
    vocab_size,
    LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Overwrite a row of logits with (softmax - onehot) · scale; z_target is already loaded."""
    whole = vocab_size // (LANES * COLUMNS) * (LANES * COLUMNS)
    REST: tl.constexpr = (LANES + 3) // 4
    factor = scale / (s + exponential(z_target - m))
    tl.debug_barrier()  # every thread has read z_target before one overwrites it
    write_softmax(row_ptr, m, factor, 0, whole, n_columns, False, LANES, COLUMNS)
    write_softmax(row_ptr, m, factor, whole, vocab_size, n_columns, True, REST, COLUMNS)
    tl.debug_barrier()  # the softmax of the target's column is written before its gradient
    dz_target = -s * factor
    tl.store(row_ptr + column, dz_target.to(row_ptr.dtype.element_ty), mask=column >= 0)


@triton.jit
def write_zeros(row_ptr, n_columns, LANES: tl.constexpr, COLUMNS: tl.constexpr):
    """The gradient of an ignored row."""
    for first in range(0, n_columns, LANES * COLUMNS):
        columns = first + block_columns(LANES, COLUMNS)
        zeros = tl.zeros((LANES, COLUMNS), row_ptr.dtype.element_ty)
        tl.store(row_ptr + columns, zeros, mask=columns < n_columns)


@triton.jit
def cross_entropy_forward_kernel(
    logits_ptr,
    targets_ptr,
    losses_ptr,
    normalizer_ptr,
    n_columns,
    vocab_size,
    ignore_index,
    LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program n computes the loss of row n.

    logits_ptr      (N, n_columns) any float
    targets_ptr     (N,) int64
    losses_ptr      (N,) float32: written
    normalizer_ptr  (N, 2) float32: m and s of the row, written; or None
    """
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * n_columns
    target = tl.load(targets_ptr + row)
    column, z_target = target_column(row_ptr, target, vocab_size)
    m, s = row_sums(row_ptr, column, z_target, n_columns, vocab_size, LANES, COLUMNS)
    loss = row_loss(m, s, z_target)
    tl.store(losses_ptr + row, tl.where(target == ignore_index, 0.0, loss))
    if normalizer_ptr is not None:
        tl.store(normalizer_ptr + row * 2, m)
        tl.store(normalizer_ptr + row * 2 + 1, s)


@triton.jit
def cross_entropy_backward_kernel(
    logits_ptr,
    targets_ptr,
    normalizer_ptr,
    scale_ptr,
    n_columns,
    vocab_size,
    ignore_index,
    LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program n writes the gradient of row n over its logits.

    logits_ptr      (N, n_columns) any float: read, then overwritten by dz
    targets_ptr     (N,) int64
    normalizer_ptr  (N, 2) float32: from the forward
    scale_ptr       0-d float32: the gradient that each row's loss receives
    """
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * n_columns
    target = tl.load(targets_ptr + row)
    if target == ignore_index:
        write_zeros(row_ptr, n_columns, LANES, COLUMNS)
    else:
        column, z_target = target_column(row_ptr, target, vocab_size)
        m, s = tl.load(normalizer_ptr + row * 2), tl.load(normalizer_ptr + row * 2 + 1)
        scale = tl.load(scale_ptr)
        write_gradient(
            row_ptr, z_target, m, s, column, scale, n_columns, vocab_size, LANES, COLUMNS
        )


@triton.jit
def cross_entropy_forward_backward_kernel(
    logits_ptr,
    targets_ptr,
    losses_ptr,
    scale_ptr,
    n_columns,
    vocab_size,
    ignore_index,
    LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program n computes the loss of row n, then writes its gradient over the logits.

    logits_ptr   (N, n_columns) any float: read, then overwritten by dz
    targets_ptr  (N,) int64
    losses_ptr   (N,) float32: written
    scale_ptr    0-d float32: the gradient that each row's loss receives
    """
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * n_columns
    target = tl.load(targets_ptr + row)
    if target == ignore_index:
        tl.store(losses_ptr + row, 0.0)
        write_zeros(row_ptr, n_columns, LANES, COLUMNS)
    else:
        column, z_target = target_column(row_ptr, target, vocab_size)
        tl.debug_barrier()  # every thread has read z_target before one overwrites it
        # so the sum leaves it out without asking at each column
        tl.store(row_ptr + column, float("-inf"), mask=column >= 0)
        tl.debug_barrier()
        m, s = row_sums(row_ptr, None, z_target, n_columns, vocab_size, LANES, COLUMNS)
        tl.store(losses_ptr + row, row_loss(m, s, z_target))
        scale = tl.load(scale_ptr)
        write_gradient(
            row_ptr, z_target, m, s, column, scale, n_columns, vocab_size, LANES, COLUMNS
        )


# ---------------------------------------------------------------------------------- launchers


def blocks(logits: Tensor) -> dict[str, int]:
    """LANES, COLUMNS and warps for a row of logits (N, Vp).

    A long row gets one large program, so that few rows are processed at a time and the second pass
    finds its row in cache: two programs on each of 132 multiprocessors read 26 MB of 50,304 bf16.
    """
    columns = BYTES_A_LANE // logits.element_size()
    lanes = next_power_of_two(cdiv(logits.shape[1], columns))
    of_warp = lanes_of_warp(logits.device)
    most = min(MAX_WARPS * 2 // logits.element_size(), MOST_THREADS // of_warp)
    warps = min(most, max(1, lanes // (of_warp * LANES_A_THREAD)))
    return {
        "LANES": min(lanes, of_warp * LANES_A_THREAD * warps),
        "COLUMNS": columns,
        "num_warps": warps,
    }


def check_logits(logits: Tensor, targets: Tensor, vocab_size: int) -> tuple[int, int]:
    """(N, Vp) of the logits; refuses logits and targets that kernels cannot process."""
    check_tensor("logits", logits, shape=(None, None))
    N, Vp = logits.shape
    check_tensor("targets", targets, shape=(N,), dtype=torch.int64, device=logits.device)
    check_vocab_size(vocab_size, Vp)
    return N, Vp


def check_vocab_size(vocab_size: int, padded: int) -> None:
    """Refuse a vocabulary that is empty or does not fit into its padded columns."""
    if not 1 <= vocab_size <= padded:
        refuse("vocab_size", vocab_size, f"1 to {padded}, the number of columns")


def check_scale(scale: Tensor, device: torch.device) -> None:
    """Refuse a scale that is not a float32 number on the device."""
    check_tensor("scale", scale, shape=(), dtype=torch.float32, device=device)


def cross_entropy_forward(
    logits: Tensor, targets: Tensor, vocab_size: int, ignore_index: int = IGNORE_INDEX
) -> tuple[Tensor, Tensor]:
    """The loss of each row; the logits stay unchanged.

    logits (N, Vp) float32, float16 or bfloat16, targets (N,) int64.
    Returns losses (N,) and normalizer (N, 2), float32: see `reference.cross_entropy_forward`.
    Raises ValueError for another dtype, shape, stride or device.
    """
    N, Vp = check_logits(logits, targets, vocab_size)
    losses = torch.empty(N, dtype=torch.float32, device=logits.device)
    normalizer = losses.new_empty(N, 2)
    launch(
        cross_entropy_forward_kernel,
        (N,),
        logits,
        targets,
        losses,
        normalizer,
        Vp,
        vocab_size,
        ignore_index,
        **blocks(logits),
    )
    return losses, normalizer


def cross_entropy_backward(
    logits: Tensor,
    targets: Tensor,
    normalizer: Tensor,
    scale: Tensor,
    vocab_size: int,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """dlogits (N, Vp), which overwrites the logits.

    normalizer (N, 2) float32: the forward's; scale 0-d float32.
    """
    N, Vp = check_logits(logits, targets, vocab_size)
    check_tensor("normalizer", normalizer, shape=(N, 2), dtype=torch.float32, device=logits.device)
    check_scale(scale, logits.device)
    launch(
        cross_entropy_backward_kernel,
        (N,),
        logits,
        targets,
        normalizer,
        scale,
        Vp,
        vocab_size,
        ignore_index,
        **blocks(logits),
    )
    return logits


def cross_entropy_forward_backward(
    logits: Tensor,
    targets: Tensor,
    scale: Tensor,
    vocab_size: int,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Both in one kernel: returns losses (N,) float32; dlogits overwrites the logits."""
    N, Vp = check_logits(logits, targets, vocab_size)
    check_scale(scale, logits.device)
    losses = torch.empty(N, dtype=torch.float32, device=logits.device)
    launch(
        cross_entropy_forward_backward_kernel,
        (N,),
        logits,
        targets,
        losses,
        scale,
        Vp,
        vocab_size,
        ignore_index,
        **blocks(logits),
    )
    return losses


# --------------------------------------------------------- output projection + cross-entropy


def chunk_rows_within(n_rows: int, row_bytes: int, workspace_bytes: int = WORKSPACE_BYTES) -> int:
    """Rows per chunk, if n_rows of logits are cut into nearly equal chunks that each fit into
    workspace_bytes: n_rows if all rows fit, else a multiple of CHUNK_ROW_MULTIPLE."""
    if n_rows * row_bytes <= workspace_bytes:
        return max(1, n_rows)
    most = max(1, workspace_bytes // row_bytes // CHUNK_ROW_MULTIPLE)  # in multiples
    multiples = cdiv(n_rows, CHUNK_ROW_MULTIPLE)
    return cdiv(multiples, cdiv(multiples, most)) * CHUNK_ROW_MULTIPLE


def check_projection(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> None:
    """Refuse arguments of `linear_cross_entropy_*` that do not fit together."""
    check_tensor("x", x, shape=(None, None))
    N, C = x.shape
    check_tensor("weight", weight, shape=(None, C), dtype=x.dtype, device=x.device)
    check_tensor("targets", targets, shape=(N,), dtype=torch.int64, device=x.device)
    check_vocab_size(vocab_size, weight.shape[0])


def projected_chunks(
    x: Tensor, weight: Tensor, chunk_rows: int | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Each chunk of rows with its logits x Wᵀ, in one workspace that the next chunk overwrites."""
    N, Vp = x.shape[0], weight.shape[0]
    size = chunk_rows or chunk_rows_within(N, Vp * x.element_size())
    workspace = x.new_empty(min(N, size), Vp)
    for rows in row_chunks(N, size):
        yield rows, torch.mm(x[rows], weight.t(), out=workspace[: rows.stop - rows.start])


def linear_cross_entropy_forward(
    x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int
) -> Tensor:
    """The loss of each row of x for logits = x Wᵀ; for evaluation.

    x (N, C), weight (Vp, C) of one dtype, targets (N,) int64. Returns losses (N,) float32.
    Raises ValueError for another dtype, shape, stride or device.
    """
    check_projection(x, weight, targets, vocab_size)
    losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
    for rows, logits in projected_chunks(x, weight):
        launch(
            cross_entropy_forward_kernel,
            (len(logits),),
            logits,
            targets[rows],
            losses[rows],
            None,
            logits.shape[1],
            vocab_size,
            IGNORE_INDEX,
            **blocks(logits),
        )
    return losses


def linear_cross_entropy_forward_backward(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: Tensor,
    dweight: Tensor,
    vocab_size: int,
    accumulate: bool = True,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss and gradients of the output projection, chunk_rows rows at a time.

    x (N, C), weight (Vp, C) of one dtype, targets (N,) int64, scale 0-d float32; adds to
    dweight (Vp, C) float32, or overwrites it without `accumulate`. chunk_rows: None for what fits
    into WORKSPACE_BYTES. The gradient's last bits depend on it.
    Returns scale · Σ losses (0-d float32) and dx (N, C). An ignored row counts for nothing,
    whatever x holds there. dx begins as x without those rows; each chunk overwrites what it used.
    Raises ValueError for another dtype, shape, stride or device.
    """
    check_projection(x, weight, targets, vocab_size)
    check_scale(scale, x.device)
    check_tensor("dweight", dweight, shape=weight.shape, dtype=torch.float32, device=x.device)
    losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
    dx = torch.where((targets == IGNORE_INDEX)[:, None], 0, x)
    for rows, logits in projected_chunks(dx, weight, chunk_rows):
        launch(
            cross_entropy_forward_backward_kernel,
            (len(logits),),
            logits,
            targets[rows],
            losses[rows],
            scale,
            logits.shape[1],
            vocab_size,
            IGNORE_INDEX,
            **blocks(logits),
        )
        dlogits = logits
        weight_gradient(dlogits, dx[rows], dweight, accumulate)
        torch.mm(dlogits, weight, out=dx[rows])
        accumulate = True
    if not accumulate:  # there was no row
        dweight.zero_()
    return losses.sum() * scale, dx
