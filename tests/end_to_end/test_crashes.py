"""Killed, terminated, interrupted: the next `--resume latest` goes on as if nothing had been."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mantrans.checkpoint import folder as checkpoint
from mantrans.checkpoint import state_file
from mantrans.checkpoint.folder import CheckpointFolder
from mantrans.checkpoint.state_file import SLOW_WRITE_VARIABLE
from mantrans.config import Config
from mantrans.records import read_records
from tests.support.compare import assert_same_bits
from tests.support.processes import Child, Processes
from tests.support.runs import (
    MODELS,
    checkpoints,
    finish,
    metrics_file,
    outcome,
    small,
)

# A save is some fifty writes: slowed, it takes about as long as the steps between two saves.
SLOW = {SLOW_WRITE_VARIABLE: "0.001"}


def config_for(folder: Path, tokens: Path, **training: Any) -> Config:
    settings = {"max_steps": 24, "save_every": 4, "eval_every": 12, "log_every": 2} | training
    config = small(folder, tokens, **settings)
    folder.mkdir(parents=True, exist_ok=True)
    config.save(folder / "config.yaml")
    return config


def start(processes: Processes, folder: Path, **keywords: Any) -> Child:
    """The command a person would type: with --resume latest as soon as there is a checkpoint."""
    resume = ["--resume", "latest"] if any(checkpoints(folder).glob("*.pt")) else []
    return processes.start("--config", "config.yaml", *resume, cwd=folder, **keywords)


@pytest.mark.promise("killed at random")
@pytest.mark.parametrize(
    ("model", "rounds"),
    [
        ("gpt2", 4),
        pytest.param("gpt2", 100, marks=pytest.mark.slow),
        *(pytest.param(name, 12, marks=pytest.mark.slow) for name in ("llama", "qwen2", "qwen3")),
    ],
)
def test_resume_after_random_kills(
    tmp_path: Path,
    tokens: Path,
    processes: Processes,
    model: str,
    rounds: int,
    record_property: Callable,
) -> None:
    """SIGKILL `rounds` times, each followed by a resume; a run that gets to its end is compared
    with the unbroken one, and another is begun."""
    for name in ("unbroken", "timed"):  # the first run ever takes longer
        config_for(tmp_path / name, tokens, model=MODELS[model])
        begun = time.monotonic()
        assert start(processes, tmp_path / name, environment=SLOW).wait().status == 0
        duration = time.monotonic() - begun
    expected = outcome(tmp_path / "unbroken")
    rng = random.Random(f"{model} {rounds}")
    kills = inside_a_save = before_any = finished = 0
    while kills < rounds or finished == 0:
        folder = tmp_path / f"run_{finished}"
        config_for(folder, tokens, model=MODELS[model])
        child = start(processes, folder, environment=SLOW)
        if kills < rounds:
            if kills % 4 == 3:  # three at any moment, and one that waits for a save
                wait_for_a_save(folder, 3 * duration)
            else:
                time.sleep(rng.uniform(0.0, 0.7 * duration))
            child.kill()
        ended = child.wait()
        if ended.status == 0:
            assert_same_bits(outcome(folder), expected)
            finished += 1
            continue
        assert ended.status == -signal.SIGKILL, ended.text
        kills += 1
        inside_a_save += any(checkpoints(folder).glob(".step_*.partial"))
        before_any += not any(checkpoints(folder).glob("*.pt"))
    assert inside_a_save > 0
    record_property("kills", kills)
    record_property("of them inside a save", inside_a_save)
    record_property("before the first checkpoint", before_any)
    record_property("runs brought to their end", finished)
    record_property("failures", 0)


def wait_for_a_save(folder: Path, seconds: float) -> None:
    """Return as soon as a checkpoint is being written, or after so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not any(checkpoints(folder).glob(".step_*.partial")):
        time.sleep(0.001)


class Killed(BaseException):
    """What no code catches."""


@pytest.mark.promise("killed at random")
def test_resume_after_kill_between_links(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, record_property: Callable
) -> None:
    """A save gives its file up to five names, one after the other. A run that dies before any of
    them, at any of its saves, ends with the unbroken run's latest.pt and best.pt all the same."""
    settings = {"eval_every": 4, "max_steps": 8}
    finish(small(tmp_path / "unbroken", tokens, **settings))
    expected = outcome(tmp_path / "unbroken")
    places = 0
    while True:
        folder = tmp_path / f"killed_{places}"
        calls = 0

        def dying(original: Callable, *arguments: Any, after: int = places) -> Any:
            nonlocal calls
            calls += 1
            if calls > after:
                raise Killed
            return original(*arguments)

        with monkeypatch.context() as patch:
            for owner, name in ((checkpoint, "_name_too"), (CheckpointFolder, "_link")):
                original = getattr(owner, name)
                patch.setattr(owner, name, lambda *a, f=original: dying(f, *a))
            try:
                finish(small(folder, tokens, **settings))
                break
            except Killed:
                places += 1
        resume = "latest" if list(checkpoints(folder).glob("*.pt")) else None
        finish(small(folder, tokens, **settings), resume=resume)
        assert_same_bits(outcome(folder), expected, f"killed before name {places}")
        for name in ("latest.pt", "best.pt"):
            path = tmp_path / f"killed_{places - 1}" / "checkpoints" / name
            assert path.resolve() == (checkpoints(folder) / name).resolve()
    assert places == 8
    record_property("places", places)


