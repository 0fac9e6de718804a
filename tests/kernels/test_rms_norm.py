"""RMS norm: the mathematics, then the backends, then their edges.

Tolerances, all on the relative RMS error: 1e-12 for float64 against autograd and finite differences
(see `tests.support.calculus`); those of `common` for a backend against the reference, on the same
inputs.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from mantrans.kernels import native, reference, triton
from mantrans.kernels import operations as described
from mantrans.kernels.operations import EPS, Operation, Shapes
from mantrans.kernels.triton import rms_norm
from tests.kernels.common import (
    SUM_TOLERANCE,
    TOLERANCE,
    each_backend,
    generator,
    in_partials,
    normal,
    random_gradients,
)
from tests.support.calculus import drawn, equals_autograd, equals_finite_differences, results_of
from tests.support.compare import assert_close

OPERATIONS = [described.RmsNorm(), described.AddRmsNorm()]
# (N, C): one row; narrower than a lane's load, of odd width; the last tile of rows not full and C a
# power of two; SmolLM2's width; several tiles for each of the two programs of the backward, the
# last one short; the most warps; N odd, C just over a block.
SHAPES = [(1, 8), (3, 7), (37, 64), (9, 576), (150, 96), (2, 2100), (13, 257)]

each_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
each_shape_and_dtype = pytest.mark.parametrize(
    ("N", "C", "dtype"),
    [(*shape, torch.float32) for shape in SHAPES]
    + [(*shape, dtype) for shape in SHAPES[1:4] for dtype in (torch.float16, torch.bfloat16)],
    ids=str,
)
each_fast = pytest.mark.parametrize("ops", [native, triton], ids=["native", "triton"])


# ------------------------------------------------------------------------------- the mathematics


@each_operation
@pytest.mark.parametrize("N, C", [(1, 1), (5, 1), (7, 33), (1000, 24)], ids=str)
def test_rms_norm_reference_equals_autograd(operation: Operation, N: int, C: int) -> None:
    equals_autograd(operation, Shapes(N=N, C=C))


@each_operation
@pytest.mark.parametrize("N, C", [(1, 5), (7, 33), (50, 24)], ids=str)
def test_rms_norm_backward_equals_finite_differences(operation: Operation, N: int, C: int) -> None:
    """A row of five elements has a root mean square above a half: with h = 0.002 the stencil's
    error is (4 h / 0.5)^8 = 4e-15 of it."""
    equals_finite_differences(operation, Shapes(N=N, C=C), h=0.002)


# ---------------------------------------------------------------------------------- the backends


@pytest.fixture
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU works on a few rows at a time, at sizes of tests too."""
    monkeypatch.setattr(native, "CACHED_ELEMENTS", 200)


@each_operation
@each_shape_and_dtype
@each_fast
def test_rms_norm_equals_reference(
    ops: ModuleType, operation: Operation, N: int, C: int, dtype: torch.dtype, small_cache: None
) -> None:
    i = drawn(operation, Shapes(N=N, C=C), dtype)
    expected, actual = (results_of(operation, way, i) for way in (reference, ops))
    assert actual.keys() == expected.keys()
    # of the rounded dx, which is not the reference's to the last bit; a CPU rounds the sum as well
    branch_bias = actual.pop("dbranch_bias", None)
    if branch_bias is not None:
        bound = TOLERANCE[dtype] * 10 if ops is native else SUM_TOLERANCE
        assert_close(branch_bias, actual["dresidual"].double().sum(0), bound, "dbranch_bias")
    for name, value in actual.items():
        assert value.dtype == expected[name].dtype, name
        bound = SUM_TOLERANCE if name in ("rstd", "dweight") else TOLERANCE[dtype]
        assert_close(value, expected[name], bound, name)
    if operation is OPERATIONS[1]:  # one addition, one rounding: the same bits
        assert torch.equal(actual["x"], expected["x"])


@each_operation
def test_rms_norm_native_float64(operation: Operation, small_cache: None) -> None:
    i = drawn(operation, Shapes(N=37, C=64))
    expected, actual = (results_of(operation, way, i) for way in (reference, native))
    for name, value in expected.items():
        assert_close(actual[name], value, 1e-12, name)


@pytest.mark.parametrize("N, C", SHAPES[3:5], ids=str)
@pytest.mark.parametrize("complete", [True, False])
def test_rms_norm_backward_partial_sums(N: int, C: int, complete: bool) -> None:
    """As in training; complete: with a bias before it and what by-passed the norm."""
    source = generator(N, C, 2)
    dy, x, dresidual = (normal(source, N, C) for _ in range(3))
    weight, around = normal(source, C), dresidual if complete else None
    _, rstd = reference.rms_norm_forward(x, weight, EPS)
    vectors = random_gradients(source, (C,), (C,))
    expected = [vector.clone() for vector in vectors]

    def backward(ops: ModuleType, dweight: Tensor, dbranch_bias: Tensor) -> Tensor:
        last = dbranch_bias if complete else None
        return ops.rms_norm_backward(dy, x, weight, rstd, dweight, around, last)

    dx = in_partials(lambda rows: backward(triton, *rows), vectors)
    assert_close(dx, backward(reference, *expected), SUM_TOLERANCE, "dx")
    for got, want in zip(vectors, expected, strict=True):
        assert_close(got, want, SUM_TOLERANCE)


