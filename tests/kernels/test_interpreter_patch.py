"""The repaired interpreter against torch's own bfloat16 arithmetic, bit for bit where both round
once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import InterpreterError

SIZE = 64


@triton.jit
def arithmetic(
    x_ptr, y_ptr, sum_ptr, difference_ptr, product_ptr, quotient_ptr, less_ptr, SIZE: tl.constexpr
):
    i = tl.arange(0, SIZE)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(sum_ptr + i, x + y)
    tl.store(difference_ptr + i, x - y)
    tl.store(product_ptr + i, x * y)
    tl.store(quotient_ptr + i, (x / y).to(tl.bfloat16))
    tl.store(less_ptr + i, x < y)


@triton.jit
def scalars_and_choice(x_ptr, out_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x = tl.load(x_ptr + i)
    doubled = x * 2.0 + tl.full([SIZE], 0.5, tl.bfloat16)
    tl.store(out_ptr + i, tl.where(x > 0, doubled, -x))
    tl.store(out_ptr + SIZE + i, tl.abs(x))
    tl.store(out_ptr + 2 * SIZE + i, tl.maximum(x, -x))


@triton.jit
def casts(
    wide_ptr, narrow_ptr, back_ptr, integer_ptr, from_integer_ptr, half_ptr, SIZE: tl.constexpr
):
    i = tl.arange(0, SIZE)
    wide = tl.load(wide_ptr + i)
    narrow = wide.to(tl.bfloat16)
    tl.store(narrow_ptr + i, narrow)
    tl.store(back_ptr + i, narrow.to(tl.float32))
    tl.store(integer_ptr + i, narrow.to(tl.int32))
    tl.store(from_integer_ptr + i, (i * 1001).to(tl.bfloat16))
    tl.store(half_ptr + i, narrow.to(tl.float16))


@triton.jit
def rounding_modes(wide_ptr, nearest_ptr, towards_zero_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    wide = tl.load(wide_ptr + i)
    tl.store(nearest_ptr + i, wide.to(tl.bfloat16, fp_downcast_rounding="rtne"))
    tl.store(towards_zero_ptr + i, wide.to(tl.bfloat16, fp_downcast_rounding="rtz"))


@triton.jit
def product(a_ptr, b_ptr, c_ptr, PRECISION: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    square = i[:, None] * SIZE + i[None, :]
    a, b = tl.load(a_ptr + square), tl.load(b_ptr + square)
    tl.store(c_ptr + square, tl.dot(a, b, input_precision=PRECISION))


@triton.jit
def reductions(
    x_ptr, sum_ptr, wide_sum_ptr, max_ptr, min_ptr, all_ptr, running_ptr, SIZE: tl.constexpr
):
    i = tl.arange(0, SIZE)
    square = i[:, None] * SIZE + i[None, :]
    x = tl.load(x_ptr + square)
    tl.store(sum_ptr + i, tl.sum(x, 1))
    tl.store(wide_sum_ptr + i, tl.sum(x.to(tl.float32), 1))
    tl.store(max_ptr + i, tl.max(x, 0))
    tl.store(min_ptr + i, tl.min(x, 0))
    tl.store(all_ptr, tl.sum(x))
    tl.store(running_ptr + square, tl.cumsum(x.to(tl.float32), 1))


@triton.jit
def masked_load(x_ptr, out_ptr, n, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n))
    tl.store(out_ptr + SIZE + i, tl.load(x_ptr + i, mask=i < n, other=1.0))


@triton.jit
def runtime_range(out_ptr, n):
    total = 0
    for i in range(0, n):
        total += i
    tl.store(out_ptr, total)


@triton.jit
def integers(x_ptr, y_ptr, out_ptr, OPERATION: tl.constexpr):
    i = tl.arange(0, 2)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    if OPERATION == "add":
        tl.store(out_ptr + i, x + y)
    elif OPERATION == "sub":
        tl.store(out_ptr + i, x - y)
    else:
        tl.store(out_ptr + i, x * y)


def values(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """Numbers of both signs over six orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    exponent = torch.randint(-10, 10, shape, generator=generator)
    return torch.ldexp(torch.randn(shape, generator=generator), exponent).to(dtype)


