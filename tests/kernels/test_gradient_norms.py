"""A piece's norm has the same bits however many of the pieces a rank owns, and with any number of
threads: ranks that own all, half or a few of them then clip alike."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from mantrans.kernels import native, reference, triton
from tests.kernels.common import generator, normal

PIECES = 64
BACKENDS = {"reference": reference, "native": native, "triton": triton}


def gradients(size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """PIECES of `size` elements: ordinary, 0, tiny and huge ones."""
    g = normal(generator(size), PIECES * size).to(dtype).view(PIECES, size)
    g[3], g[4], g[5] = 0, g[4] * 1e-30, g[5] * 1e30
    return g.view(-1)


@pytest.mark.parametrize("ops", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("size", [64, 192, 256, 4096 + 64])
def test_gradient_norms_fewer_pieces(ops: ModuleType, size: int) -> None:
    g = gradients(size)
    whole = ops.gradient_norms(g, PIECES)
    assert whole.dtype == torch.float64 and whole[3] == 0
    exact = reference.gradient_norms(g.double(), PIECES)
    torch.testing.assert_close(whole, exact, rtol=5e-7, atol=0)
    counts = (1, 32) if ops is triton else (1, 2, 8, 21, 32)
    for count in counts:
        for first in range(0, PIECES - count + 1, count if ops is not triton else PIECES // 2):
            owned = g[first * size : (first + count) * size].clone()
            norms = ops.gradient_norms(owned, count)
            assert torch.equal(norms, whole[first : first + count]), (first, count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradient_norms_more_threads(dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(native.gradient_norms(gradients(4096 + 64, dtype), PIECES))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
