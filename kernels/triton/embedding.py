"""Token and position embedding, and its backward without atomics.

    forward     x[b, t] = token_table[tokens[b, t]] + position_table[t]

    backward    dtoken_table[v]    += Σ_{(b,t): tokens[b,t] = v} dx[b, t]
                dposition_table[t] += Σ_b dx[b, t]

Where positions are not learned, both lose their second part.

Many positions hold the same token, so their gradients are summed in one row of the table. Instead
of atomics, whose order changes from run to run, the positions are sorted by token: the positions of
one token then form a *run*. The sorted positions are cut into chunks of CHUNK, and a run that
crosses chunk boundaries into *pieces*:

    1. A program per piece sums its rows of dx. A run of one piece is added to the table directly;
       the pieces of a longer run are written to a buffer of partial sums, at most two per chunk:
       the piece that continues from the left ("head") and the one that continues to the right
       ("tail").
    2. A program per chunk: if a run of several pieces starts there, it sums the pieces in order and
       adds them to the table.

Every row of the table has one writer, and every order is fixed: the same bits in every run. Nothing
waits for the host, so the whole backward can be captured. A frequent token takes no more time than
rare ones, because many programs sum its run.

The position gradient is the column sum of dx as a (B, T·C) matrix.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from mantrans.kernels.triton.bias_gradient import add_column_sums
from mantrans.kernels.triton.launch import (
    cdiv,
    check_tensor,
    launch,
    next_power_of_two,
    refuse,
)
from mantrans.kernels.triton.partials import compensated

CHUNK = 32  # sorted positions per chunk: the longest sum of one program
ROWS_AT_ONCE = 8  # loads in flight per lane
FORWARD_ROWS = 4
MAX_BLOCK_COLUMNS = 1024
COLUMNS_A_WARP = 256  # 32 lanes of 8 bf16, 16 bytes each


@triton.jit(do_not_specialize=["n_rows", "sequence_length"])
def embedding_forward_kernel(
    tokens_ptr,
    token_table_ptr,
    position_table_ptr,
    x_ptr,
    n_rows,
    sequence_length,
    n_tokens,
    n_columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Program (r, c) computes one tile of x.

    tokens_ptr          (n_rows,) int64, n_rows = B·T
    token_table_ptr     (n_tokens, n_columns) any float
    position_table_ptr  (at least sequence_length, n_columns) like the token table; or None
    x_ptr               (n_rows, n_columns) like the tables: written; NaN for a token outside the
                        table
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_rows = rows < n_rows
    in_columns = (columns < n_columns)[None, :]
    mask = in_rows[:, None] & in_columns
    tokens = tl.load(tokens_ptr + rows, mask=in_rows, other=0)
    exists = (tokens >= 0) & (tokens < n_tokens)
    token_ptrs = token_table_ptr + tokens[:, None] * n_columns + columns[None, :]
    x = tl.load(token_ptrs, mask=mask & exists[:, None], other=float("nan")).to(tl.float32)
    if position_table_ptr is not None:
        first = tl.program_id(0).to(tl.int64) * BLOCK_ROWS % sequence_length  # one 64-bit remainder
        place = (first.to(tl.int32) + tl.arange(0, BLOCK_ROWS)) % sequence_length
        position_offsets = place.to(tl.int64)[:, None] * n_columns + columns[None, :]
        position = tl.load(position_table_ptr + position_offsets, mask=mask, other=0.0)
        x += position.to(tl.float32)
    x_offsets = rows[:, None] * n_columns + columns[None, :]
    tl.store(x_ptr + x_offsets, x.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def token_at(sorted_ptr, i, n):
    """The i-th of n sorted tokens, -1 before the first and after the last."""
    return tl.load(sorted_ptr + i, mask=(i >= 0) & (i < n), other=-1)


@triton.jit
def add_to_row(table_ptr, token, sums, columns, n_columns):
    """table[token] += sums, for one block of columns; this program is the row's only writer."""
    row_ptrs = table_ptr + token.to(tl.int64) * n_columns + columns
    in_columns = columns < n_columns
    row = tl.load(row_ptrs, mask=in_columns, other=0.0)
    tl.store(row_ptrs, row + sums, mask=in_columns)


