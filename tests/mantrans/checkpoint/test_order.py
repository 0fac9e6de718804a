"""Which checkpoint is newer: a counter inside the files decides, not times, names or steps."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mantrans.checkpoint import state_file
from mantrans.checkpoint.folder import CheckpointFolder, newest_intact
from mantrans.checkpoint.state_file import Order, load, order


def state(step: int, mark: int = 0) -> dict[str, Any]:
    return {"progress": {"step": step}, "mark": mark, "w": torch.full((3,), float(mark))}


def saved(folder: Path, *steps: int, keep: int = 9) -> CheckpointFolder:
    found = CheckpointFolder(folder, "run", keep=keep)
    for step in steps:
        found.save(step, state(step, found.saves + 1))
    return found


def contents(folder: Path) -> set[bytes]:
    return {path.read_bytes() for path in folder.rglob("*.pt")}


def with_times(folder: Path, how: str) -> None:
    """Change the files' times as copies, restores and wrong clocks do."""
    files = sorted(folder.glob("*.pt"))
    random.Random(how).shuffle(files)
    for number, path in enumerate(files):
        time = {"equal": 10**9, "shuffled": 10**9 + number, "in the future": 2**33 - number}[how]
        os.utime(path, (time, time))


@pytest.mark.promise("order of checkpoints")
@pytest.mark.parametrize("moved", ["in place", "copied", "renamed"])
@pytest.mark.parametrize("how", ["equal", "shuffled", "in the future"])
def test_order_changed_times(tmp_path: Path, how: str, moved: str) -> None:
    folder = saved(tmp_path, 10, 20, 30, 40).folder
    if moved == "copied":
        folder = Path(shutil.copytree(folder, tmp_path / "copy" / "run"))
    elif moved == "renamed":
        folder = folder.rename(tmp_path / "other")
    with_times(folder, how)
    path, skipped = newest_intact(folder)
    assert load(path)["mark"] == 4 and skipped == []


@pytest.mark.promise("order of checkpoints")
@pytest.mark.parametrize("how", ["equal", "shuffled", "in the future"])
def test_rotation_first_saved(tmp_path: Path, how: str) -> None:
    saved(tmp_path, 100, 200, 300, 110)  # resumed from 100
    with_times(tmp_path / "run", how)
    saved(tmp_path, 120, keep=2)
    kept = {path.name for path in (tmp_path / "run").glob("step_*")}
    assert kept == {"step_00000110.pt", "step_00000120.pt"}


def test_rotation_unreadable(tmp_path: Path) -> None:
    """What cannot be read is not removed."""
    folder = saved(tmp_path, 1, 2)
    (folder.folder / "step_00000001.pt").write_bytes(b"something")
    saved(tmp_path, 3, 4, 5, keep=1)
    assert (folder.folder / "step_00000001.pt").read_bytes() == b"something"
    assert {p.name for p in folder.folder.glob("step_*")} == {
        "step_00000001.pt",
        "step_00000005.pt",
    }


@pytest.mark.promise("order of checkpoints")
@pytest.mark.parametrize("outside", [False, True], ids=["inside", "a copy elsewhere"])
@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
@pytest.mark.parametrize("keep", [0, 1, 9])
def test_resume_older_sets_later_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int, links: bool, outside: bool
) -> None:
    """All that was there is still somewhere, latest.pt is the older one, and goes on from there."""
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(1, "no links")))
    folder = CheckpointFolder(tmp_path, "run", keep=keep)
    for step in (10, 20, 30):
        folder.save(step, state(step, step), best=step == 20)
    older = folder.best
    if outside:
        older = tmp_path / "backup.pt"
        shutil.copy(folder.best, older)
    before = contents(folder.folder)
    again = CheckpointFolder(tmp_path, "run", keep=keep)
    aside = again.set_aside_later_than(older)
    assert aside is not None and aside.parent == folder.folder
    assert contents(folder.folder) == before
    assert {load(path)["mark"] for path in aside.iterdir()} == {30}
    assert load(again.latest)["mark"] == 20 == load(newest_intact(folder.folder)[0])["mark"]
    assert again.set_aside_later_than(older) is None
    again.save(30, state(30, 31))
    assert load(newest_intact(folder.folder)[0])["mark"] == 31
    assert {load(path)["mark"] for path in aside.iterdir()} == {30}
    for path in aside.iterdir():  # brought back, they are still older than what came after
        shutil.copy(path, folder.folder / f"back_{path.name}")
    assert load(newest_intact(folder.folder)[0])["mark"] == 31


@pytest.mark.promise("order of checkpoints")
def test_order_without_counter(tmp_path: Path) -> None:
    """A later one with a counter is newer than any of them, whatever its step."""
    folder = tmp_path / "run"
    for step in (30, 10, 20):
        state_file.save(folder / f"step_{step:08d}.pt", state(step, step))
    assert [order(path) for path in sorted(folder.glob("*"))] == [
        Order(0, 10), Order(0, 20), Order(0, 30),
    ]  # fmt: skip
    assert load(newest_intact(folder)[0])["mark"] == 30
    run = CheckpointFolder(tmp_path, "run", keep=9)
    aside = run.set_aside_later_than(folder / "step_00000010.pt")
    assert aside is not None and len(list(aside.iterdir())) == 2
    run.save(15, state(15, 15))
    assert order(run.latest) == Order(1, 15)
    assert load(newest_intact(folder)[0])["mark"] == 15


@pytest.mark.promise("order of checkpoints")
def test_order_any_history(tmp_path: Path) -> None:
    """Random saves, resumes from older ones and changes of times: the newest is always the last
    saved, and nothing that was saved after it is ever missing."""
    chance = random.Random(5)
    folder = CheckpointFolder(tmp_path, "run", keep=3)
    step, mark, last = 0, 0, 0
    aside: set[int] = set()
    for _ in range(120):
        if chance.random() < 0.7 or mark == 0:
            step, mark = step + chance.randrange(1, 4), mark + 1
            folder.save(step, state(step, mark), best=chance.random() < 0.3)
            last = mark
        else:
            folder = CheckpointFolder(tmp_path, "run", keep=3)
            path = chance.choice(sorted(folder.folder.glob("*.pt")))
            chosen = load(path)
            later = {load(p)["mark"] for p in folder.folder.glob("*.pt")} - set(
                range(chosen["mark"] + 1)
            )
            folder.set_aside_later_than(path)
            aside |= later
            step, last = chosen["progress"]["step"], chosen["mark"]
        with_times(folder.folder, chance.choice(["equal", "shuffled", "in the future"]))
        assert load(newest_intact(folder.folder)[0])["mark"] == last == load(folder.latest)["mark"]
    found = {load(path)["mark"] for path in folder.folder.glob("abandoned.*/*.pt")}
    assert found == aside and len(aside) > 10


@pytest.mark.parametrize("claim", ["x", "-1", "1e3", "9" * 30, "²"])
def test_order_odd_counter(tmp_path: Path, claim: str) -> None:
    state_file.save(tmp_path / "a.pt", state(1), saves=claim)  # type: ignore[arg-type]
    assert load(tmp_path / "a.pt")["progress"] == {"step": 1}
    assert order(tmp_path / "a.pt") is None
    assert order(tmp_path / "absent.pt") is None and order(tmp_path) is None
