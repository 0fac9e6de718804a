"""Edges that held when they were tried, with the reference and natively: `tests.support.edges`."""

from __future__ import annotations

import pytest
import torch

from mantrans.kernels import native, reference
from tests.support import edges

BACKENDS = {"reference": reference, "native": native}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
by_name = pytest.mark.parametrize("backend", BACKENDS)
by_module = pytest.mark.parametrize("ops", BACKENDS.values(), ids=BACKENDS.keys())
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@by_name
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)],
    ids=str,
)
def test_micro_batches_of_unequal_targets(backend, dtype, tolerance) -> None:
    edges.unequal_micro_batches(backend, dtype, tolerance)


@by_name
@each_dtype
def test_no_target_at_all(backend, dtype) -> None:
    edges.all_targets_ignored(backend, dtype)


@by_name
@each_dtype
def test_sliced_and_transposed_inputs(backend, dtype) -> None:
    edges.sliced_and_transposed_inputs(backend, dtype)


@by_module
def test_adamw_with_extreme_gradients(ops) -> None:
    edges.adamw_with_extreme_gradients(ops)


@by_module
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_stochastic_rounding_does_not_drift(ops, name: str) -> None:
    edges.stochastic_rounding_does_not_drift(ops, name, 600)


@by_module
@each_dtype
def test_one_finite_logit(ops, dtype) -> None:
    edges.one_finite_logit(ops, dtype)


@by_name
def test_ragged_prompts_past_the_window(backend: str) -> None:
    """Each row as if it were alone, though their windows slide at different steps."""
    ours = edges.model(backend, torch.float64)
    prompts = [edges.batch(1, n)[0] for n in (1, 7, 8, 9, 20, 33)]
    for cache in (True, False):
        options = {"max_length": 40, "temperature": 0, "use_cache": cache}
        together = ours.generate(prompts, **options)
        for prompt, row in zip(prompts, together, strict=True):
            assert torch.equal(ours.generate([prompt], **options)[0], row)
            assert len(row) == 40 and len(row[len(prompt) :].unique()) > 1
