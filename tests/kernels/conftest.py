"""Fixtures of the tests of operations."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest

from mantrans.kernels.selfcheck import poisoned_memory


@pytest.fixture(autouse=True)
def fresh_memory_is_poisoned() -> Iterator[None]:
    """Memory that torch hands out unwritten is full of NaN, so an element that no kernel wrote
    shows in whatever is compared."""
    with poisoned_memory():
        yield


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradient norms in four programs of large blocks: the interpreter runs them one by one."""
    # The package shows the function of this name.
    triton_norm = importlib.import_module("mantrans.kernels.triton.gradient_norms")
    monkeypatch.setattr(triton_norm, "PROGRAMS", 4)
    monkeypatch.setattr(triton_norm, "BLOCK", 2**14)
