"""SwiGLU on a packed gate and up: the mathematics, then the backends, then their edges. Tolerances
as in `test_rms_norm`."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from mantrans.kernels import native, reference, triton
from mantrans.kernels import operations as described
from mantrans.kernels.operations import Shapes
from mantrans.kernels.triton import swiglu
from tests.kernels.common import TOLERANCE, each_backend, each_dtype, generator
from tests.support.calculus import drawn, equals_autograd, equals_finite_differences, results_of
from tests.support.compare import assert_close

SWIGLU = described.SwiGLU()
# (N, F): one element; odd, below a lane's load; whole tiles; several tiles of columns, the last one
# short, and of rows.
SHAPES = [(1, 1), (5, 3), (16, 64), (9, 600), (17, 257)]


# ------------------------------------------------------------------------------- the mathematics


@pytest.mark.parametrize("N, F", [(1, 1), (3, 7), (17, 96)], ids=str)
def test_swiglu_reference_equals_autograd(N: int, F: int) -> None:
    equals_autograd(SWIGLU, Shapes(N=N, F=F))


@pytest.mark.parametrize("N, F", [(1, 1), (3, 7), (17, 96)], ids=str)
def test_swiglu_backward_equals_finite_differences(N: int, F: int) -> None:
    """The sigmoid's next poles are π away from the real line: with h = 0.01 the stencil's error is
    (4 h / π)^8 = 7e-16."""
    equals_finite_differences(SWIGLU, Shapes(N=N, F=F), h=0.01)


# ---------------------------------------------------------------------------------- the backends


@pytest.fixture
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU works on a few rows at a time, at sizes of tests too."""
    monkeypatch.setattr(native, "CACHED_ELEMENTS", 200)


@pytest.mark.parametrize("N, F", SHAPES, ids=str)
@each_dtype
@pytest.mark.parametrize("ops", [native, triton], ids=["native", "triton"])
def test_swiglu_equals_reference(
    ops: ModuleType, N: int, F: int, dtype: torch.dtype, small_cache: None
) -> None:
    i = drawn(SWIGLU, Shapes(N=N, F=F), dtype)
    expected, actual = (results_of(SWIGLU, way, i) for way in (reference, ops))
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == dtype, name
        assert_close(actual[name], value, TOLERANCE[dtype], name)


def test_swiglu_native_float64(small_cache: None) -> None:
    i = drawn(SWIGLU, Shapes(N=27, F=257))
    expected, actual = (results_of(SWIGLU, way, i) for way in (reference, native))
    for name, value in expected.items():
        assert_close(actual[name], value, 1e-12, name)


@pytest.mark.parametrize("ops", [reference, native, triton], ids=["reference", "native", "triton"])
def test_swiglu_leading_axes(ops: ModuleType) -> None:
    h = torch.randn(2, 3, 20, generator=generator(1))
    y = ops.swiglu_forward(h)
    assert y.shape == (2, 3, 10)
    assert torch.equal(y.view(6, 10), ops.swiglu_forward(h.view(6, 20)))
    dh = ops.swiglu_backward(y, h)
    assert dh.shape == h.shape
    assert torch.equal(dh.view(6, 20), ops.swiglu_backward(y.view(6, 10), h.view(6, 20)))


# -------------------------------------------------------------------------------------- the edges


@each_backend
def test_swiglu_any_gates(ops: ModuleType, dtype: torch.dtype) -> None:
    """No exponential overflows: silu(g) is g or 0 there, its slope 1 or 0, whatever u and dy."""
    largest = torch.finfo(dtype).max
    for size in (1e4, 3e38, largest):
        gate = torch.tensor([size, -size, size, -size], dtype=dtype)
        up = torch.tensor([0.5, 0.5, 0.0, 1e20], dtype=dtype)
        h, dy = torch.cat((gate, up))[None], torch.full((1, 4), 2.0**-10, dtype=dtype)
        y = ops.swiglu_forward(h)[0]
        assert torch.equal(y, torch.stack((gate[0] * 0.5, *torch.zeros(3, dtype=dtype))))
        dgate, dup = ops.swiglu_backward(dy, h)[0].chunk(2)
        assert torch.equal(dgate, torch.tensor([2.0**-11, 0.0, 0.0, 0.0], dtype=dtype))
        assert torch.equal(dup, torch.stack([gate[0], 0 * up[0], gate[0], 0 * up[0]]) * 2.0**-10)


