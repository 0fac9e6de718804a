"""SwiGLU on a packed gate and up: the mathematics, then the backends. Tolerances as in
`test_rms_norm`."""

from __future__ import annotations

import pytest
import torch

from mantrans.kernels import native, reference
from mantrans.kernels import operations as described
from mantrans.kernels.operations import Shapes
from tests.support.calculus import drawn, equals_autograd, equals_finite_differences, results_of
from tests.support.compare import assert_close

NATIVE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 5e-5, torch.bfloat16: 4e-4}
SWIGLU = described.SwiGLU()
# (N, F): one element; one column; odd; several blocks of a CPU's cache
SHAPES = [(1, 1), (6, 1), (3, 7), (17, 96), (90, 3001)]

each_shape = pytest.mark.parametrize("N, F", SHAPES, ids=str)


@each_shape
def test_swiglu_reference_equals_pytorch_under_autograd(N: int, F: int) -> None:
    equals_autograd(SWIGLU, Shapes(N=N, F=F))


@pytest.mark.parametrize("N, F", [(1, 1), (3, 7), (17, 96)], ids=str)
def test_swiglu_backward_equals_finite_differences(N: int, F: int) -> None:
    """The sigmoid's next poles are π away from the real line: with h = 0.01 the stencil's error is
    (4 h / π)^8 = 7e-16."""
    equals_finite_differences(SWIGLU, Shapes(N=N, F=F), h=0.01)


@each_shape
@pytest.mark.parametrize("dtype", NATIVE, ids=str)
def test_native_swiglu_equals_reference(N: int, F: int, dtype: torch.dtype) -> None:
    i = drawn(SWIGLU, Shapes(N=N, F=F), dtype)
    expected, actual = (results_of(SWIGLU, ops, i) for ops in (reference, native))
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == dtype, name
        assert_close(actual[name], value, NATIVE[dtype], name)
