"""Logs: no gap, no duplicate, whatever happens to the process or the disk."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mantrans import records
from mantrans.checkpoint.atomic import write_all
from mantrans.config import Config
from mantrans.errors import MantransError
from mantrans.records import JsonLines, read_records
from mantrans.training.console import Console, describe
from mantrans.training.logger import RunLogger, git_commit, versions

ROOT = Path(__file__).parents[3]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def logger(directory: Path, resume_step: int | None = None, **keywords: Any) -> RunLogger:
    keywords = {"tensorboard": False, "stream": io.StringIO(), **keywords}
    return RunLogger(directory, resume_step, **keywords)


def steps_of(path: Path) -> list[int]:
    return [record["step"] for record in read_records(path)]


# ---------------------------------------------------------------------------------------- records


@pytest.mark.promise("every step on record once")
def test_records_resumed(tmp_path: Path) -> None:
    """An interrupted run has the bytes of an unbroken one."""

    def work(log: RunLogger, first: int, last: int) -> None:
        for step in range(first, last + 1):
            log.log(step, loss=1 / step, grad_norm=math.sqrt(step))
            if step % 3 == 0:
                log.log(step, validation_loss=2 / step)

    with logger(tmp_path / "whole") as log:
        work(log, 1, 20)
    with logger(tmp_path / "broken") as log:
        work(log, 1, 13)
    for resumed_at, until in ((9, 12), (6, 15), (15, 15), (15, 20)):
        with logger(tmp_path / "broken", resumed_at) as log:
            work(log, resumed_at + 1, until)
    whole = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert (tmp_path / "broken" / "metrics.jsonl").read_bytes() == whole


@pytest.mark.promise("every step on record once")
def test_records_later_dropped(tmp_path: Path) -> None:
    """A resume drops later records and a line cut short."""
    path = tmp_path / "metrics.jsonl"
    kept = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}, {"step": 2, "validation_loss": 1.0}]
    rest = ['{"step": 3}', "[1]", "not json", '{"no": "step"}', '{"step": "2"}', '{"step": 2, "lo']
    path.write_text("\n".join([json.dumps(record) for record in kept] + rest))
    lines = JsonLines(path, 2)
    lines.append({"step": 3, "loss": 1.0})
    lines.close()
    assert read_records(path) == [*kept, {"step": 3, "loss": 1.0}]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_records_old_set_aside(tmp_path: Path) -> None:
    """A new run sets the old records aside."""
    for step in (1, 2):
        with logger(tmp_path) as log:
            log.log(step)
    assert steps_of(tmp_path / "metrics.jsonl") == [2]
    assert steps_of(tmp_path / "metrics.jsonl.previous") == [1]


def test_records_not_in_json(tmp_path: Path) -> None:
    """Numbers that JSON does not have are written by name."""
    with logger(tmp_path) as log:
        log.log(1, loss=float("nan"), grad_norm=float("-inf"), several=[1.0, float("inf")])
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    expected = {"step": 1, "loss": "nan", "grad_norm": "-inf", "several": [1.0, "inf"]}
    assert json.loads(line, parse_constant=pytest.fail) == expected


def test_timings_apart(tmp_path: Path) -> None:
    with logger(tmp_path) as log:
        log.log(1, loss=1.0)
        log.log_timing(1, tokens_per_second=10.0, mfu=None)
        log.sync()
    assert read_records(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]
    timing = {"step": 1, "tokens_per_second": 10.0, "mfu": None}
    assert read_records(tmp_path / "timings.jsonl") == [timing]


@pytest.mark.promise("full disk")
def test_records_disk_full(tmp_path: Path, monkeypatch: Any) -> None:
    """Steps 3 to 6 meet a full disk that takes half a line; step 7 writes them all."""
    is_full = False

    def write(file: Any, data: bytes) -> None:
        if is_full:
            write_all(file, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_all(file, data)

    stream = io.StringIO()
    monkeypatch.setattr(records, "write_all", write)
    with logger(tmp_path, stream=stream) as log:
        for step in range(1, 9):
            is_full = 3 <= step <= 6
            log.log(step, loss=float(step))
            expected = [*range(1, 3)] if is_full else [*range(1, step + 1)]
            assert steps_of(tmp_path / "metrics.jsonl") == expected
    assert stream.getvalue().count("No space left on device") == 1


@pytest.mark.promise("every step on record once")
def test_records_killed(tmp_path: Path) -> None:
    code = (
        "import os, signal; from mantrans.training.logger import RunLogger\n"
        f"log = RunLogger({str(tmp_path)!r}, tensorboard=False)\n"
        "for step in range(200): log.log(step, loss=1.0)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert result.returncode == -signal.SIGKILL
    assert steps_of(tmp_path / "metrics.jsonl") == list(range(200))


def test_folder_impossible(tmp_path: Path) -> None:
    """A folder that cannot be made is an error."""
    (tmp_path / "file").touch()
    with pytest.raises(MantransError, match="cannot be written"):
        logger(tmp_path / "file" / "run")
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(MantransError, match=r"metrics\.jsonl: cannot be written"):
        logger(tmp_path, 3)


# -------------------------------------------------------------------- what else is written down


def test_config_and_versions(tmp_path: Path) -> None:
    """The configuration and the versions are written."""
    config = Config.from_dict({"training": {"max_steps": 5}})
    logger(tmp_path, config=config).close()
    assert Config.load(tmp_path / "config.yaml") == config
    found = json.loads((tmp_path / "versions.json").read_text())
    assert {"python", "torch", "triton", "numpy", "mantrans", "git_commit"} <= set(found)
    assert found["python"] == sys.version.split()[0]


def test_commit() -> None:
    """The commit is that of this repository or unknown."""
    head = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    result = subprocess.run(head, capture_output=True, text=True, check=False)
    commit = git_commit()
    expected = result.stdout.strip() if result.returncode == 0 else None
    assert commit == versions()["git_commit"]
    assert (commit or "").removesuffix("+changes") == (expected or "")


def test_tensorboard_readable(tmp_path: Path) -> None:
    """TensorBoard can read what is written."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with logger(tmp_path, tensorboard=True) as log:
        for step in range(1, 6):
            log.log(step, loss=float(step), status="ok", norms={"blocks.0": step / 4, "no": None})
    with logger(tmp_path, 3, tensorboard=True) as log:
        log.log(4, loss=40.0)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    seen = [(event.step, event.value) for event in events.Scalars("loss")]
    assert seen == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    seen = [(event.step, event.value) for event in events.Scalars("norms/blocks.0")]
    assert seen == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert set(events.Tags()["scalars"]) == {"loss", "norms/blocks.0"}


