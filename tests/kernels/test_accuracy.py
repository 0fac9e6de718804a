"""Accuracy beside PyTorch's own operations, as docs/accuracy.md promises: see `tools.accuracy`."""

from __future__ import annotations

import pytest
import torch

from tools.accuracy import CASES, DTYPES, broken_promises, measure

BY_NAME = {case.name: case for case in CASES}
ALL = [(case.name, kind) for case in CASES for kind in case.kinds]
FAST = [
    ("linear", "ordinary"),
    ("layer_norm", "large mean"),
    ("layer_norm", "constant"),
    ("add_rms_norm", "huge"),
    ("attention", "large offset"),
    ("norm_rotary", "huge"),
    ("bias_gelu", "ordinary"),
    ("swiglu", "large mean"),
    ("cross_entropy", "sure"),
    ("cross_entropy", "larger offset"),
    ("linear_cross_entropy", "ordinary"),
    ("embedding", "one token"),
    ("gradient_norm", "huge"),
    ("adamw", "1e-25 to 1e18"),
]
FAST_IN_TRITON = [("layer_norm", "large mean"), ("cross_entropy", "larger offset")]


def assert_promise(name: str, kind: str, dtype: str, backends: list[str]) -> None:
    case = BY_NAME[name]
    errors = measure(case, kind, DTYPES[dtype], backends, torch.device("cpu"))
    assert all(backend in columns for columns in errors.values() for backend in backends)
    assert not list(broken_promises(case, DTYPES[dtype], kind, errors))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "kind"), FAST)
def test_accuracy_shipped_cases(name: str, kind: str, dtype: str) -> None:
    """No worse than PyTorch on this machine."""
    fast = (name, kind) in FAST_IN_TRITON
    assert_promise(name, kind, dtype, ["reference", "native", *["triton"] * fast])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "kind"), ALL)
def test_accuracy_all_cases(name: str, kind: str, dtype: str) -> None:
    """No worse than PyTorch by any way that a machine may choose."""
    triton = ["triton"] * (dtype in ("float32", "bfloat16"))
    assert_promise(name, kind, dtype, ["reference", "native", *triton])
