"""Newton–Schulz of stacks of matrices: beside singular values, torch's own, and at the edges."""

from __future__ import annotations

import pytest
import torch
import torch.optim._muon as torch_muon
from torch import Tensor

from mantrans.kernels import native, reference
from tests.kernels.common import generator, normal
from tests.support.compare import assert_close

each_ops = pytest.mark.parametrize("ops", [reference, native], ids=["reference", "native"])
SHAPES = [(3, 24, 40), (2, 40, 24), (1, 17, 17), (2, 1, 9), (2, 9, 1)]
# of the largest element: float64's and float32's digits after fifteen products; bfloat16's
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 6e-2}


def stack(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return normal(generator(sum(shape)), *shape).to(dtype)


def by_singular_values(matrices: Tensor, scale: float) -> Tensor:
    """The quintic on each singular value, which is what the products do to a matrix."""
    U, S, Vt = torch.linalg.svd(matrices.double(), full_matrices=False)
    s = S / S.norm(dim=1, keepdim=True)
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    return scale * (U * s[:, None, :]) @ Vt


@each_ops
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_orthogonalize_singular_values(ops, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    matrices = stack(*shape, dtype=dtype)
    expected = by_singular_values(matrices, 0.3)
    ops.orthogonalize(matrices, 0.3)
    assert_close(matrices, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_orthogonalize_bfloat16_equals_torch(shape: tuple[int, ...]) -> None:
    """Both round to bfloat16 after each product."""
    matrices = stack(*shape, dtype=torch.bfloat16)
    theirs = torch.stack([
        torch_muon._zeropower_via_newtonschulz(m, (3.4445, -4.775, 2.0315), 5, 1e-7)
        for m in matrices
    ])  # fmt: skip
    native.orthogonalize(matrices, 1.0)
    assert_close(matrices, theirs, TOLERANCE[torch.bfloat16])


@each_ops
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_orthogonalize_extreme(ops, dtype: torch.dtype) -> None:
    """Zero stays zero, beside others; the length of a matrix does not matter, however large; one
    of 1e-30 is below SMALLEST_MATRIX, and its update is as small as torch's."""
    matrices = stack(1, 6, 8).repeat(6, 1, 1)
    matrices *= torch.tensor([0.0, 1.0, 1e30, 1e-30, 1e-3, 3e37])[:, None, None]
    matrices = matrices.to(dtype)
    ops.orthogonalize(matrices, 0.2)
    assert matrices.isfinite().all() and not matrices[0].any()
    for i in (2, 4, 5):
        assert_close(matrices[i], matrices[1], TOLERANCE[dtype])
    assert_close(matrices[3] / 1e-23, 0.2 * 3.4445**5 * stack(1, 6, 8)[0], 2e-2)


@each_ops
def test_orthogonalize_view(ops) -> None:
    """Matrices inside a flat buffer: what lies between them stays."""
    flat = stack(4, 100).float()
    before = flat.clone()
    view = flat.as_strided((4, 6, 8), (100, 8, 1), 20)
    alone = view.clone()
    ops.orthogonalize(view, 1.0)
    ops.orthogonalize(alone, 1.0)
    assert torch.equal(view, alone)
    assert torch.equal(flat[:, :20], before[:, :20]) and torch.equal(flat[:, 68:], before[:, 68:])
