"""LayerNorm's kernels against the reference: every mask, tile shape and optional argument."""

from __future__ import annotations

import pytest
import torch

from mantrans.kernels import reference
from mantrans.kernels.triton import layer_norm
from mantrans.kernels.triton.bias_gradient import bias_gradient
from tests.kernels.common import (
    SUM_TOLERANCE,
    TOLERANCE,
    each_dtype,
    generator,
    in_partials,
    normal,
    random_gradients,
)
from tests.support.compare import assert_close

EPS = 1e-5

# (N, C): one row; a row narrower than a lane's load, of odd width; the last tile of rows not full
# and C a power of two; GPT-2's width, 3/4 of its block; several tiles for each of the two programs
# of the backward, the last one short; the most warps; N odd, C just over a block.
SHAPES = [(1, 8), (3, 7), (37, 64), (9, 768), (150, 96), (2, 2100), (13, 257)]
# With one column x̂ is 0 whatever x: nothing to compare relatively, so it is tested on its own.

each_shape = pytest.mark.parametrize("N, C", SHAPES, ids=str)


@each_dtype
@each_shape
@pytest.mark.parametrize("with_bias", [True, False])
def test_layer_norm_forward(N, C, dtype, with_bias):
    source = generator(N, C)
    x = normal(source, N, C, dtype=dtype) + 3
    weight = normal(source, C, dtype=dtype)
    bias = normal(source, C, dtype=dtype) if with_bias else None
    actual = layer_norm.layer_norm_forward(x, weight, bias, EPS)
    expected = reference.layer_norm_forward(x, weight, bias, EPS)
    assert_close(actual[0], expected[0], TOLERANCE[dtype], "y")
    assert_close(actual[1], expected[1], SUM_TOLERANCE, "mean")
    assert_close(actual[2], expected[2], SUM_TOLERANCE, "rstd")


@each_dtype
@each_shape
def test_add_layer_norm_forward(N, C, dtype):
    source = generator(N, C, 1)
    branch, residual = (normal(source, N, C, dtype=dtype) + i for i in (0, 3))
    weight, bias = (normal(source, C, dtype=dtype) for _ in range(2))
    actual = layer_norm.add_layer_norm_forward(branch, residual, weight, bias, EPS)
    expected = reference.add_layer_norm_forward(branch, residual, weight, bias, EPS)
    assert torch.equal(actual[1], expected[1])  # one addition, one rounding: the same bits
    assert_close(actual[0], expected[0], TOLERANCE[dtype], "y")
    assert_close(actual[2], expected[2], SUM_TOLERANCE, "mean")
    assert_close(actual[3], expected[3], SUM_TOLERANCE, "rstd")


@each_dtype
@each_shape
@pytest.mark.parametrize(("complete", "in_parts"), [(True, True), (True, False), (False, False)])
def test_layer_norm_backward(N, C, dtype, complete, in_parts):
    """complete: with biases and what by-passed the norm. in_parts: sums go to rows of a buffer."""
    source = generator(N, C, 2)
    dy, x, dresidual = (normal(source, N, C, dtype=dtype) for _ in range(3))
    weight = normal(source, C, dtype=dtype)
    _, mean, rstd = reference.layer_norm_forward(x, weight, None, EPS)
    dresidual = dresidual if complete else None
    vectors = random_gradients(source, (C,), (C,), (C,))
    expected_vectors = [vector.clone() for vector in vectors]
    initial = vectors[2].clone()

    def backward(ops, vectors):
        dweight, dbias, dbranch_bias = vectors if complete else (vectors[0], None, None)
        return ops.layer_norm_backward(
            dy, x, weight, mean, rstd, dweight, dbias, dresidual, dbranch_bias
        )

    if in_parts:
        dx = in_partials(lambda rows: backward(layer_norm, rows), vectors)
    else:
        dx = backward(layer_norm, vectors)
    assert_close(dx, backward(reference, expected_vectors), TOLERANCE[dtype], "dx")
    if complete:  # of the rounded dx, which is not the reference's to the last bit
        expected_vectors[2] = initial + dx.float().sum(0)
    for name, actual, expected in zip(
        ("dweight", "dbias", "dbranch_bias"), vectors, expected_vectors, strict=True
    ):
        assert_close(actual, expected, SUM_TOLERANCE, name)


