"""Edges that held when they were tried, with Triton: `tests.support.edges`."""

from __future__ import annotations

import pytest
import torch

from mantrans.kernels import triton as ops
from tests.support import edges

DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@each_dtype
def test_micro_batches_of_unequal_targets(dtype) -> None:
    edges.unequal_micro_batches("triton", dtype, 1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.slow
@each_dtype
def test_no_target_at_all(dtype) -> None:
    edges.all_targets_ignored("triton", dtype)


def test_sliced_tokens() -> None:
    ours, ids = edges.model("triton", torch.float32), edges.batch(2, 8)
    expected = ours.forward(ids)["logits"]
    for layout, view in edges.views_of(ids).items():
        assert torch.equal(ours.forward(view)["logits"], expected), layout


@pytest.mark.slow
@each_dtype
def test_sliced_and_transposed_inputs(dtype) -> None:
    edges.sliced_and_transposed_inputs("triton", dtype)


def test_adamw_with_extreme_gradients() -> None:
    edges.adamw_with_extreme_gradients(ops)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_stochastic_rounding_does_not_drift(name: str) -> None:
    edges.stochastic_rounding_does_not_drift(ops, name, 30)


@each_dtype
def test_one_finite_logit(dtype) -> None:
    edges.one_finite_logit(ops, dtype)
