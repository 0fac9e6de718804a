"""trackio and Weights & Biases: what they are given, and that they cannot hurt a run.

The fast tests put a library of the same name on the path; the slow ones use the real ones, offline.
"""

from __future__ import annotations

import json
import signal
import sqlite3
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mantrans.config import Config
from mantrans.errors import ConfigError
from mantrans.records import read_records
from mantrans.training import tracker
from mantrans.training.logger import RunLogger, numbers
from tests.support.runs import finish, metrics_file, small, stop_after

FAKE = """
import json, os, time
class Settings(dict): pass
class Run:
    def __init__(self, given):
        self.write("init", given)
    def write(self, what, values):
        if os.environ.get("FAKE_BREAKS") == what:
            raise SystemExit("the server said no")
        if os.environ.get("FAKE_ENDS") == what:
            os._exit(3)
        while os.environ.get("FAKE_HANGS") == what:
            time.sleep(0.01)
        with open(os.environ["FAKE_FILE"], "a") as file:
            file.write(json.dumps([what, values]) + "\\n")
    def log(self, values, step=None):
        self.write("log", {"step": step, **values})
    def finish(self):
        print("good-bye " * 100000)
        self.write("finish", None)
def init(**given):
    return Run(given)
"""


@pytest.fixture
def sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Any]]:
    """What libraries of both names have been given so far, as [call, values]."""
    (tmp_path / "libraries").mkdir()
    for name in ("trackio", "wandb"):
        (tmp_path / f"libraries/{name}.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path / "libraries")
    monkeypatch.setenv("FAKE_FILE", str(tmp_path / "sent"))
    monkeypatch.setattr(tracker, "SECONDS_TO_CLOSE", 60.0)

    def read() -> list[Any]:
        path = tmp_path / "sent"
        return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []

    return read


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokens")


def config_with(name: str | None) -> Config:
    return Config.from_dict({"training": {"tracker": name, "max_steps": 9}})


def recorded(folder: Path) -> list[dict[str, Any]]:
    """All numbers of the metrics and the timings, in the form that is sent."""
    files = (metrics_file(folder), metrics_file(folder).with_name("timings.jsonl"))
    return [dict(numbers(record)) for file in files for record in read_records(file)]


def by_name(records: list[dict[str, Any]]) -> list[str]:
    return sorted(json.dumps(record, sort_keys=True) for record in records)


@pytest.mark.parametrize("name", [pytest.param("trackio", marks=pytest.mark.slow), "wandb"])
def test_tracker_is_given_all_numbers(
    name: str, sent: Callable[[], list[Any]], tmp_path: Path, tokens: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Once each, under the names that TensorBoard has; a resumed run is the same one there."""
    config = small(tmp_path, tokens, tracker=name, max_steps=8, log_every=2)
    finish(config, lambda trainer: stop_after(trainer, 5))
    finish(config, resume="latest")
    calls = sent()
    begun = [values for what, values in calls if what == "init"]
    assert [what for what, _ in calls if what != "log"] == ["init", "finish"] * 2
    number = json.loads((tmp_path / "runs/small/tracker.json").read_text())["number"]
    for given in begun:
        assert given["project"] == "mantrans" and given["resume"] == "allow"
        assert given["config"]["training"]["max_steps"] == 8
        assert (given["name"], given.get("id")) == (
            (f"small-{number}", None) if name == "trackio" else ("small", number)
        )
    logged = [values for what, values in calls if what == "log"]
    assert by_name(logged) == by_name(recorded(tmp_path))
    assert any("grad_norm_by_layer/blocks.0" in values for values in logged)
    assert "good-bye" not in "".join(capsys.readouterr())

    another = config.model_copy(
        update={"training": config.training.model_copy(update={"tracker_project": "mine"})}
    )
    finish(another)
    last = [values for what, values in sent() if what == "init"][-1]
    assert last["project"] == "mine" and last.get("id", last["name"]) not in (
        number, f"small-{number}"
    )  # fmt: skip


@pytest.mark.parametrize("where", ["init", "log", "finish"])
@pytest.mark.parametrize("how", ["FAKE_BREAKS", "FAKE_ENDS", "FAKE_HANGS"])
def test_tracker_dead(
    how: str, where: str, sent: Callable[[], list[Any]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """One line, and the records are whole."""
    monkeypatch.setenv(how, where)
    if how == "FAKE_HANGS":
        monkeypatch.setattr(tracker, "SECONDS_TO_CLOSE", 0.2)
    with RunLogger(tmp_path, config=config_with("wandb"), tensorboard=False) as log:
        for step in range(1, 30):
            log.log(step, loss=1.0)
            log.log_timing(step, tokens_per_second=1.0)
    said = capsys.readouterr().err.splitlines()
    why = {
        "FAKE_BREAKS": "SystemExit: the server said no",
        "FAKE_ENDS": "its process has ended with status 3",
        "FAKE_HANGS": "it did not end within 0.2",
    }[how]
    assert len(said) == 1 and why in said[0] and said[0].endswith("metrics.jsonl only"), said
    assert [r["step"] for r in read_records(tmp_path / "metrics.jsonl")] == list(range(1, 30))


def test_tracker_dead_said_once(
    sent: Callable[[], list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it is asked to log after its end."""
    monkeypatch.setenv("FAKE_BREAKS", "init")
    said: list[str] = []
    dead = tracker.start(config_with("trackio"), tmp_path, False, said.append)
    assert dead is not None
    dead._process.wait(60)
    dead.log(0, {"loss": 1.0})  # which finds it gone
    dead._thread.join(60)
    for step in range(1, 4):
        dead.log(step, {"loss": 1.0})
    dead.close()
    assert len(said) == 1 and "the server said no" in said[0]


def test_tracker_slow(
    sent: Callable[[], list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing waits for it: what it has no room for is dropped, and that is said once."""
    monkeypatch.setattr(tracker, "MOST_WAITING", 20)
    monkeypatch.setenv("FAKE_HANGS", "log")
    said: list[str] = []
    slow = tracker.start(config_with("trackio"), tmp_path, False, said.append)
    assert slow is not None
    used = time.process_time()
    for step in range(5000):
        slow.log(step, {"loss": 1.0})
    slow.close()
    assert time.process_time() - used < 1
    assert len(said) == 1 and "20 records wait" in said[0]
    assert slow._process.wait(30) == -signal.SIGKILL


def test_tracker_killed_run(
    sent: Callable[[], list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the process that trains is gone, the library's ends its run and is gone too."""
    found = tracker.start(config_with("trackio"), tmp_path, False, print)
    assert found is not None and found._process.stdin is not None
    found.log(1, {"loss": 2.0})
    deadline = time.monotonic() + 60
    while len(sent()) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    found._process.stdin.close()  # as the system does
    assert found._process.wait(60) == 0
    assert [what for what, _ in sent()] == ["init", "log", "finish"]


def test_tracker_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not installed, or only a folder of that name: one line. Without a choice: none."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    (tmp_path / "wandb").mkdir()
    for name in ("trackio", "wandb"):
        config = config_with(name)
        with RunLogger(tmp_path / "run", config=config, tensorboard=False) as log:
            log.log(1, loss=2.0)
        line = f"training.tracker: {name} is not installed (pip install {name}): nothing is sent"
        assert capsys.readouterr().err.splitlines() == [line]
    with RunLogger(tmp_path / "run", config=config_with(None), tensorboard=False) as log:
        log.log(1, loss=2.0)
    assert not capsys.readouterr().err and not (tmp_path / "run/tracker.json").exists()
    with pytest.raises(ConfigError, match=r"training\.tracker: expected"):
        config_with("mlflow")


@pytest.mark.parametrize("content", ["", "[]", '{"number": 3}', '{"number": "../x"}', "{}"])
def test_tracker_file_damaged(content: str, sent: Callable[[], list[Any]], tmp_path: Path) -> None:
    """The run goes on as another one there."""
    (tmp_path / "tracker.json").write_text(content)
    config = config_with("trackio")
    RunLogger(tmp_path, 5, config=config, tensorboard=False, quiet=True).close()
    number = json.loads((tmp_path / "tracker.json").read_text())["number"]
    ((_, given), _) = sent()
    assert given["name"].endswith(f"-{number}") and len(number) == 12


# -------------------------------------------------------------------------- the real libraries


def run_twice(folder: Path, tokens: Path, name: str) -> str:
    """A run that is stopped and goes on; its number."""
    config = small(folder, tokens, tracker=name, max_steps=8, log_every=2)
    finish(config, lambda trainer: stop_after(trainer, 5))
    finish(config, resume="latest")
    return json.loads((folder / "runs/small/tracker.json").read_text())["number"]


@pytest.mark.slow
def test_trackio(tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio", reason="pip install trackio")
    monkeypatch.setattr(tracker, "SECONDS_TO_CLOSE", 600.0)  # a busy machine is no failure
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    number = run_twice(tmp_path, tokens, "trackio")
    (database,) = (tmp_path / "trackio").glob("mantrans*.db")
    rows = sqlite3.connect(database).execute("select run_name, step, metrics from metrics")
    found = []
    for run, step, metrics in rows.fetchall():
        assert run == f"small-{number}"
        text = metrics if isinstance(metrics, str) else bytes(metrics).decode()
        found.append({"step": step, **json.loads(text)})
    assert by_name(found) == by_name(recorded(tmp_path))


@pytest.mark.slow
def test_wandb_offline(tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="pip install wandb")
    monkeypatch.setattr(tracker, "SECONDS_TO_CLOSE", 600.0)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    number = run_twice(tmp_path, tokens, "wandb")
    runs = sorted((tmp_path / "runs/small/wandb").glob(f"offline-run-*-{number}"))
    assert len(runs) == 2, "two parts of one run, which `wandb sync` joins"
    found = [row for run in runs for row in wandb_history(run)]
    losses = {row["_step"]: row["loss"] for row in found if "loss" in row}
    assert losses == {r["step"]: r["loss"] for r in recorded(tmp_path) if "loss" in r}
    assert any("grad_norm_by_layer/blocks.0" in row for row in found)


def wandb_history(run: Path) -> list[dict[str, Any]]:
    """What was logged; its own process may still be writing it."""
    from wandb.proto import wandb_internal_pb2

    (file,) = run.glob("*.wandb")
    deadline = time.monotonic() + 60
    while True:
        records = []
        for data in log_records(file.read_bytes()):
            records.append(wandb_internal_pb2.Record())
            records[-1].ParseFromString(data)
        if any(r.WhichOneof("record_type") == "exit" for r in records):
            break
        assert time.monotonic() < deadline, "wandb has not ended the file"
        time.sleep(0.1)
    return [
        {x.key or ".".join(x.nested_key): json.loads(x.value_json) for x in r.history.item}
        for r in records
        if r.WhichOneof("record_type") == "history"
    ]


def log_records(data: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, after 7 bytes of its own.

    https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    place, whole = 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # the end of a block
            place += 32768 - place % 32768
        _, length, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            yield whole
            whole = b""