@each_backend
def test_swiglu_overflow(ops: ModuleType, dtype: torch.dtype) -> None:
    """dy u is 1e60, beyond float32; times the slope of an almost closed gate it is not."""
    h = torch.tensor([[-80.0, 1e30]], dtype=dtype)
    dh = ops.swiglu_backward(torch.tensor([[1e30]], dtype=dtype), h)
    exact = reference.swiglu_backward(torch.tensor([[1e30]], dtype=dtype).double(), h.double())
    assert_close(dh, exact, 1e-2 if dtype == torch.bfloat16 else 2e-5)


@each_backend
@pytest.mark.parametrize("where", [0, 5])
def test_swiglu_nan(ops: ModuleType, dtype: torch.dtype, where: int) -> None:
    """It is passed on to its own column alone."""
    h = torch.ones(2, 6, dtype=dtype)
    h[0, where] = torch.nan
    y = ops.swiglu_forward(h)
    dh = ops.swiglu_backward(torch.ones(2, 3, dtype=dtype), h)
    column = where % 3
    assert y[0, column].isnan() and dh[0, column].isnan()
    assert y.isnan().sum() == 1 and dh.isnan().sum() == (2 if where == 0 else 1)


@pytest.mark.parametrize("ops", [reference, native, triton], ids=["reference", "native", "triton"])
def test_swiglu_slope_digits(ops: ModuleType) -> None:
    """1 + g e^-g + …: with 1 - σ(g) as a difference it would be off by g 2^-24, as natively."""
    gate = torch.linspace(8, 30, 400)
    h, dy = torch.cat((gate, torch.ones(400)))[None], torch.ones(1, 400)
    exact = reference.swiglu_backward(dy.double(), h.double())
    error = (ops.swiglu_backward(dy, h) - exact).abs() / exact.abs()
    assert error.max() <= (2e-6 if ops is native else 3e-7)


@each_backend
def test_swiglu_sliced_and_transposed(ops: ModuleType, dtype: torch.dtype) -> None:
    """Read right, or refused."""
    wide = torch.randn(6, 40, generator=generator(1)).to(dtype)
    for h in (wide[:, :20], wide[::2, 20:], wide.view(2, 3, 40)[..., ::2], wide[:, :12].T):
        dy = h[..., : h.shape[-1] // 2]
        if ops is triton:
            with pytest.raises(ValueError, match="h: expected a contiguous tensor"):
                ops.swiglu_forward(h)
            with pytest.raises(ValueError, match="dy: expected a contiguous tensor"):
                ops.swiglu_backward(dy, h.contiguous())
            continue
        plain = h.contiguous()
        assert torch.equal(ops.swiglu_forward(h), ops.swiglu_forward(plain))
        assert torch.equal(ops.swiglu_backward(dy, h), ops.swiglu_backward(dy.contiguous(), plain))


@pytest.mark.parametrize("ops", [reference, native, triton], ids=["reference", "native", "triton"])
@pytest.mark.parametrize("shape", [(0, 6), (3, 0), (0, 2, 4), (2, 0, 4)], ids=str)
def test_swiglu_no_rows(ops: ModuleType, shape: tuple[int, ...]) -> None:
    h = torch.ones(shape)
    y = ops.swiglu_forward(h)
    assert y.shape == (*shape[:-1], shape[-1] // 2)
    assert ops.swiglu_backward(y, h).shape == shape


BAD = {
    "dtype": (torch.zeros(2, 4).double(), "h: expected dtype float32.*, got float64"),
    "odd": (torch.zeros(2, 5), r"h: expected an even last axis: gate and up, got shape \(2, 5\)"),
    "a number": (torch.zeros(()), "h: expected an even last axis"),
}


@pytest.mark.parametrize("h, message", BAD.values(), ids=BAD.keys())
def test_swiglu_forward_refuses(h: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        swiglu.swiglu_forward(h)
    with pytest.raises(ValueError, match=message):
        swiglu.swiglu_backward(h, h)


@pytest.mark.parametrize(
    ("dy", "message"),
    [
        (torch.zeros(2, 4), r"dy: expected shape \(2, 2\), got \(2, 4\)"),
        (torch.zeros(2, 2).half(), "dy: expected dtype float32, got float16"),
    ],
)
def test_swiglu_backward_refuses(dy: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        swiglu.swiglu_backward(dy, torch.zeros(2, 4))
