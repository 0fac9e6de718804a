"""PyTorch's own sample inputs through our operations, in float64, against autograd.

See `tests.support.pytorch_samples`; `test_pytorch_samples_triton.py` does the same with Triton.
"""

from __future__ import annotations

import pytest
import torch

from mantrans.kernels import native, reference
from tests.support.pytorch_samples import OPERATIONS, Operation, compare

pytest.importorskip("expecttest", reason="PyTorch's samples import it")

IDS = [f"{operation.name} by {operation.run.__name__}" for operation in OPERATIONS]


@pytest.mark.parametrize("ops", [reference, native], ids=["reference", "native"])
@pytest.mark.parametrize("operation", OPERATIONS, ids=IDS)
def test_pytorchs_samples_in_float64(operation: Operation, ops, record_property) -> None:
    counts = compare(operation, ops, torch.float64, 1e-12)
    for reason, count in counts.items():
        record_property(reason, count)
    assert counts.pop("run") >= operation.applicable
    assert set(counts) == operation.reasons
