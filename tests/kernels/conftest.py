"""Fixtures of the tests of operations."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mantrans.kernels.selfcheck import poisoned_memory


@pytest.fixture(autouse=True)
def fresh_memory_is_poisoned() -> Iterator[None]:
    """Memory that torch hands out unwritten is full of NaN, so an element that no kernel wrote
    shows in whatever is compared."""
    with poisoned_memory():
        yield