@pytest.mark.promise("signals")
@pytest.mark.parametrize(
    ("number", "status"),
    [
        pytest.param(signal.SIGTERM, 0, id="SIGTERM"),
        pytest.param(signal.SIGINT, 130, id="Ctrl-C"),
        # Caught in the same way: tests/mantrans/training/test_signals.py.
        pytest.param(signal.SIGHUP, 0, id="SIGHUP", marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, 0, id="SIGUSR1", marks=pytest.mark.slow),
    ],
)
def test_signal_during_step(
    tmp_path: Path, tokens: Path, processes: Processes, number: int, status: int
) -> None:
    """It ends the step, saves, and says how to go on."""
    config_for(tmp_path / "unbroken", tokens)
    assert start(processes, tmp_path / "unbroken").wait().status == 0
    folder = tmp_path / "broken"
    config_for(folder, tokens)
    child = start(processes, folder)
    child.wait_for("step 4/24")
    child.kill(number)
    ended = child.wait()
    assert ended.status == status and "--resume latest" in ended.text
    stopped = state_file.load(checkpoints(folder) / "latest.pt")["progress"]["step"]
    assert 4 <= stopped < 24
    assert f"stopped at step {stopped} of 24" in ended.text
    resumed = start(processes, folder).wait()
    assert resumed.status == 0 and f"at step {stopped}" in resumed.text
    assert_same_bits(outcome(folder), outcome(tmp_path / "unbroken"))


@pytest.mark.promise("signals")
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (signal.SIGINT, signal.SIGINT),
        (signal.SIGTERM, signal.SIGTERM),
        pytest.param(signal.SIGHUP, signal.SIGHUP, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, signal.SIGUSR1, marks=pytest.mark.slow),
        (signal.SIGTERM, signal.SIGINT),
    ],
    ids=lambda number: signal.Signals(number).name,
)
def test_signal_second_during_save(
    tmp_path: Path, tokens: Path, processes: Processes, first: int, second: int
) -> None:
    """The save it breaks off leaves no trace; the checkpoint before it is whole."""
    config_for(tmp_path, tokens, save_every=4, eval_every=24)
    child = start(processes, tmp_path, environment={SLOW_WRITE_VARIABLE: "0.02"})
    folder = checkpoints(tmp_path)
    child.wait_until(lambda: (folder / "latest.pt").exists())
    child.wait_until(lambda: any(folder.glob(".step_00000008*")))
    child.kill(first)
    time.sleep(0.05)
    child.kill(second)
    ended = child.wait()
    assert ended.status == 128 + second and "Traceback" not in ended.text
    assert not any(folder.glob(".step_*"))
    assert state_file.load(folder / "latest.pt")["progress"]["step"] == 4
    assert start(processes, tmp_path).wait().status == 0


@pytest.mark.promise("latest.pt")
def test_latest_always_present(
    tmp_path: Path, tokens: Path, processes: Processes, record_property: Callable
) -> None:
    """Looked for without a pause while a run saves after every step, under both of its names."""
    config_for(tmp_path, tokens, save_every=1, log_every=1, keep_checkpoints=1)
    names = [checkpoints(tmp_path) / "latest.pt", tmp_path / "checkpoints" / "latest.pt"]
    child = start(processes, tmp_path)
    child.wait_until(lambda: all(name.exists() for name in names))
    looks = loads = 0
    seen = 0
    report = tmp_path / "runs" / "small" / "report.json"
    while not report.exists():
        for name in names:
            os.stat(name)  # raises the moment there is none
            looks += 1
        if looks % 200 == 0:
            step = state_file.load(names[0])["progress"]["step"]
            assert step >= seen
            seen, loads = step, loads + 1
    assert child.wait().status == 0 and looks > 400
    record_property("saves", 24)
    record_property("looks", looks)
    record_property("times absent", 0)
    record_property("loads in between", loads)


@pytest.mark.promise("every step on record once")
def test_records_after_kill(tmp_path: Path, tokens: Path, processes: Processes) -> None:
    """What was shown on the screen is in metrics.jsonl, though the process had no time to close."""
    config_for(tmp_path, tokens, log_every=1, save_every=24, eval_every=24)
    child = start(processes, tmp_path)
    child.wait_for("step 9/24")
    child.kill()
    assert child.wait().status == -signal.SIGKILL
    steps = [record["step"] for record in read_records(metrics_file(tmp_path))]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 9
