"""The gradient norm of extreme gradients, in all three backends, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mantrans.kernels import native, reference
from tests.kernels.common import each_ops, generator, normal, relative

pytestmark = pytest.mark.usefixtures("few_programs")
INF, NAN = math.inf, math.nan
# normal numbers average their rounding errors; equal ones are all rounded the same way
FILLINGS = {"normal": None, "a tenth": 0.1, "a third": 1 / 3}
each_filling = pytest.mark.parametrize("value", FILLINGS.values(), ids=FILLINGS.keys())


def filled(P: int, value: float | None) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(P) if value is None else torch.full((P,), value)


@each_ops
@each_filling
@pytest.mark.parametrize("P", [1, 256, 70_003, 2**22 + 5])
def test_gradient_norms_digits(ops, value, P):
    gradients = filled(P, value)
    exact = gradients.double().square().sum().sqrt()
    assert relative(ops.gradient_norms(gradients, 1)[0], exact) < 5e-7


@pytest.mark.slow
@each_ops
@each_filling
def test_gradient_norms_gpt2_size(ops, value):
    gradients = filled(124_000_000, value)
    exact = sum(part.double().square().sum() for part in gradients.split(2**22)).sqrt()
    assert relative(ops.gradient_norms(gradients, 1)[0], exact) < 5e-7


@each_ops
@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e-20, 1e12, 1e19, 1e38])
def test_gradient_norms_extreme(ops, size):
    """A square that float32 cannot hold is no reason for 0 or infinity."""
    gradients = size * normal(generator(5), 3000).clamp(-3, 3)
    gradients[1000:2000] *= 1e-3
    exact = gradients.double().square().sum().sqrt()
    assert exact > 0 and relative(ops.gradient_norms(gradients, 1)[0], exact) < 5e-7


@pytest.mark.parametrize("ops", [reference, native], ids=["reference", "native"])
@pytest.mark.parametrize("size", [1e-300, 1e-150, 1e200, 1e306])
def test_gradient_norms_extreme_float64(ops, size):
    gradients = size * normal(generator(5), 300).double()
    exact = size * (gradients / size).square().sum().sqrt()
    assert relative(ops.gradient_norms(gradients, 1)[0], exact) < 1e-13


@each_ops
def test_gradient_norms_zero_or_not_finite(ops):
    assert ops.gradient_norms(torch.zeros(1000), 1)[0] == 0
    for bad, place in ((NAN, 0), (INF, 500), (-INF, 999)):
        gradients = torch.ones(1000)
        gradients[place] = bad
        assert not ops.gradient_norms(gradients, 1)[0].isfinite()
