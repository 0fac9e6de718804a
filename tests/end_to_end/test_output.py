"""Whole runs whose output cannot be written: they end as ever, only unseen."""

from __future__ import annotations

import os
import pty
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.compare import assert_same_bits
from tests.support.processes import Processes
from tests.support.runs import finish, outcome, small

LOST = {
    "a full disk": {1: "/dev/full", 2: "/dev/full"},
    "a full disk under standard error": {2: "/dev/full"},
    "a reader that has gone": {1: "gone", 2: "gone"},
    "closed": {1: "closed", 2: "closed"},
    "standard error closed": {2: "closed"},
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("seen")
    finish(small(folder, tokens))
    return outcome(folder)


@pytest.mark.promise("lost output")
@pytest.mark.parametrize("streams", LOST.values(), ids=LOST)
def test_train_lost_output(
    tmp_path: Path,
    tokens: Path,
    processes: Processes,
    expected: dict[str, Any],
    streams: dict[int, str],
    record_property: Callable,
) -> None:
    """Tokenizing, training, validating, saving, the report: status 0, and all files as ever."""
    config = small(tmp_path, tokens, data={"cache_dir": str(tmp_path / "tokens")})
    config.save(tmp_path / "config.yaml")
    ended = processes.run("--config", "config.yaml", cwd=tmp_path, streams=streams)
    assert ended.status == 0, ended.text
    assert_same_bits(outcome(tmp_path), expected)
    record_property("lines seen", 0)


@pytest.mark.promise("lost output")
@pytest.mark.parametrize("streams", LOST.values(), ids=LOST)
def test_command_mistake_without_output(
    tmp_path: Path, processes: Processes, streams: dict[int, str]
) -> None:
    """A mistake has its status without output."""
    assert processes.run("--config", "absent.yaml", cwd=tmp_path, streams=streams).status == 2


@pytest.mark.promise("lost output")
def test_train_terminal_closed(
    tmp_path: Path, tokens: Path, processes: Processes, expected: dict[str, Any]
) -> None:
    """With its bar; nohup has kept the hang-up itself away."""
    small(tmp_path, tokens).save(tmp_path / "config.yaml")
    ours, theirs = pty.openpty()
    streams = dict.fromkeys((1, 2), os.ttyname(theirs))
    child = processes.start("--config", "config.yaml", cwd=tmp_path, streams=streams)
    watchdog = threading.Timer(60, child.kill)
    watchdog.start()
    seen = b""
    while b"parameters" not in seen:
        seen += os.read(ours, 1000)
    os.close(theirs)
    os.close(ours)
    watchdog.cancel()
    assert child.wait().status == 0
    assert_same_bits(outcome(tmp_path), expected)