def test_layer_norm_one_column():
    """x̂ = 0: y is the bias, and neither x nor γ has a gradient."""
    x, dy = torch.tensor([[3.0], [-2.0], [0.5]]), torch.ones(3, 1)
    weight, bias = torch.tensor([2.0]), torch.tensor([0.25])
    y, mean, rstd = layer_norm.layer_norm_forward(x, weight, bias, EPS)
    assert torch.equal(y, torch.full((3, 1), 0.25))
    assert torch.equal(mean, x[:, 0].double())
    dweight, dbias = torch.ones(1), torch.ones(1)
    dx = layer_norm.layer_norm_backward(dy, x, weight, mean, rstd, dweight, dbias)
    assert torch.equal(dx, torch.zeros(3, 1))
    assert dweight.item() == 1
    assert dbias.item() == 4


def test_layer_norm_widest_row():
    """A tile of one row, every lane full."""
    source = generator(6)
    x, dy = normal(source, 3, 8192), normal(source, 3, 8192)
    weight = normal(source, 8192)
    y, mean, rstd = layer_norm.layer_norm_forward(x, weight, None, EPS)
    assert_close(y, reference.layer_norm_forward(x, weight, None, EPS)[0], SUM_TOLERANCE)
    dweight, expected_dweight = torch.zeros(8192), torch.zeros(8192)
    dx = layer_norm.layer_norm_backward(dy, x, weight, mean, rstd, dweight)
    expected = reference.layer_norm_backward(dy, x, weight, mean, rstd, expected_dweight)
    assert_close(dx, expected, SUM_TOLERANCE)
    assert_close(dweight, expected_dweight, SUM_TOLERANCE)


def test_layer_norm_no_rows():
    weight, gradient = torch.ones(8), torch.ones(8)
    y, mean, rstd = layer_norm.layer_norm_forward(torch.empty(0, 8), weight, None, EPS)
    dx = layer_norm.layer_norm_backward(y, y, weight, mean, rstd, gradient, gradient.clone())
    assert dx.shape == (0, 8)
    assert torch.equal(gradient, torch.ones(8))


def test_layer_norm_leading_axes():
    x = normal(generator(5), 2, 3, 16)
    y, mean, _ = layer_norm.layer_norm_forward(x, torch.ones(16), None, EPS)
    assert y.shape == (2, 3, 16)
    assert mean.shape == (6,)
    assert_close(y, reference.layer_norm_forward(x, torch.ones(16), None, EPS)[0], SUM_TOLERANCE)


@each_dtype
@pytest.mark.parametrize(
    "N, M",
    # one row; one column; a sum by one program; by partial sums; columns over a block, not whole
    [(1, 5), (40, 1), (40, 300), (200, 64), (130, 257)],
    ids=str,
)
@pytest.mark.parametrize("in_parts", [True, False])
def test_bias_gradient(N, M, dtype, in_parts):
    source = generator(N, M)
    dy = (
        normal(source, N, M, dtype=dtype) + 1
    )  # sums that do not cancel: a relative error has sense
    (dbias,) = random_gradients(source, (M,))
    expected = dbias.clone()
    if in_parts:
        in_partials(lambda rows: bias_gradient(dy, rows[0]), [dbias])
    else:
        bias_gradient(dy, dbias)
    reference.bias_gradient(dy, expected)
    assert_close(dbias, expected, SUM_TOLERANCE)


BAD_FORWARD = {
    "dtype": (torch.zeros(2, 4).double(), "x: expected dtype float32.*, got float64"),
    "width": (torch.zeros(2, 8193), "x: expected a last axis of 1 to 8192, got "),
    "stride": (torch.zeros(4, 2).t(), "x: expected a contiguous tensor, got strides"),
    "weight": (torch.zeros(2, 5), r"weight: expected shape \(5\), got \(4,\)"),
}


@pytest.mark.parametrize("x, message", BAD_FORWARD.values(), ids=BAD_FORWARD.keys())
def test_layer_norm_forward_refuses(x, message):
    with pytest.raises(ValueError, match=message):
        layer_norm.layer_norm_forward(x, torch.ones(4), None, EPS)


def test_layer_norm_backward_refuses():
    """A gradient of low precision."""
    x, mean, rstd, vector = torch.ones(2, 4), torch.ones(2).double(), torch.ones(2), torch.ones(4)
    with pytest.raises(ValueError, match=r"dbias: expected dtype float32.*, got float16"):
        layer_norm.layer_norm_backward(x, x, vector, mean, rstd, vector, vector.half())


def test_add_layer_norm_two_dtypes():
    with pytest.raises(ValueError, match=r"branch: expected dtype float32.*, got bfloat16"):
        layer_norm.add_layer_norm_forward(
            torch.ones(2, 4).bfloat16(), torch.ones(2, 4), torch.ones(4), None, EPS
        )
