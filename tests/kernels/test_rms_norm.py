"""RMS norm: the mathematics, then the backends.

Tolerances, all on the relative RMS error:
  1e-12   float64 against autograd and finite differences: see `tests.support.calculus`.
  NATIVE  a backend against the reference, on the same inputs. Sums of float32 are formed in another
          order: 2e-6. 16 bits: both round a float32 result once, and differ where it falls on both
          sides of a boundary; the rounding itself costs 1.6e-3 and 2e-4, a quarter is allowed.
"""

from __future__ import annotations

import pytest
import torch

from mantrans.kernels import native, reference
from mantrans.kernels import operations as described
from mantrans.kernels.operations import Operation, Shapes
from tests.support.calculus import drawn, equals_autograd, equals_finite_differences, results_of
from tests.support.compare import assert_close

NATIVE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 5e-5, torch.bfloat16: 4e-4}
SUMS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-6, torch.bfloat16: 2e-6}
OPERATIONS = [described.RmsNorm(), described.AddRmsNorm()]
# (N, C): one element; one column; one row; an odd width; many rows; several blocks of a CPU's cache
SHAPES = [(1, 1), (5, 1), (1, 5), (7, 33), (3000, 24), (90, 3001)]

each_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
each_shape = pytest.mark.parametrize("N, C", SHAPES, ids=str)


@each_operation
@each_shape
def test_rms_norm_reference_equals_pytorch_under_autograd(
    operation: Operation, N: int, C: int
) -> None:
    equals_autograd(operation, Shapes(N=N, C=C))


@each_operation
@pytest.mark.parametrize("N, C", [(1, 5), (7, 33), (50, 24)], ids=str)
def test_rms_norm_backward_equals_finite_differences(operation: Operation, N: int, C: int) -> None:
    """A row of five elements has a root mean square above a half: with h = 0.002 the stencil's
    error is (4 h / 0.5)^8 = 4e-15 of it."""
    equals_finite_differences(operation, Shapes(N=N, C=C), h=0.002)


@each_operation
@each_shape
@pytest.mark.parametrize("dtype", NATIVE, ids=str)
def test_native_rms_norm_equals_reference(
    operation: Operation, N: int, C: int, dtype: torch.dtype
) -> None:
    i = drawn(operation, Shapes(N=N, C=C), dtype)
    expected, actual = (results_of(operation, ops, i) for ops in (reference, native))
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        bound = SUMS if value.dtype == torch.float32 else NATIVE
        if name == "dbranch_bias":  # a CPU rounds this sum to the rows' 16 bits, once
            bound = {**SUMS, torch.float16: 1e-3, torch.bfloat16: 8e-3}
        # with one column γ x̂ is ±γ but for ε: what is left of dx cancels
        looser = 1e4 if C == 1 and name in ("dresidual", "dbranch") else 1
        assert_close(actual[name], value, bound[dtype] * looser, name)
