"""Embedding forward and its sorted, atomic-free backward against the reference."""

from __future__ import annotations

import pytest
import torch

from mantrans.kernels import reference
from mantrans.kernels.triton import embedding
from tests.kernels.common import (
    DTYPES,
    SUM_TOLERANCE,
    each_backend,
    each_dtype,
    generator,
    normal,
    random_gradients,
)
from tests.support.compare import assert_close

CHUNK = embedding.CHUNK

# (B, T, C, V): one element; odd everything; every token the same, over many chunks; few tokens,
# whose runs cross chunks at any place; mostly distinct tokens; columns over one block.
SHAPES = [
    (1, 1, 1, 1),
    (2, 5, 3, 4),
    (2, 70, 16, 1),
    (3, 40, 20, 7),
    (2, 20, 64, 500),
    (1, 10, 1030, 6),
]

each_shape = pytest.mark.parametrize("B, T, C, V", SHAPES, ids=str)


@each_dtype
@each_shape
def test_embedding_forward(B, T, C, V, dtype):
    source = generator(B, T, C, V)
    tokens = torch.randint(0, V, (B, T), generator=source)
    token_table, position_table = (normal(source, n, C, dtype=dtype) for n in (V + 3, T + 2))
    actual = embedding.embedding_forward(tokens, token_table, position_table)
    # one addition and one rounding: the same bits
    assert torch.equal(actual, reference.embedding_forward(tokens, token_table, position_table))


@each_dtype
@each_shape
def test_embedding_backward(B, T, C, V, dtype):
    source = generator(B, T, C, V, 1)
    tokens = torch.randint(0, V, (B, T), generator=source)
    check_backward(normal(source, B, T, C, dtype=dtype), tokens, V + 3)


# Lengths of the runs of equal tokens, in sorted order: where they begin and end among the chunks.
RUNS = {
    "a chunk": [CHUNK, 5],
    "chunk after chunk": [CHUNK, CHUNK, CHUNK],
    "ends a chunk": [7, CHUNK - 7, 3],
    "crosses once": [7, CHUNK, 9],
    "begins a chunk and crosses": [CHUNK, CHUNK + 1, 4],
    "longer than what is joined at once": [5, CHUNK * (embedding.ROWS_AT_ONCE + 3), 2],
    "two long ones in a row": [3, 2 * CHUNK, 2 * CHUNK, 6],
    "all different": [1] * (CHUNK + 3),
    "to the very end": [2, 3 * CHUNK - 2],
}


@pytest.mark.parametrize("lengths", RUNS.values(), ids=RUNS.keys())
def test_embedding_backward_runs(lengths):
    source = generator(*lengths)
    tokens = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    tokens = tokens[torch.randperm(len(tokens), generator=source)]
    check_backward(normal(source, 1, len(tokens), 8), tokens[None], len(lengths) + 1)


def check_backward(dx, tokens, n_tokens):
    """Both gradients, accumulated into what the buffers held."""
    T, C = dx.shape[1:]
    source = generator(T, C)
    actual = random_gradients(source, (n_tokens, C), (T + 2, C))
    expected = [gradient.clone() for gradient in actual]
    embedding.embedding_backward(dx, tokens, *actual)
    reference.embedding_backward(dx, tokens, *expected)
    assert_close(actual[0], expected[0], SUM_TOLERANCE, "dtoken_table")
    assert_close(actual[1], expected[1], SUM_TOLERANCE, "dposition_table")


@each_backend
@pytest.mark.parametrize("B, T, C, V", SHAPES[2:5], ids=str)
def test_embedding_without_positions(ops, dtype, B, T, C, V):
    """The rows themselves, and the same gradient as beside positions."""
    source = generator(B, T, C, V, 2)
    tokens = torch.randint(0, V, (B, T), generator=source)
    table, dx = normal(source, V + 3, C, dtype=dtype), normal(source, B, T, C, dtype=dtype)
    assert torch.equal(ops.embedding_forward(tokens, table), table[tokens])
    wide = reference.wide_dtype(dtype)
    alone, beside = (torch.ones(V + 3, C, dtype=wide) for _ in range(2))
    ops.embedding_backward(dx, tokens, alone)
    ops.embedding_backward(dx, tokens, beside, torch.zeros(T, C, dtype=wide))
    assert torch.equal(alone, beside)
    expected = torch.ones(V + 3, C, dtype=torch.float64)
    expected.index_add_(0, tokens.flatten(), dx.flatten(0, 1).double())
    assert_close(alone, expected, SUM_TOLERANCE)


def test_embedding_backward_order():
    """Numbers of very different size, where another order of summation gives other bits."""
    source = generator(3)
    tokens = torch.randint(0, 3, (2, 60), generator=source)
    dx = normal(source, 2, 60, 8) * 10 ** (8 * torch.rand(2, 60, 1, generator=source))
    results = []
    for _ in range(2):
        table, positions = torch.zeros(3, 8), torch.zeros(60, 8)
        embedding.embedding_backward(dx, tokens, table, positions)
        results.append((table, positions))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("bad", [5, -1, -7])
def test_embedding_token_missing(bad):
    """It reads NaN, which the loss shows; and its gradient is written nowhere."""
    tokens = torch.tensor([[0, bad, 4, bad]])
    x = embedding.embedding_forward(tokens, torch.ones(5, 8), torch.ones(4, 8))
    assert x.isnan().all(-1).tolist() == [[False, True, False, True]]
    table, positions = torch.zeros(5, 8), torch.zeros(4, 8)
    embedding.embedding_backward(torch.ones(1, 4, 8), tokens, table, positions)
    assert table.sum(1).tolist() == [8, 0, 0, 0, 8]


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_no_tokens(dtype):
    tokens = torch.empty(0, 4).long()
    x = embedding.embedding_forward(tokens, torch.ones(5, 8).to(dtype), torch.ones(4, 8).to(dtype))
    table = torch.ones(5, 8)
    embedding.embedding_backward(x, tokens, table, torch.ones(4, 8))
    assert x.shape == (0, 4, 8)
    assert torch.equal(table, torch.ones(5, 8))


def test_embedding_refuses():
    tokens, table, positions = torch.zeros(2, 3).long(), torch.ones(5, 8), torch.ones(4, 8)
    forward, backward = embedding.embedding_forward, embedding.embedding_backward
    with pytest.raises(ValueError, match="tokens: expected dtype int64, got int32"):
        forward(tokens.int(), table, positions)
    with pytest.raises(ValueError, match=r"token_table: expected dtype float32.*, got float64"):
        forward(tokens, table.double(), positions)
    with pytest.raises(ValueError, match=r"position_table: expected dtype float32.*, got bfloat16"):
        forward(tokens, table, positions.bfloat16())
    with pytest.raises(
        ValueError, match=r"tokens: expected at most 4 columns.*, got shape \(1, 5\)"
    ):
        forward(torch.zeros(1, 5).long(), table, positions)
    with pytest.raises(ValueError, match=r"dtoken_table: expected dtype float32.*, got float16"):
        backward(torch.ones(2, 3, 8), tokens, table.half(), positions)
    with pytest.raises(ValueError, match=r"dx: expected shape \(2, 3, 8\), got \(2, 2, 8\)"):
        backward(torch.ones(2, 2, 8), tokens, table, positions)
