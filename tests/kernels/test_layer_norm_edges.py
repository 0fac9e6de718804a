"""Layer norm of rows far from zero, constant or huge, in every backend.

A row is m + d with whole multiples d of m's last place, so that it is exact in its dtype, and what
is expected is the norm of d, in float64.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from mantrans.kernels import native, reference, triton
from tests.kernels.common import each_backend, generator
from tests.support.compare import assert_close

EPS = 1e-5
# One rounding of a result, a few of float32 sums
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 4e-3}
GRADIENT_TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-6}


class Results:
    """Everything that a norm and its backward give."""

    def __init__(self, ops: ModuleType, x: Tensor, dy: Tensor, weight: Tensor) -> None:
        wide = reference.wide_dtype(x.dtype)
        self.y, self.mean, rstd = ops.layer_norm_forward(x, weight, None, EPS)
        zeros = torch.zeros_like(x)
        self.added, self.sum, *added = ops.add_layer_norm_forward(zeros, x, weight, None, EPS)
        self.dweight, self.dbranch_bias = torch.zeros(2, x.shape[-1], dtype=wide)
        backward = (dy, x, weight)
        self.dx = ops.layer_norm_backward(*backward, self.mean, rstd, self.dweight)
        self.dx_added = ops.layer_norm_backward(
            *backward, *added, torch.zeros_like(self.dweight), None, x, self.dbranch_bias
        )


def expected(d: Tensor, dy: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and dweight of rows d, which need not be far from zero, in float64."""
    d, dy, weight = d.double(), dy.double(), weight.double()
    centered = d - d.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centered.square().mean(-1, keepdim=True) + EPS)
    x_hat, g = centered * rstd, dy * weight
    dx = rstd * (g - g.mean(-1, keepdim=True) - x_hat * (g * x_hat).mean(-1, keepdim=True))
    return x_hat * weight, dx, (dy * x_hat).sum(0)