def nan(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def test_interpreter_arithmetic() -> None:
    """Arithmetic rounds as torch does."""
    x, y = values(SIZE), values(SIZE, seed=1)
    outputs = [nan(SIZE) for _ in range(4)]
    less = torch.zeros(SIZE, dtype=torch.bool)
    arithmetic[(1,)](x, y, *outputs, less, SIZE)
    for output, expected in zip(outputs, (x + y, x - y, x * y, x / y), strict=True):
        assert torch.equal(output, expected)
    assert torch.equal(less, x < y)


def test_interpreter_constants_and_selection() -> None:
    x = values(SIZE)
    out = nan(3 * SIZE)
    scalars_and_choice[(1,)](x, out, SIZE)
    doubled = x * 2.0 + torch.tensor(0.5, dtype=torch.bfloat16)
    assert torch.equal(out[:SIZE], torch.where(x > 0, doubled, -x))
    assert torch.equal(out[SIZE : 2 * SIZE], x.abs())
    assert torch.equal(out[2 * SIZE :], x.abs())


def special_values() -> Tensor:
    """Ties in both directions, subnormals, both infinities, overflow, and ordinary numbers."""
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x7F7FFFFF, 0x00018000])
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-40, 65504.0])
    head = torch.cat([ties.int().view(torch.float32), special])
    return torch.cat([head, values(SIZE - len(head), dtype=torch.float32)])


@pytest.mark.filterwarnings("ignore:.*encountered in cast")  # infinity to float16 and to int32
def test_interpreter_casts() -> None:
    """Casts round to nearest even."""
    wide = special_values()
    narrow, back, half = nan(SIZE), nan(SIZE, dtype=torch.float32), nan(SIZE, dtype=torch.float16)
    integer, from_integer = torch.full((SIZE,), -7, dtype=torch.int32), nan(SIZE)
    casts[(1,)](wide, narrow, back, integer, from_integer, half, SIZE)
    assert torch.equal(narrow, wide.bfloat16())
    assert torch.equal(back, wide.bfloat16().float())
    assert torch.equal(half, wide.bfloat16().half())
    assert torch.equal(from_integer, (torch.arange(SIZE) * 1001).bfloat16())
    fits = wide.abs() < 2**31
    assert torch.equal(integer[fits], wide.bfloat16().int()[fits])


def test_interpreter_cast_nan() -> None:
    wide = nan(SIZE, dtype=torch.float32)
    outputs = torch.zeros(SIZE, dtype=torch.bfloat16), torch.zeros(SIZE, dtype=torch.bfloat16)
    rounding_modes[(1,)](wide, *outputs, SIZE)
    assert all(output.isnan().all() for output in outputs)


