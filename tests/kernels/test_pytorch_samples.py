"""PyTorch's own sample inputs through our operations, against autograd.

See `tests.support.pytorch_samples`.

In float64; through Triton in float32, where the samples of attention have scores of about 100, of
which a rounding is one of 1e-5 of p.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from mantrans.kernels import native, reference, triton
from tests.support.pytorch_samples import OPERATIONS, Operation, compare

pytest.importorskip("expecttest", reason="PyTorch's samples import it")

each_operation = pytest.mark.parametrize(
    "operation",
    OPERATIONS,
    ids=[f"{operation.name} by {operation.run.__name__}" for operation in OPERATIONS],
)


@pytest.mark.parametrize(
    ("ops", "dtype", "tolerance"),
    [
        pytest.param(reference, torch.float64, 1e-12, id="reference"),
        pytest.param(native, torch.float64, 1e-12, id="native"),
        pytest.param(triton, torch.float32, 1e-5, id="triton", marks=pytest.mark.slow),
    ],
)
@each_operation
def test_operation_pytorch_samples(
    operation: Operation,
    ops: ModuleType,
    dtype: torch.dtype,
    tolerance: float,
    record_property: Callable[[str, object], None],
) -> None:
    counts = compare(operation, ops, dtype, tolerance)
    for reason, count in counts.items():
        record_property(reason, count)
    assert counts.pop("run") >= operation.applicable
    assert set(counts) == operation.reasons


@each_operation
def test_operation_pytorch_samples_triton(operation: Operation) -> None:
    assert compare(operation, triton, torch.float32, 1e-5, most=2)["run"] == 2
