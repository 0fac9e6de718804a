"""What the parity tests of the small kernels share: dtypes, tolerances, random tensors.

A kernel and the reference compute the same expression in float32 from the same inputs, in another
order of summation, and round once. So:

  * float32 results, and every weight gradient (its buffer is float32), differ by a few float32
    roundings: 2e-6 of their size;
  * a low-precision result differs only where the two float32 values fall on different sides of a
    rounding boundary, a few elements in a hundred. Rounding all of them costs 1.6e-3 in bfloat16
    and 2e-4 in float16 (relative RMS); a quarter of that is allowed.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mantrans.kernels import native, reference, triton
from mantrans.kernels.triton import partials

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SUM_TOLERANCE = 2e-6
TOLERANCE = {torch.float32: SUM_TOLERANCE, torch.float16: 5e-5, torch.bfloat16: 4e-4}

BACKENDS = [
    pytest.param(ops, dtype, id=f"{ops.__name__.rpartition('.')[2]}-{str(dtype)[6:]}")
    for ops in (reference, native, triton)
    for dtype in (torch.float64, torch.float32, torch.bfloat16)
    if not (ops is triton and dtype == torch.float64)
]
each_backend = pytest.mark.parametrize(("ops", "dtype"), BACKENDS)
MODULES = {"reference": reference, "native": native, "triton": triton}
each_ops = pytest.mark.parametrize("ops", MODULES.values(), ids=MODULES.keys())
# float16 goes bfloat16's way.
SOME_SLOW = [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", SOME_SLOW, ids=["fp32", "fp16", "bf16"])


def generator(*seed: int) -> torch.Generator:
    """A source of random numbers that depends on the test's shape alone."""
    return torch.Generator().manual_seed(hash(seed) % 2**31)


def normal(source: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers, rounded to dtype."""
    return torch.randn(*shape, generator=source).to(dtype)


def relative(actual: Tensor, exact: Tensor | float) -> float:
    """The largest relative error of an element, in float64."""
    exact = torch.as_tensor(exact, dtype=torch.float64)
    return float(((actual.double() - exact).abs() / exact.abs()).max())


def random_gradients(source: torch.Generator, *shapes: tuple[int, ...]) -> list[Tensor]:
    """float32 gradient buffers that already hold something, so that `=` instead of `+=` shows."""
    return [normal(source, *shape) for shape in shapes]


def in_partials(backward: Callable[[list[Tensor]], Tensor], vectors: list[Tensor]) -> Tensor:
    """Run `backward` as a training step does: the gradients of vectors are columns of one buffer of
    partial sums, which is summed up afterwards, and then holds zeros. What `vectors` hold before is
    put into the buffer's last row, so that a row that is overwritten shows."""
    widths = [len(vector) for vector in vectors]
    rows = partials.partial_rows(vectors[0].device)
    buffer = torch.zeros(rows, sum(widths))
    buffer[-1] = torch.cat(vectors)
    result = backward(list(buffer.split(widths, dim=1)))
    total = torch.zeros(sum(widths))
    partials.sum_partials(buffer, total)
    assert not buffer.any()
    for vector, value in zip(vectors, total.split(widths), strict=True):
        vector.copy_(value)
    return result
