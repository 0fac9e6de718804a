"""Tests that need a CUDA device: `python -m pytest tests/gpu`. Without one, one line says so."""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch


@pytest.hookimpl(trylast=True)  # after -m has chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where there is no CUDA device, one skipped test stands for all that need it."""
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu and not torch.cuda.is_available():
        gpu[0].add_marker(pytest.mark.skip(reason=f"no CUDA device: {len(gpu)} tests not run"))
        items[:] = [item for item in items if not item.get_closest_marker("gpu")] + gpu[:1]
        config.hook.pytest_deselected(items=gpu[1:])


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
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.fail("TRITON_INTERPRET=1: these tests are about compiled kernels")
    torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device("cuda")


@pytest.fixture
def triton(device: torch.device) -> ModuleType:
    """The backend under test, imported only where it can run."""
    return importlib.import_module("mantrans.kernels.triton")
