"""Sums of many rows keep their digits: gradients of embeddings and biases, partial sums."""

from __future__ import annotations

import pytest
import torch

from mantrans.kernels import native, reference, triton
from mantrans.kernels.triton import embedding as kernels
from tests.kernels.common import each_ops, relative


@each_ops
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [0.1, 0.7])
def test_embedding_backward_frequent_token(ops, dtype, value):
    """One token nearly everywhere, and one position table row for all sequences."""
    B, T = (512, 128) if ops is not triton else (16, 16)
    tokens = torch.full((B, T), 3)
    tokens[::5, 7] = 1
    dx = torch.full((B, T, 8), value).to(dtype)
    dtokens, dpositions = torch.zeros(6, 8), torch.zeros(T, 8)
    ops.embedding_backward(dx, tokens, dtokens, dpositions)
    exact = float(dx[0, 0, 0])
    counts = torch.bincount(tokens.flatten(), minlength=6)[:, None]
    occurs = counts[:, 0] > 0
    assert relative(dtokens[occurs], (counts * exact).expand(6, 8)[occurs]) < 5e-7
    assert not dtokens[~occurs].any()
    assert relative(dpositions, B * exact) < 5e-7


@pytest.mark.parametrize("ops", [reference, native], ids=["reference", "native"])
def test_embedding_backward_frequent_token_float64(ops):
    dtokens, dpositions = torch.zeros(3, 4).double(), torch.zeros(64, 4).double()
    tokens = torch.ones(256, 64).long()
    ops.embedding_backward(
        torch.full((256, 64, 4), 0.1, dtype=torch.float64), tokens, dtokens, dpositions
    )
    assert relative(dtokens[1], 256 * 64 * 0.1) < 1e-11


def test_embedding_backward_joined_pieces():
    """2^16 rows of one token: too many for the interpreter, but not their pieces of 32 rows."""
    n = 2**16
    chunks = n // kernels.CHUNK
    piece = torch.tensor(0.1) * kernels.CHUNK
    partials = piece.expand(chunks, 2, 4).contiguous()
    dtable = torch.zeros(2, 4)
    kernels.join_pieces_kernel[(1, 1)](
        torch.ones(n, dtype=torch.int32), dtable, partials, n, 2, 4,
        CHUNK=kernels.CHUNK, ROWS=kernels.ROWS_AT_ONCE, BLOCK_COLUMNS=4,
    )  # fmt: skip
    assert relative(dtable[1], float(piece) * chunks) < 3e-7


@each_ops
@pytest.mark.parametrize("value", [0.1, 0.7])
def test_bias_gradient_many_rows(ops, value):
    """The third run adds to what is there."""
    rows = 2**20 if ops is not triton else 2**10
    dy = torch.full((rows, 4), value)
    dbias = torch.zeros(4)
    for _ in range(3):
        ops.bias_gradient(dy, dbias)
    assert relative(dbias, 3 * rows * float(dy[0, 0])) < 1e-6


@each_ops
def test_partial_sums_many_rows(ops):
    """As many as an H100 has programs at a time. The interpreter adds one after the other where a
    GPU adds in a tree."""
    partials, total = torch.full((528, 5), 0.1), torch.ones(5)
    exact = 1 + 528 * float(partials[0, 0])
    ops.sum_partials(partials, total)
    assert relative(total, exact) < (2e-6 if ops is triton else 5e-7) and not partials.any()