@pytest.mark.slow
def test_rms_norm_widest_row() -> None:
    """A tile of one row, every lane full."""
    i = drawn(OPERATIONS[1], Shapes(N=2, C=8192), torch.float32)
    expected, actual = (results_of(OPERATIONS[1], ops, i) for ops in (reference, triton))
    for name, value in expected.items():
        assert_close(actual[name], value, SUM_TOLERANCE, name)


@each_fast
def test_rms_norm_leading_axes(ops: ModuleType) -> None:
    x, weight = normal(generator(5), 2, 3, 16), torch.ones(16)
    y, rstd = ops.rms_norm_forward(x, weight, EPS)
    assert y.shape == x.shape and rstd.shape == (6,)
    assert ops.rms_norm_backward(y, x, weight, rstd, weight.clone()).shape == x.shape
    added, total, _ = ops.add_rms_norm_forward(x, torch.zeros_like(x), weight, EPS)
    assert torch.equal(added, y) and torch.equal(total, x)


# -------------------------------------------------------------------------------------- the edges

# One rounding of a result, a few of float32 sums
EDGE_TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 4e-3}


class Results:
    """Everything that the norm and its backward give."""

    def __init__(self, ops: ModuleType, x: Tensor, dy: Tensor, weight: Tensor, eps: float) -> None:
        self.y, self.rstd = ops.rms_norm_forward(x, weight, eps)
        added = ops.add_rms_norm_forward(torch.zeros_like(x), x, weight, eps)
        wide = reference.wide_dtype(x.dtype)
        self.dweight, self.dbranch_bias, again = torch.zeros(3, x.shape[-1], dtype=wide)
        self.dx = ops.rms_norm_backward(dy, x, weight, self.rstd, self.dweight)
        self.added, total, rstd = added
        backward = (dy, total, weight, rstd, again)
        self.dx_added = ops.rms_norm_backward(*backward, x, self.dbranch_bias)


@each_backend
@pytest.mark.parametrize("size", [1e-30, 1e18, 1e20, 1e37])
@pytest.mark.parametrize("C", [7, 700])
def test_rms_norm_any_size(ops: ModuleType, dtype: torch.dtype, size: float, C: int) -> None:
    """Right up to elements of 1e18; beyond it a float32 kernel says NaN, and never 0."""
    source = generator(C)
    x = (torch.randn(2, C, generator=source, dtype=torch.float64) * size).to(dtype)
    dy, weight = torch.randn(2, 2, C, generator=source).to(dtype).unbind(0)
    weight = weight[0].contiguous()
    results = Results(ops, x, dy, weight, EPS)
    if size > 1e18 and results.y.isnan().any():
        assert ops is triton
        assert all(t.isnan().all() for t in (results.y, results.added, results.dx, results.dweight))
        return
    wide, g = x.double(), dy.double() * weight.double()
    rstd = torch.rsqrt((wide / size).square().mean(-1, keepdim=True) * size**2 + EPS)
    x_hat = wide * rstd
    dx = rstd * (g - x_hat * (g * x_hat).mean(-1, keepdim=True))
    bound = EDGE_TOLERANCE[dtype]
    assert_close(results.y, x_hat * weight.double(), bound, "y")
    assert torch.equal(results.added, results.y)
    # where the row's size divides them dx and dγ may leave float32: bring them back to it first
    assert_close(results.dx.double() * (1 + size), dx * (1 + size), bound, "dx")
    dweight = (dy.double() * x_hat).sum(0)
    assert_close(results.dweight, dweight, min(bound, 1e-6), "dweight")
    assert_close(results.dx_added, wide + dx, bound, "dx after a branch")


@each_backend
@pytest.mark.parametrize("eps", [1e-5, 1e-6, 1e-12])
def test_rms_norm_zeros(ops: ModuleType, dtype: torch.dtype, eps: float) -> None:
    """x̂ = 0 exactly, γ has no gradient, and dx = γ dy / √ε."""
    source = generator(3)
    x, dy = torch.zeros(3, 300, dtype=dtype), torch.randn(3, 300, generator=source).to(dtype)
    weight = torch.randn(300, generator=source).to(dtype)
    results = Results(ops, x, dy, weight, eps)
    assert not results.y.any() and not results.dweight.any()
    expected = dy.double() * weight.double() / eps**0.5
    assert_close(results.rstd, torch.full((3,), eps**-0.5), 1e-6)
    for dx in (results.dx, results.dx_added):
        assert_close(dx, expected, EDGE_TOLERANCE[dtype])


