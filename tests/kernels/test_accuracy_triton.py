"""Accuracy beside PyTorch's own operations, of the Triton kernels: see `tools.accuracy`."""

from __future__ import annotations

import pytest

from tests.kernels.test_accuracy import ALL, assert_promise


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "kind"), [("layer_norm", "large mean"), ("cross_entropy", "larger offset")]
)
def test_no_worse_than_pytorch_here(name: str, kind: str, dtype: str) -> None:
    assert_promise(name, kind, dtype, ["triton"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "kind"), ALL)
def test_no_worse_than_pytorch_anywhere(name: str, kind: str, dtype: str) -> None:
    assert_promise(name, kind, dtype, ["triton"])
