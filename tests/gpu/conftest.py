"""Tests that need a CUDA device: `python -m pytest tests/gpu`. Skipped where there is none."""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch


@pytest.fixture(autouse=True)
def memory_is_given_back() -> Iterator[None]:
    """Many processes share one GPU: what this one caches is room that the others lack."""
    yield
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture
def device() -> torch.device:
    """The CUDA device, with float32 products in float32."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.fail("TRITON_INTERPRET=1: these tests are about compiled kernels")
    torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device("cuda")


@pytest.fixture
def triton(device: torch.device) -> ModuleType:
    """The backend under test, imported only where it can run."""
    return importlib.import_module("mantrans.kernels.triton")