def draw(N: int, C: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Steps of -8 to 8, dy and γ."""
    source = generator(N, C)
    d = torch.randint(-8, 9, (N, C), generator=source).double()
    dy, weight = torch.randn(N, C, generator=source), torch.randn(C, generator=source)
    return d, dy.to(dtype), weight.to(dtype)


def check(results: Results, d: Tensor, dy: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
    y, dx, dweight = expected(d, dy, weight)
    assert_close(results.y, y, TOLERANCE[dtype], "y")
    assert torch.equal(results.added, results.y)
    assert_close(results.dx, dx, TOLERANCE[dtype], "dx")
    assert_close(results.dweight, dweight, GRADIENT_TOLERANCE[dtype], "dweight")


@each_backend
@pytest.mark.parametrize("C", [7, 300])
@pytest.mark.parametrize("exponent", [0, 10, 40])
def test_layer_norm_rows_far_from_zero(
    ops: ModuleType, dtype: torch.dtype, C: int, exponent: int
) -> None:
    """The deviations are a few units of the last place: what a rounded mean leaves is as large."""
    unit = torch.finfo(dtype).eps * 2.0**exponent
    d, dy, weight = draw(3, C, dtype)
    x = (2.0**exponent + d * unit).to(dtype)
    assert torch.equal(x.double() - 2.0**exponent, d * unit)
    check(Results(ops, x, dy, weight), d * unit, dy, weight, dtype)


@pytest.mark.parametrize("N", [native.FEW_NORMS, native.FEW_NORMS + 1])
@pytest.mark.parametrize("row", [0, -1])
def test_layer_norm_native_one_row_far(N: int, row: int) -> None:
    """Among few and among many rows that PyTorch's kernel computes well."""
    unit = torch.finfo(torch.float32).eps * 2.0**10
    d, dy, weight = draw(N, 40, torch.float32)
    d[row] *= unit
    x = d.clone()
    x[row] += 2.0**10
    check(Results(native, x.float(), dy, weight), d, dy, weight, torch.float32)


@each_backend
def test_layer_norm_one_element_differs(ops: ModuleType, dtype: torch.dtype) -> None:
    unit = torch.finfo(dtype).eps * 2.0**20
    d, dy, weight = draw(2, 300, dtype)
    d.zero_()[0, 0], d[1, -1] = 1, -1
    check(Results(ops, (2.0**20 + d * unit).to(dtype), dy, weight), d * unit, dy, weight, dtype)


@each_backend
@pytest.mark.parametrize("C", [1, 300])
def test_layer_norm_constant_rows(ops: ModuleType, dtype: torch.dtype, C: int) -> None:
    """x̂ = 0 exactly, and dx is that of any constant row."""
    values = [100000.1, -3.3e7, 1e18, -2e36, 3e38]
    values += [1e200, -1e300] if dtype == torch.float64 else []
    d, dy, weight = draw(len(values), C, dtype)
    x = torch.tensor(values, dtype=torch.float64)[:, None].expand_as(d).to(dtype)
    results = Results(ops, x.contiguous(), dy, weight)
    assert not results.y.any() and not results.dweight.any()
    assert torch.equal(results.mean.double(), x[:, 0].double())
    check(results, torch.zeros_like(d), dy, weight, dtype)
    if C == 1:  # no deviation from itself has a gradient
        assert not results.dx.any()


@each_backend
@pytest.mark.parametrize("size", [1e9, 1e18, 1e20, 1e37])
@pytest.mark.parametrize("C", [7, pytest.param(4100, marks=pytest.mark.slow)])
def test_layer_norm_huge_rows(ops: ModuleType, dtype: torch.dtype, size: float, C: int) -> None:
    """Right up to deviations of 1e18; beyond it a float32 kernel says NaN, and never 0."""
    source = generator(C)
    x = (torch.randn(2, C, generator=source) * size).to(dtype)
    dy, weight = torch.randn(2, C, generator=source).to(dtype), torch.ones(C, dtype=dtype)
    results = Results(ops, x, dy, weight)
    if size > 1e18 and results.y.isnan().any():
        assert ops is triton
        assert all(t.isnan().all() for t in (results.y, results.added, results.dx, results.dweight))
        return
    check(results, x, dy, weight, dtype)
    assert_close(results.dx_added, x, TOLERANCE[dtype])  # dx is nothing beside what passed it by


@pytest.mark.parametrize("ops", [reference, native])
@pytest.mark.parametrize("size", [1e100, 1e170, 1e300])
def test_layer_norm_float64_overflow(ops: ModuleType, size: float) -> None:
    """Rows whose squares overflow."""
    d, dy, weight = draw(3, 50, torch.float64)
    results = Results(ops, d * size, dy, weight)
    y, dx, dweight = expected(d * 2.0**40, dy, weight)  # far enough for ε to be nothing
    assert_close(results.y, y, 1e-13)
    assert_close(results.dx * size, dx * 2.0**40, 1e-12)
    assert_close(results.dweight, dweight, 1e-13)


@each_backend
def test_layer_norm_sliced_and_transposed(ops: ModuleType, dtype: torch.dtype) -> None:
    """Read right, or refused."""
    source = generator(1)
    wide, weight = torch.randn(6, 40, generator=source).to(dtype), torch.ones(20, dtype=dtype)
    for x in (wide[:, :20], wide[::2, 20:], wide.view(2, 3, 40)[..., ::2], wide[:, :12].T[:, :20]):
        weight = torch.ones(x.shape[-1], dtype=dtype)
        if ops is triton:
            with pytest.raises(ValueError, match="x: expected a contiguous tensor"):
                Results(ops, x, x, weight)
            continue
        ours, plain = Results(ops, x, x, weight), Results(ops, *[x.contiguous()] * 2, weight)
        assert_close(ours.y, plain.y, 1e-6)
        assert_close(ours.dx, plain.dx, 4e-3 if dtype == torch.bfloat16 else 1e-6)