def test_interpreter_rounding_modes() -> None:
    wide = special_values()
    nearest, towards_zero = nan(SIZE), nan(SIZE)
    rounding_modes[(1,)](wide, nearest, towards_zero, SIZE)
    assert torch.equal(nearest, wide.bfloat16())
    truncated = (wide.view(torch.int32) & -0x10000).view(torch.float32)
    assert torch.equal(towards_zero.float(), truncated)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_interpreter_dot(dtype: torch.dtype) -> None:
    """Exact products, float32 sums."""
    a, b = (torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    a, b = a.to(dtype), b.to(dtype)
    c = nan(SIZE, SIZE, dtype=torch.float32)
    product[(1,)](a, b, c, None, SIZE)
    # 64 products, each exact in float32, added in float32 in some order
    bound = SIZE * 2**-24 * (a.double().abs() @ b.double().abs())
    assert ((c.double() - a.double() @ b.double()).abs() <= bound).all()


def test_interpreter_dot_float32() -> None:
    """TF32 unless IEEE."""
    a, b = (values(SIZE, SIZE, dtype=torch.float32, seed=seed) for seed in (0, 1))
    exact = a.double() @ b.double()
    scale = a.double().abs() @ b.double().abs()
    errors = {}
    for precision in ("ieee", None):
        c = nan(SIZE, SIZE, dtype=torch.float32)
        product[(1,)](a, b, c, precision, SIZE)
        errors[precision] = ((c.double() - exact).abs() / scale).max().item()
    assert errors["ieee"] < SIZE * 2**-24
    assert 2**-14 < errors[None] < 2 * 2**-11  # each operand off by at most 2^-11


def test_interpreter_reductions() -> None:
    x = values(SIZE, SIZE)
    total, largest, smallest = nan(SIZE), nan(SIZE), nan(SIZE)
    wide = nan(SIZE, dtype=torch.float32)
    everything, running = nan(1), nan(SIZE, SIZE, dtype=torch.float32)
    reductions[(1,)](x, total, wide, largest, smallest, everything, running, SIZE)
    assert torch.equal(largest, x.amax(0)) and torch.equal(smallest, x.amin(0))

    exact, magnitude = x.double().sum(1), x.double().abs().sum(1)
    assert ((wide - exact).abs() <= SIZE * 2**-24 * magnitude).all()
    # log2(64) = 6 levels, each rounding to 8 bits
    assert ((total - exact).abs() <= 6 * 2**-9 * magnitude).all()
    assert not torch.equal(total, exact.bfloat16()), "a bfloat16 sum must not be better than it is"
    assert (everything - x.double().sum()).abs() <= 12 * 2**-9 * x.double().abs().sum()
    assert torch.allclose(running.double(), x.double().cumsum(1), rtol=0, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_interpreter_masked_lanes(dtype: torch.dtype) -> None:
    """They hold garbage unless told otherwise."""
    x, out = values(SIZE, dtype=dtype), torch.zeros(2 * SIZE, dtype=dtype)
    masked_load[(1,)](x, out, 10, SIZE)
    assert torch.equal(out[:10], x[:10]) and out[10:SIZE].isnan().all()
    assert torch.equal(out[SIZE : SIZE + 10], x[:10]) and (out[SIZE + 10 :] == 1).all()


def test_interpreter_range_bound() -> None:
    """The bound is known at run time only."""
    out = torch.zeros(1, dtype=torch.int32)
    runtime_range[(1,)](out, 10)
    assert out.item() == 45


MOST = 2**31 - 1


@pytest.mark.parametrize(
    ("operation", "x", "y", "beyond"),
    [("add", MOST - 1, 1, 2), ("sub", -MOST, 1, 2), ("mul", -(2**16), 2**15, 2**15 + 1)],
)
def test_interpreter_overflow(operation: str, x: int, y: int, beyond: int) -> None:
    """The last result that an int32 holds is right; the next is an error, in any lane."""
    left, right, out = torch.tensor([1, x]).int(), torch.tensor([1, y]).int(), torch.zeros(2).int()
    integers[(1,)](left, right, out, operation)
    assert out[1] == {"add": x + y, "sub": x - y, "mul": x * y}[operation]
    right[1] = beyond
    with pytest.raises(InterpreterError, match=f"int32 overflow .* {operation}"):
        integers[(1,)](left, right, out, operation)


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(3),
        lambda: torch.empty_like(torch.zeros(3)),
        lambda: torch.zeros(1).new_empty(3),
        lambda: torch.empty(3, dtype=torch.bfloat16),
    ],
)
def test_interpreter_fresh_memory(allocate: Callable[[], Tensor]) -> None:
    assert allocate().isnan().all()


def test_interpreter_compiled_triton() -> None:
    """In one process Triton is either compiled or interpreted; the second comer says so."""
    program = (
        "import os; os.environ.pop('TRITON_INTERPRET', None); import triton.language\n"
        "from tests.support import interpreter; interpreter.start()"
    )
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False
    )
    assert run.returncode != 0
    assert "one process cannot do both" in run.stderr
