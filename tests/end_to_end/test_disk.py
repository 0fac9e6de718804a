"""Whole runs on disks that are full, read-only or forbidden: what is said, and what is kept."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mantrans.checkpoint import state_file
from mantrans.config import Config
from mantrans.records import read_records
from tests.support.processes import Ended, Processes
from tests.support.runs import checkpoints, metrics_file, small

# Checkpoints of about 0.7 MB.
WIDE = {"d_model": 64, "d_ffn": 256}
NEEDS_ROOT = "mounting a small disk needs root"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB of its own: room for a handful of checkpoints of `WIDE` models."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip(NEEDS_ROOT)
    yield place
    subprocess.run(["umount", str(place)], check=True)


def run(processes: Processes, config: Config, folder: Path, *arguments: str, **keywords) -> Ended:
    config.save(folder / "config.yaml")
    return processes.run("--config", "config.yaml", *arguments, cwd=folder, **keywords)


def fill(disk: Path, leave: int) -> Path:
    """Take all of the disk's room but `leave` bytes."""
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(disk).free - leave))
    return ballast


@pytest.mark.promise("full disk")
def test_save_disk_full(
    tmp_path: Path, tokens: Path, processes: Processes, disk: Path, record_property: Callable
) -> None:
    """With room for one checkpoint and no more, each later save fails. The run trains to its end,
    fails there with one line, and the first checkpoint is intact. With room again it is resumed."""
    config = small(tmp_path, tokens, checkpoint_dir=str(disk), eval_every=12, model=WIDE)
    fill(disk, leave=1_200_000)
    ended = run(processes, config, tmp_path)
    assert ended.is_one_line_error and "No space left on device" in ended.text
    assert ended.text.count("training goes on") == 1  # step 8; step 12 is the last
    assert [r["step"] for r in read_records(metrics_file(tmp_path)) if "loss" in r] == [5, 10, 12]
    latest = disk / "small" / "latest.pt"
    assert state_file.load(latest)["progress"]["step"] == 4
    assert not any(latest.parent.glob(".*.partial"))
    (disk / "ballast").unlink()
    ended = run(processes, config, tmp_path, "--resume", "latest")
    assert ended.status == 0 and "at step 4" in ended.text
    assert state_file.load(latest)["progress"]["step"] == 12
    record_property("periodic saves that failed", 1)
    record_property("checkpoints lost", 0)


@pytest.mark.promise("full disk")
@pytest.mark.parametrize("room_comes", [True, False])
def test_records_disk_full(
    tmp_path: Path,
    tokens: Path,
    processes: Processes,
    disk: Path,
    room_comes: bool,
    record_property: Callable,
) -> None:
    """The checkpoints have room, the run's folder soon has none: the records wait in memory. If
    room comes in time, none is missing; else the run fails at its end, its checkpoint saved."""
    config = small(tmp_path, tokens, output_dir=str(disk), log_every=1, max_steps=400,
                   eval_every=200, save_every=200)  # fmt: skip
    fill(disk, leave=40_000)
    config.save(tmp_path / "config.yaml")
    child = processes.start("--config", "config.yaml", cwd=tmp_path)
    child.wait_for("the records wait in memory")
    if room_comes:
        (disk / "ballast").unlink()
    ended = child.wait()
    assert state_file.load(checkpoints(tmp_path) / "latest.pt")["progress"]["step"] == 400
    if room_comes:
        assert ended.status == 0, ended.text
        records = read_records(disk / "small" / "metrics.jsonl")
        assert [r["step"] for r in records if "loss" in r] == list(range(1, 401))
        record_property("records lost", 0)
    else:
        assert ended.is_one_line_error and "cannot be written" in ended.text


@pytest.mark.promise("full disk")
def test_save_file_size_limit(tmp_path: Path, tokens: Path, processes: Processes) -> None:
    """As the disk that is full, for who is not root: no file may grow beyond 30 kB."""
    ended = run(processes, small(tmp_path, tokens), tmp_path, limits={"RLIMIT_FSIZE": 30_000})
    assert ended.is_one_line_error and "File too large" in ended.text
    assert ended.text.count("training goes on") == 3  # steps 4, 6 (the best) and 8
    assert not any(checkpoints(tmp_path).glob("*.pt"))
    assert len(read_records(metrics_file(tmp_path))) == 5


@pytest.mark.promise("read-only disk")
@pytest.mark.parametrize("what", ["checkpoint_dir", "output_dir", "cache_dir"])
def test_train_disk_read_only(
    tmp_path: Path, tokens: Path, processes: Processes, disk: Path, what: str
) -> None:
    """A read only disk is refused before training."""
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    place = {"data": {what: str(disk / "x")}} if what == "cache_dir" else {what: str(disk / "x")}
    ended = run(processes, small(tmp_path, tokens, **place), tmp_path)
    assert ended.is_one_line_error and "Read-only file system" in ended.text
    assert str(disk) in ended.text


@pytest.mark.promise("read-only disk")
def test_save_folder_becomes_read_only(
    tmp_path: Path, tokens: Path, processes: Processes, open_to_all: None
) -> None:
    """Between two saves the checkpoint folder becomes read-only. Training goes on without saving;
    asked to stop, it says that it cannot save and fails."""
    config = small(tmp_path, tokens, log_every=1, max_steps=10**6, save_every=50, eval_every=10**6)
    tmp_path.chmod(0o777)
    config.save(tmp_path / "config.yaml")
    child = processes.start("--config", "config.yaml", cwd=tmp_path, as_nobody=os.geteuid() == 0)
    child.wait_for("step 51/")
    checkpoints(tmp_path).chmod(0o555)
    child.wait_for("training goes on")
    child.kill(signal.SIGTERM)
    ended = child.wait()
    checkpoints(tmp_path).chmod(0o755)
    assert ended.is_one_line_error and "Permission denied" in ended.text
    assert state_file.load(checkpoints(tmp_path) / "latest.pt")["progress"]["step"] >= 50


@pytest.fixture
def open_to_all(tmp_path: Path, tokens: Path) -> None:
    """Let a user without rights come as far as the folders of this test."""
    for folder in [tmp_path, *tmp_path.parents]:
        if folder.stat().st_uid == os.geteuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    for file in [tokens, *tokens.rglob("*")]:
        file.chmod(0o755)


@pytest.mark.promise("read-only disk")
@pytest.mark.parametrize("what", ["checkpoint_dir", "output_dir"])
def test_train_folder_without_permission(
    tmp_path: Path, tokens: Path, processes: Processes, what: str, open_to_all: None
) -> None:
    """As a user who is not root, in a folder that is root's (or is marked as not writable)."""
    (tmp_path / "mine").mkdir(mode=0o555)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs").chmod(0o777)
    places = dict.fromkeys(["output_dir", "checkpoint_dir"], str(tmp_path / "theirs"))
    places[what] = str(tmp_path / "mine")
    config = small(tmp_path, tokens, **places)
    ended = run(processes, config, tmp_path, as_nobody=os.geteuid() == 0)
    assert ended.is_one_line_error and "Permission denied" in ended.text
    assert str(tmp_path / "mine") in ended.text
