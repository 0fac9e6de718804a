"""A pytest plugin that deals tests out to processes: `pytest -p tests.gpu.share --share 0/4 ...`.

Nearly all the time of the GPU tests is compilation, on one core each. Tests whose parameters differ
in a number of rows alone (T, N, B) need the same kernels and go to the same process.
"""

from __future__ import annotations

import re

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", default="0/1", metavar="I/N", help="run the I-th of N shares")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    share, shares = map(int, config.getoption("--share").split("/"))
    groups: dict[str, int] = {}
    kept, dropped = [], []
    for item in items:
        case = getattr(item, "callspec", None)
        key = item.nodeid if case is None else re.sub(r"\b[TNB][-=]?\d+", "", case.id)
        owner = groups.setdefault(key, len(groups)) % shares
        (kept if owner == share else dropped).append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept
