"""Accuracy beside PyTorch's own operations, as docs/accuracy.md promises: see `tools.accuracy`."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tools.accuracy import CASES, DTYPES, FACTOR, FLOAT64, FLOOR, PROMISE, broken_promises, measure

PAGE = Path(__file__).parents[1] / "docs" / "accuracy.md"
BY_NAME = {case.name: case for case in CASES}
ALL = [(case.name, kind) for case in CASES for kind in case.kinds]
FAST = [
    ("linear", "ordinary"),
    ("layer_norm", "large mean"),
    ("layer_norm", "constant"),
    ("attention", "large offset"),
    ("bias_gelu", "ordinary"),
    ("cross_entropy", "sure"),
    ("cross_entropy", "larger offset"),
    ("linear_cross_entropy", "ordinary"),
    ("embedding", "one token"),
    ("gradient_norm", "huge"),
    ("adamw", "1e-25 to 1e18"),
]


def assert_promise(name: str, kind: str, dtype: str, backends: list[str]) -> None:
    case = BY_NAME[name]
    errors = measure(case, kind, DTYPES[dtype], backends, torch.device("cpu"))
    assert all(backend in columns for columns in errors.values() for backend in backends)
    assert not list(broken_promises(case, DTYPES[dtype], kind, errors))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "kind"), FAST)
def test_no_worse_than_pytorch_here(name: str, kind: str, dtype: str) -> None:
    assert_promise(name, kind, dtype, ["reference", "native"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "kind"), ALL)
def test_no_worse_than_pytorch_anywhere(name: str, kind: str, dtype: str) -> None:
    assert_promise(name, kind, dtype, ["reference", "native"])


def number(cell: str) -> float:
    return math.inf if cell == "∞" else float(cell)


def test_the_page_has_every_operation_and_keeps_its_promise() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    assert f"**{PROMISE}**" in lines
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    titles, rows = rows[0], rows[2:]
    assert {row[0] for row in rows} == BY_NAME.keys()
    columns = [title.split(" ") for title in titles[2:]]
    assert {backend for _, backend in columns} == {"PyTorch", "reference", "native", "triton"}
    for name, output, *cells in rows:
        theirs: list[float] = []
        for (dtype, backend), cell in zip(columns, cells, strict=True):
            found = [number(part) for part in cell.split(" · ")]
            limits = [FACTOR * error * 1.1 for error in theirs] or found  # shown with two digits
            if dtype == "float64":
                limits = [FLOAT64]
            elif backend == "PyTorch":
                theirs, limits = found, found
            pairs = zip(found, limits, strict=True)
            assert all(x <= max(limit, FLOOR) for x, limit in pairs), (name, output, dtype, backend)
