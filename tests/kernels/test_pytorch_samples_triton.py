"""PyTorch's own sample inputs through the Triton operations, in float32, against autograd.

The samples of attention have scores of about 100, of which a rounding is one of 1e-5 of p.
"""

from __future__ import annotations

import pytest
import torch

from mantrans.kernels import triton as ops
from tests.kernels.test_pytorch_samples import IDS
from tests.support.pytorch_samples import OPERATIONS, Operation, compare

TOLERANCE = 1e-5


@pytest.mark.parametrize("operation", OPERATIONS, ids=IDS)
def test_some_of_pytorchs_samples_in_float32(operation: Operation) -> None:
    counts = compare(operation, ops, torch.float32, TOLERANCE, most=2)
    assert counts["run"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS, ids=IDS)
def test_all_of_pytorchs_samples_in_float32(operation: Operation) -> None:
    counts = compare(operation, ops, torch.float32, TOLERANCE)
    assert counts.pop("run") >= operation.applicable
    assert set(counts) == operation.reasons
