"""Runs everything in this folder on Triton's interpreter, repaired, with poisoned memory.

The interpreter replaces the compiler for a whole process. These tests therefore want a process of
their own: `python -m pytest tests/interpreted`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import interpreter

try:
    interpreter.start()
except RuntimeError as too_late:
    raise pytest.UsageError(str(too_late)) from None

from mantrans.kernels.selfcheck import poisoned_memory


@pytest.fixture(autouse=True)
def fresh_memory_is_poisoned() -> Iterator[None]:
    """Memory that torch hands out unwritten is full of NaN, so an element that no kernel wrote
    shows in whatever is compared."""
    with poisoned_memory():
        yield
