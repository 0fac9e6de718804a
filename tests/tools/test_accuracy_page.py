"""docs/accuracy.md: every operation is there, and its numbers keep the promise above them."""

from __future__ import annotations

import math
from pathlib import Path

from tools.accuracy import CASES, FACTOR, FLOAT64, FLOOR, PROMISE

PAGE = Path(__file__).parents[2] / "docs" / "accuracy.md"


def number(cell: str) -> float:
    return math.inf if cell == "∞" else float(cell)


def test_page_every_operation() -> None:
    """And its numbers keep the promise above them."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    assert f"**{PROMISE}**" in lines
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    titles, rows = rows[0], rows[2:]
    assert {row[0] for row in rows} == {case.name for case in CASES}
    columns = [title.split(" ") for title in titles[1:]]
    assert {backend for _, backend in columns} == {"PyTorch", "reference", "native", "triton"}
    for name, *cells in rows:
        theirs: list[float] = []
        for (dtype, backend), cell in zip(columns, cells, strict=True):
            found = [number(part) for part in cell.split(" · ")]
            # of a large error one digit is shown, and 1e2 may be 149
            limits = [FACTOR * error * 1.6 for error in theirs] or found
            if dtype == "float64":
                limits = [FLOAT64]
            elif backend == "PyTorch":
                theirs, limits = found, found
            pairs = zip(found, limits, strict=True)
            assert all(x <= max(limit, FLOOR) for x, limit in pairs), (name, dtype, backend)