@each_backend
def test_rms_norm_one_row_not_finite(ops: ModuleType, dtype: torch.dtype) -> None:
    """Only its own row; but γ's gradient is a sum over all."""
    x, weight = torch.ones(3, 40, dtype=dtype), torch.ones(40, dtype=dtype)
    x[1, 5] = torch.nan
    results = Results(ops, x, torch.ones_like(x), weight, EPS)
    for rows in (results.y, results.dx, results.added, results.dx_added):
        assert rows[1].isnan().all() and rows[::2].isfinite().all()
    assert results.dweight.isnan().all()


@pytest.mark.parametrize("ops", [reference, native], ids=["reference", "native"])
@pytest.mark.parametrize("size", [1e100, 1e170, 1e300])
def test_rms_norm_float64_overflow(ops: ModuleType, size: float) -> None:
    """Rows whose squares overflow."""
    source = generator(4)
    x, dy = torch.randn(2, 3, 50, generator=source, dtype=torch.float64)
    weight = torch.randn(50, generator=source, dtype=torch.float64)
    far = 2.0**40  # enough for ε to be nothing
    large, small = (Results(ops, x * s, dy, weight, EPS) for s in (size, far))
    assert_close(large.y, small.y, 1e-13)
    assert_close(large.dx * size, small.dx * far, 1e-12)
    assert_close(large.dweight, small.dweight, 1e-13)


@each_backend
def test_rms_norm_equal_rows(ops: ModuleType, dtype: torch.dtype) -> None:
    """Sums over rows keep their digits."""
    N, C = (3000 if ops is not triton else 500), 64
    x, weight = torch.ones(N, C, dtype=dtype), torch.ones(C, dtype=dtype)
    dy = torch.full_like(x, 0.01)
    results = Results(ops, x, dy, weight, 0.0)
    assert_close(results.dweight, N * dy[0].double(), SUM_TOLERANCE)


@each_backend
def test_rms_norm_sliced_and_transposed(ops: ModuleType, dtype: torch.dtype) -> None:
    """Read right, or refused."""
    wide = torch.randn(6, 40, generator=generator(1)).to(dtype)
    for x in (wide[:, :20], wide[::2, 20:], wide.view(2, 3, 40)[..., ::2], wide[:, :12].T):
        weight = torch.ones(x.shape[-1], dtype=dtype)
        if ops is triton:
            with pytest.raises(ValueError, match="x: expected a contiguous tensor"):
                Results(ops, x, x, weight, EPS)
            continue
        dy = torch.randn(x.shape, generator=generator(2)).to(dtype)
        ours = Results(ops, x, dy, weight, EPS)
        plain = Results(ops, x.contiguous(), dy, weight, EPS)
        assert_close(ours.y, plain.y, 1e-6)
        assert_close(ours.dx, plain.dx, 4e-3 if dtype == torch.bfloat16 else 1e-6)
        assert_close(ours.dweight, plain.dweight, 1e-6)


BAD_FORWARD = {
    "dtype": (torch.zeros(2, 4).double(), "x: expected dtype float32.*, got float64"),
    "width": (torch.zeros(2, 8193), "x: expected a last axis of 1 to 8192, got "),
    "no width": (torch.zeros(2, 0), "x: expected a last axis of 1 to 8192, got "),
    "a number": (torch.zeros(()), "x: expected a last axis of 1 to 8192, got "),
    "weight": (torch.zeros(2, 5), r"weight: expected shape \(5\), got \(4,\)"),
}


@pytest.mark.parametrize("x, message", BAD_FORWARD.values(), ids=BAD_FORWARD.keys())
def test_rms_norm_forward_refuses(x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rms_norm.rms_norm_forward(x, torch.ones(4), EPS)


BAD_BACKWARD = {
    "dy": ({"dy": torch.ones(2, 5)}, r"dy: expected shape \(2, 4\), got \(2, 5\)"),
    "rstd": ({"rstd": torch.ones(3)}, r"rstd: expected shape \(2\), got \(3,\)"),
    "wide rstd": ({"rstd": torch.ones(2).double()}, "rstd: expected dtype float32, got float64"),
    "dresidual": ({"dresidual": torch.ones(2, 4).half()}, "dresidual: expected dtype float32, got"),
    "dweight": ({"dweight": torch.ones(4).half()}, "dweight: expected dtype float32, got float16"),
    "strides": ({"dbranch_bias": torch.ones(3, 4)}, "dbranch_bias: expected .*those of dweight"),
}


@pytest.mark.parametrize("wrong, message", BAD_BACKWARD.values(), ids=BAD_BACKWARD.keys())
def test_rms_norm_backward_refuses(wrong: dict[str, Tensor], message: str) -> None:
    x = torch.ones(2, 4)
    right = {"dy": x, "x": x, "weight": x[0], "rstd": torch.ones(2), "dweight": torch.ones(4)}
    with pytest.raises(ValueError, match=message):
        rms_norm.rms_norm_backward(**(right | wrong))


def test_add_rms_norm_two_dtypes() -> None:
    """Rms norm addition refuses two dtypes."""
    with pytest.raises(ValueError, match=r"branch: expected dtype float32.*, got bfloat16"):
        rms_norm.add_rms_norm_forward(
            torch.ones(2, 4).bfloat16(), torch.ones(2, 4), torch.ones(4), EPS
        )
