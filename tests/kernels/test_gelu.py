"""Bias + GELU: the kernels against the reference, and the derivative against autograd."""

from __future__ import annotations

import pytest
import torch

from mantrans.kernels import reference
from mantrans.kernels.triton import gelu
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

# (N, F): a single element; odd, below a lane's load; whole tiles; rows over several tiles and
# partial sums, columns just over a block; rows that two programs share unevenly.
SHAPES = [(1, 1), (5, 3), (16, 64), (150, 257), (101, 96)]

each_shape = pytest.mark.parametrize("N, F", SHAPES, ids=str)
each_bias = pytest.mark.parametrize("with_bias", [True, False])


@each_dtype
@each_shape
@each_bias
def test_gelu_forward(N, F, dtype, with_bias):
    source = generator(N, F)
    h = 2 * normal(source, N, F, dtype=dtype)
    bias = normal(source, F, dtype=dtype) if with_bias else None
    actual = gelu.bias_gelu_forward(h, bias)
    assert_close(actual, reference.bias_gelu_forward(h, bias), TOLERANCE[dtype])


@each_dtype
@each_shape
@pytest.mark.parametrize(("with_bias", "in_parts"), [(True, True), (True, False), (False, False)])
def test_gelu_backward(N, F, dtype, with_bias, in_parts):
    source = generator(N, F, 1)
    h, dy = 2 * normal(source, N, F, dtype=dtype), normal(source, N, F, dtype=dtype)
    bias, dbias, expected_dbias = None, None, None
    if with_bias:
        bias = normal(source, F, dtype=dtype)
        (dbias,) = random_gradients(source, (F,))
        expected_dbias = dbias.clone()
    if in_parts:
        dh = in_partials(lambda rows: gelu.bias_gelu_backward(dy, h, bias, rows[0]), [dbias])
    else:
        dh = gelu.bias_gelu_backward(dy, h, bias, dbias)
    expected = reference.bias_gelu_backward(dy, h, bias, expected_dbias)
    assert_close(dh, expected, TOLERANCE[dtype], "dh")
    if with_bias:
        assert_close(dbias, expected_dbias, SUM_TOLERANCE, "dbias")


def test_gelu_derivative():
    """The kernel's own algebra (sigmoid, not tanh) against PyTorch's derivative of its own GELU."""
    h = torch.linspace(-6, 6, 97).reshape(1, -1)
    variable = h.double().requires_grad_()
    torch.nn.functional.gelu(variable, approximate="tanh").sum().backward()
    assert_close(gelu.bias_gelu_backward(torch.ones_like(h), h), variable.grad, SUM_TOLERANCE)


def test_gelu_large_values():
    """exp overflows for large negative inputs; GELU and its derivative there are 0, not NaN."""
    h = torch.tensor([[-1e4, -100.0, 100.0, 1e4]])
    assert gelu.bias_gelu_forward(h).tolist() == [[0, 0, 100, 1e4]]
    assert gelu.bias_gelu_backward(torch.ones_like(h), h).tolist() == [[0, 0, 1, 1]]


def test_gelu_no_rows():
    dbias = torch.ones(4)
    h = torch.empty(0, 4)
    assert gelu.bias_gelu_forward(h, torch.ones(4)).shape == (0, 4)
    assert gelu.bias_gelu_backward(h, h, torch.ones(4), dbias).shape == (0, 4)
    assert torch.equal(dbias, torch.ones(4))


def test_gelu_refuses():
    h = torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"h: expected dtype float32, float16.*, got float64"):
        gelu.bias_gelu_forward(h.double())
    with pytest.raises(ValueError, match=r"bias: expected shape \(4\), got \(5,\)"):
        gelu.bias_gelu_forward(h, torch.ones(5))
    with pytest.raises(ValueError, match=r"dy: expected dtype float32.*, got float16"):
        gelu.bias_gelu_backward(h.half(), h)
    with pytest.raises(ValueError, match=r"dbias: expected dtype float32.*, got bfloat16"):
        gelu.bias_gelu_backward(h, h, None, torch.ones(4).bfloat16())


def test_gelu_slope_digits() -> None:
    """The slope is about 1 there, and u z' about 30: 1 - σ, which it is multiplied by, must be more
    than a difference from 1."""
    h = torch.linspace(-8, 8, 4001)[None]
    dh = gelu.bias_gelu_backward(torch.ones_like(h), h)
    expected = reference.bias_gelu_backward(torch.ones_like(h).double(), h.double())
    assert ((dh - expected).abs() <= 4 * 2**-23).all()
