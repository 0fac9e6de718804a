"""Finite differences of weights and of intermediate results are autograd's gradients."""

from __future__ import annotations

import pytest

from mantrans.kernels import reference
from mantrans.proof.differences import STENCILS, differences
from mantrans.proof.exact import Exact, exact_copy
from mantrans.wrapper import shift
from mantrans_oracle import differentiate
from tests.mantrans.proof.test_check import batch, model


@pytest.mark.parametrize(
    "case", ["gpt2", pytest.param("qwen3, window, biases", marks=pytest.mark.slow)]
)
def test_slope_every_name(case: str) -> None:
    copy = exact_copy(model(case, n_blocks=1).model)
    ids, labels = batch()
    found = differentiate(copy, ids, shift(labels))
    own = Exact(copy, reference).results(ids, shift(labels))
    for name, gradient in {**found.weights, **found.results}.items():
        if name not in copy.parameters.by_name and name not in own:
            continue  # inside an operation
        element = tuple(n // 2 for n in gradient.shape)
        if name == "token_embedding.weight":
            element = (int(ids[1, 3]), 2)
        slope = differences(copy, ids, shift(labels), name, [element])
        error = abs(slope.values[0] - gradient[element])
        assert error <= 1e-9 * gradient.abs().max() + 10 * slope.uncertainty[0], name
        assert slope.uncertainty[0] <= 1e-8, name


@pytest.mark.parametrize("order", STENCILS)
def test_stencil_order(order: int) -> None:
    """It is exact for polynomials up to its order, and not beyond."""
    for power in range(1, order + 3, 2):
        rise = sum(2 * w * n**power for n, w in enumerate(STENCILS[order], 1))
        assert (abs(rise - (power == 1)) < 1e-12) == (power < order + 1)


def test_slope_smaller_order() -> None:
    copy = exact_copy(model("gpt2").model)
    ids, labels = batch()
    name, where = "blocks.0.norm_2.weight", [(i,) for i in range(8)]
    gradient = differentiate(copy, ids, shift(labels)).weights[name]
    errors = []
    for order in (2, 4, 8):
        slope = differences(copy, ids, shift(labels), name, where, step=0.1, order=order)
        errors.append((slope.values - gradient[:8]).norm().item())
        if order > 2:
            assert slope.uncertainty.norm() > errors[-1], "what it says of itself is not too little"
    assert errors[0] > 10 * errors[1] > 1000 * errors[2]