def test_tensorboard_absent(tmp_path: Path, monkeypatch: Any) -> None:
    """Without TensorBoard it says so once and goes on."""
    for name in list(sys.modules):
        if name.split(".")[0] == "tensorboard" or name.startswith("torch.utils.tensorboard"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    stream = io.StringIO()
    with logger(tmp_path, tensorboard=True, stream=stream) as log:
        log.log(1, loss=1.0)
        log.log(2, loss=1.0)
    assert stream.getvalue().count("tensorboard is not installed") == 1
    assert steps_of(tmp_path / "metrics.jsonl") == [1, 2]


# ----------------------------------------------------------------------------------------- console


def test_line_unknown_values() -> None:
    """What is unknown is left out."""
    values = {
        "loss": 1.23456,
        "learning_rate": 3e-4,
        "grad_norm": 0.5,
        "tokens_per_second": 12_345.0,
        "tflops": 1.5,
        "share_of_peak": None,
    }
    expected = "loss 1.2346, lr 3.00e-04, norm 0.50, 12.3k tok/s, 1.50 TFLOP/s"
    assert describe(values) == expected
    speed = {"tokens_per_second": 2.5e6, "share_of_peak": 0.4321}
    assert describe(speed) == "2.50M tok/s, 43.2% of peak"
    assert describe({"tflops": None, "loss": 2.0}) == "loss 2.0000"


def test_progress_without_terminal() -> None:
    """There are plain lines."""
    stream = io.StringIO()
    console = Console(100, stream=stream)
    for step in range(1, 11):
        console.update(step)
    console.show(10, {"loss": 2.0})
    console.message("saved")
    console.close()
    clock = r"\d:\d\d:\d\d"
    expected = rf"step 10/100  loss 2\.0000, {clock} elapsed, {clock} left\nsaved\n"
    assert re.fullmatch(expected, stream.getvalue())


def test_progress_time_left(monkeypatch: Any) -> None:
    now = 1000.0
    monkeypatch.setattr("mantrans.training.console.time.monotonic", lambda: now)
    console = Console(100, first_step=40, quiet=True)
    now += 3600 + 90
    assert console.time(50) == "1:01:30 elapsed, 5:07:30 left"
    assert console.time(40) == "1:01:30 elapsed" and console.time(100).endswith("0:00:00 left")
    assert Console(None).time(7) == "0:00:00 elapsed"


def test_progress_terminal() -> None:
    """There is one live bar."""
    stream = Terminal()
    console = Console(10, first_step=4, stream=stream)
    console.update(5)
    console.message("saved")
    console.show(10, {"loss": 2.0})
    console.close()
    shown = stream.getvalue()
    assert "5/10" in shown and "10/10" in shown and "loss 2.0000" in shown and "saved\n" in shown
    assert "\r" in shown


def test_progress_quiet() -> None:
    stream = Terminal()
    console = Console(10, quiet=True, stream=stream)
    console.update(5)
    console.show(6, {"loss": 2.0})
    console.message("saved")
    console.close()
    assert stream.getvalue() == ""