@triton.jit(do_not_specialize=["n"])
def sum_pieces_kernel(
    dx_ptr,
    sorted_ptr,
    order_ptr,
    dtable_ptr,
    partials_ptr,
    n,
    n_tokens,
    n_columns,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Program (i, c) sums the piece that begins at sorted position i, if one does.

    dx_ptr        (n, n_columns) any float, n = B·T
    sorted_ptr    (n,) int32: the tokens in ascending order
    order_ptr     (n,) int64: the position of each of them in the batch
    dtable_ptr    (n_tokens, n_columns) float32: whole runs are added
    partials_ptr  (chunks, 2, n_columns) float32: pieces of longer runs, head and tail, are written
    """
    i = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    token = token_at(sorted_ptr, i, n)
    starts_run = token_at(sorted_ptr, i - 1, n) != token
    exists = (token >= 0) & (token < n_tokens)
    if (starts_run | (i % CHUNK == 0)) & exists:
        chunk = i // CHUNK
        next_chunk = (chunk + 1) * CHUNK
        ahead = i + tl.arange(0, CHUNK)
        in_piece = (ahead < next_chunk) & (token_at(sorted_ptr, ahead, n) == token)
        end = i + tl.sum(in_piece.to(tl.int32), 0)

        sums = tl.zeros((BLOCK_COLUMNS,), tl.float32)
        for first in range(i, end, ROWS):
            place = first + tl.arange(0, ROWS)
            row = tl.load(order_ptr + place, mask=place < end, other=0)
            mask = (place < end)[:, None] & (columns < n_columns)[None, :]
            offsets = row[:, None] * n_columns + columns[None, :]
            sums += tl.sum(tl.load(dx_ptr + offsets, mask=mask, other=0.0).to(tl.float32), 0)

        ends_run = token_at(sorted_ptr, next_chunk, n) != token
        if starts_run & ends_run:
            add_to_row(dtable_ptr, token, sums, columns, n_columns)
        else:
            # the first piece of a run is the tail of its chunk, any other piece the head
            slot = chunk * 2 + starts_run.to(tl.int64)
            tl.store(partials_ptr + slot * n_columns + columns, sums, mask=columns < n_columns)


@triton.jit(do_not_specialize=["n"])
def join_pieces_kernel(
    sorted_ptr,
    dtable_ptr,
    partials_ptr,
    n,
    n_tokens,
    n_columns,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Program (k, c) sums the run that starts in chunk k and continues after it, if there is one.

    sorted_ptr    (n,) int32: the tokens in ascending order
    dtable_ptr    (n_tokens, n_columns) float32: added to
    partials_ptr  (chunks, 2, n_columns) float32: heads and tails from `sum_pieces_kernel`
    """
    chunk = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_columns = columns < n_columns
    begin = chunk * CHUNK
    next_chunk = begin + CHUNK
    token = token_at(sorted_ptr, next_chunk - 1, n)
    goes_on = token_at(sorted_ptr, next_chunk, n) == token
    starts_here = token_at(sorted_ptr, begin - 1, n) != token
    exists = (token >= 0) & (token < n_tokens)
    if starts_here & goes_on & exists:
        tail_ptrs = partials_ptr + (chunk * 2 + 1) * n_columns + columns
        sums = tl.load(tail_ptrs, mask=in_columns, other=0.0)
        lost = tl.zeros_like(sums)
        first = chunk + 1
        more = goes_on
        while more:
            chunks = first + tl.arange(0, ROWS)
            in_run = token_at(sorted_ptr, chunks * CHUNK, n) == token
            offsets = chunks[:, None] * 2 * n_columns + columns[None, :]
            mask = in_run[:, None] & in_columns[None, :]
            pieces = tl.load(partials_ptr + offsets, mask=mask, other=0.0)
            sums, lost = compensated(sums, lost, tl.sum(pieces, 0))
            first += ROWS
            more = token_at(sorted_ptr, first * CHUNK, n) == token
        add_to_row(dtable_ptr, token, sums, columns, n_columns)


# ---------------------------------------------------------------------------------- launchers


def columns_and_warps(n_columns: int) -> dict[str, int]:
    """BLOCK_COLUMNS and warps for rows of n_columns; the warps are side by side."""
    block = min(MAX_BLOCK_COLUMNS, next_power_of_two(n_columns))
    return {"BLOCK_COLUMNS": block, "num_warps": max(1, block // COLUMNS_A_WARP)}


def check_tokens(
    tokens: Tensor, device: torch.device, position_table: Tensor | None
) -> tuple[int, int]:
    """(B, T) of int64 tokens; refuses a T above the length of a position table."""
    check_tensor("tokens", tokens, shape=(None, None), dtype=torch.int64, device=device)
    B, T = tokens.shape
    if position_table is not None and len(position_table) < T:
        n_positions = len(position_table)
        refuse(
            "tokens", f"shape {(B, T)}", f"at most {n_positions} columns, as there are positions"
        )
    return B, T


def embedding_forward(
    tokens: Tensor, token_table: Tensor, position_table: Tensor | None = None
) -> Tensor:
    """x[b, t] = token_table[tokens[b, t]] + position_table[t].

    tokens (B, T) int64; token_table (Vp, C), position_table (T_max, C) or None, of one dtype:
    float32, float16 or bfloat16. Returns x (B, T, C), NaN for a token outside the table.
    Raises ValueError for another dtype, shape, stride or device.
    """
    check_tensor("token_table", token_table, shape=(None, None))
    Vp, C = token_table.shape
    dtype, device = token_table.dtype, token_table.device
    if position_table is not None:
        check_tensor("position_table", position_table, shape=(None, C), dtype=dtype, device=device)
    B, T = check_tokens(tokens, device, position_table)
    x = token_table.new_empty(B, T, C)
    shape = columns_and_warps(C)
    launch(
        embedding_forward_kernel,
        (cdiv(B * T, FORWARD_ROWS), cdiv(C, shape["BLOCK_COLUMNS"])),
        tokens,
        token_table,
        position_table,
        x,
        B * T,
        T,
        Vp,
        C,
        BLOCK_ROWS=FORWARD_ROWS,
        **shape,
    )
    return x


def embedding_backward(
    dx: Tensor, tokens: Tensor, dtoken_table: Tensor, dposition_table: Tensor | None = None
) -> None:
    """Add dx to the rows of both tables that the forward read.

    dx (B, T, C) float32, float16 or bfloat16; tokens (B, T) int64; dtoken_table (Vp, C) and
    dposition_table (T_max, C), or None, float32. Raises ValueError for another dtype, shape, stride
    or device. Tokens outside the table are ignored.
    """
    check_tensor("dx", dx, shape=(None, None, None))
    C = dx.shape[-1]
    check_table = partial(check_tensor, shape=(None, C), dtype=torch.float32, device=dx.device)
    check_table("dtoken_table", dtoken_table)
    if dposition_table is not None:
        check_table("dposition_table", dposition_table)
    B, T = check_tokens(tokens, dx.device, dposition_table)
    check_tensor("dx", dx, shape=(B, T, C))
    if dx.numel() == 0:
        return
    add_token_gradients(dx.view(-1, C), tokens.view(-1), dtoken_table)
    if dposition_table is not None:
        add_column_sums(dx.view(B, T * C), dposition_table[:T].view(-1))


def add_token_gradients(dx: Tensor, tokens: Tensor, dtable: Tensor) -> None:
    """dtable[v] += Σ dx[n] over the n with tokens[n] = v.

    dx (N, C), tokens (N,), dtable (Vp, C).
    """
    N, C = dx.shape
    # int32 keys halve the passes of the radix sort; a token outside the table must not wrap into it
    keys = tokens.clamp(-1, len(dtable)).to(torch.int32)
    in_order, order = torch.sort(keys, stable=True)
    n_chunks = cdiv(N, CHUNK)
    partials = dtable.new_empty(n_chunks, 2, C)
    shape = columns_and_warps(C)
    column_blocks = cdiv(C, shape["BLOCK_COLUMNS"])
    lengths = (N, len(dtable), C)
    launch(
        sum_pieces_kernel,
        (N, column_blocks),
        dx,
        in_order,
        order,
        dtable,
        partials,
        *lengths,
        CHUNK=CHUNK,
        ROWS=ROWS_AT_ONCE,
        **shape,
    )
    launch(
        join_pieces_kernel,
        (n_chunks, column_blocks),
        in_order,
        dtable,
        partials,
        *lengths,
        CHUNK=CHUNK,
        ROWS=ROWS_AT_ONCE,
        **shape,
    )
