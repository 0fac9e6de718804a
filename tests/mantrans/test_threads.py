"""The number of threads: as the config says, or a process's share of the cores."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mantrans.runtime import set_threads
from mantrans.training.trainer import Trainer
from tests.support.runs import small


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("threads", "ranks", "expected"),
    [(3, 1, 3), (3, 4, 3), (None, 1, 2), (None, 2, 6), (None, 5, 2), (None, 16, 1)],
)
def test_set_threads(
    monkeypatch: pytest.MonkeyPatch, threads: int | None, ranks: int, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)))
    torch.set_num_threads(2)
    set_threads(threads, ranks)
    assert torch.get_num_threads() == expected


def test_threads_on_record(tmp_path: Path) -> None:
    Trainer(small(tmp_path, tmp_path / "tokens", threads=3), quiet=True).folders.close()
    assert torch.get_num_threads() == 3
    assert json.loads((tmp_path / "runs/small/versions.json").read_text())["threads"] == "3"
