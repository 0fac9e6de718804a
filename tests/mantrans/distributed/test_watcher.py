"""How ranks end together: statuses and messages of processes without a model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mantrans.distributed.watcher import ENDED_BY_ANOTHER, StepClock, here, lives
from tests.support.processes import Processes
from tests.support.ranks import Ranks, start_ranks


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    started = Processes(tmp_path_factory.mktemp("processes"))
    yield started
    started.close()


def ended(processes: Processes, way: str, size: int = 2) -> tuple[list[int], list[str]]:
    """Statuses, and the lines that all have printed."""
    main = "tests.mantrans.distributed.failing:main"
    ranks: Ranks = start_ranks(processes, size, *way.split(","), cwd=Path.cwd(), main=main)
    ranks.seconds_until_gone()
    return [child.wait().status for child in ranks.children], ranks.said().splitlines()


def test_fail_slow_console(processes: Processes) -> None:
    """A rank's own watcher does not end it before it has said why."""
    assert ended(processes, "slowly") == (
        [ENDED_BY_ANOTHER, 2], ["error: rank 1: its disk is full"],
    )  # fmt: skip


def test_fail_common_reason(processes: Processes) -> None:
    assert ended(processes, "in common", 3) == ([2, 2, 2], ["error: rank 0: the same for all"])
    assert ended(processes, "about ranks") == ([2, 2], ["error: rank 1 differs"])


def test_fail_other_reasons(processes: Processes) -> None:
    assert ended(processes, "each its own") == (
        [2, 2], ["error: rank 0: reason 0", "error: rank 1: reason 1"]
    )  # fmt: skip


def test_watcher_last_act(processes: Processes) -> None:
    assert ended(processes, "leaving") == (
        [2, ENDED_BY_ANOTHER], ["error: rank 0: wrong", "rank 1 leaves"]
    )  # fmt: skip


def test_meet_missing_rank(processes: Processes) -> None:
    """Named once, by rank 0; by the others if that is missing."""
    line = "error: rank {}: expected 3 processes within 1.5 s, got none of rank {}"
    assert ended(processes, "missing,2", 3) == ([2, 2, 0], [line.format(0, 2)])
    assert ended(processes, "missing,0", 3) == ([0, 2, 2], [line.format(r, 0) for r in (1, 2)])


@pytest.mark.slow
def test_watcher_other_machine(processes: Processes) -> None:
    """Whose processes cannot be seen: after a few seconds, not after the timeout."""
    statuses, lines = ended(processes, "other machine", 3)
    assert statuses == [ENDED_BY_ANOTHER, -signal.SIGKILL, ENDED_BY_ANOTHER]
    why = "has died: its connection is closed, and it is silent"
    assert lines == [f"error: rank 1 {why}; nothing is saved"]


@pytest.mark.slow
def test_from_first_slow(processes: Processes) -> None:
    """Twice the timeout."""
    assert ended(processes, "long wait", 3) == ([0, 0, 0], [])


def test_step_clock_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = StepClock()

    def at(second: float) -> float:
        now[0] = second
        return clock.hangs(5.0)

    clock.begin("step 1")
    assert at(1000.0) == 0.0, "the first step has no limit"
    clock.end()
    clock.longest = 2.0
    clock.begin("step 2")
    assert at(1019.0) == 0.0, "ten times the longest step"
    assert at(1021.0) == 21.0
    clock.move(waits=True)
    assert at(5000.0) == 0.0, "it waits for others"
    clock.move()
    assert at(5021.0) == 21.0
    clock.end()
    assert at(9000.0) == 0.0, "between steps"


def test_lives_of_processes() -> None:
    """Of an ended one too that nobody has waited for."""
    assert lives(os.getpid())
    child = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while lives(child.pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.wait()
    assert not lives(child.pid)
    assert here().split()[-1] == str(os.getpid())
