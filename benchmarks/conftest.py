"""`--record FOLDER` for pytest: the small set's samples become rows like all others."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.harness import Recorder
from mantrans.runtime import disable_malloc_trim


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, default=None, help="append rows to this folder")


@pytest.fixture(scope="session")
def recorder(pytestconfig: pytest.Config) -> Recorder | None:
    """Where rows go, or None without --record."""
    disable_malloc_trim()  # as in all benchmarks
    folder = pytestconfig.getoption("--record")
    return Recorder(folder, "bench") if folder else None
