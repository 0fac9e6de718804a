"""Something else where a run keeps a file: a FIFO, a socket, a folder, a device, a dangling link.

Nothing waits for the other end of a pipe, reads a device or fails after hours: the run is refused
in a line before its first step, or it replaces the thing and ends as ever.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mantrans.config import Config
from mantrans.errors import MantransError
from mantrans.training.trainer import Trainer
from tests.support.compare import assert_same_bits
from tests.support.runs import outcome, small, stop_after


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(path.parent)  # the address may not be long
        server.bind(path.name)
        os.chdir(here)


KINDS: dict[str, Callable[[Path], Any]] = {
    "a FIFO": os.mkfifo,
    "a socket": a_socket,
    "a folder": lambda path: (path / "inside").mkdir(parents=True),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a dangling link": lambda path: path.symlink_to("absent/file"),
    "a link to itself": lambda path: path.symlink_to(path.name),
}
QUICK, *OTHERS = KINDS


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run stopped at step 8, its token files, and what an unbroken one leaves."""
    folder = tmp_path_factory.mktemp("kept")
    Trainer(configured(folder / "unbroken"), quiet=True).run()
    trainer = Trainer(configured(folder / "stopped"), quiet=True)
    stop_after(trainer, 8)
    trainer.run()
    return {"stopped": folder / "stopped", "outcome": outcome(folder / "unbroken")}


def configured(folder: Path) -> Config:
    return small(folder, folder / "tokens")


def places(folder: Path) -> list[Path]:
    """All that a run keeps, and its locks."""
    left = [path.relative_to(folder) for path in folder.rglob("*")]
    locks = [Path("runs/.small.lock"), Path("checkpoints/.small.lock")]
    report = [Path("runs/small/report.json"), Path("runs/small/report.html")]
    return sorted({*left, *locks, *report})


class Hang(BaseException):
    """What no code catches."""


@pytest.fixture
def alarm() -> Iterator[None]:
    """What takes 20 seconds hangs."""

    def end(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.promise("something in the way")
@pytest.mark.parametrize("resume", [None, "latest"], ids=["anew", "resumed"])
@pytest.mark.parametrize(
    "kind", [QUICK, *(pytest.param(kind, marks=pytest.mark.slow) for kind in OTHERS)]
)
def test_train_planted_file(
    tmp_path: Path, kept: dict[str, Any], kind: str, resume: str | None, alarm: None,
    record_property: Callable,
) -> None:  # fmt: skip
    """Refused before the first step, or replaced."""
    refused = replaced = 0
    for number, place in enumerate(places(kept["stopped"])):
        if kind == "a folder" and (kept["stopped"] / place).is_dir():
            continue
        signal.alarm(20)
        folder = tmp_path / str(number)
        if resume:
            shutil.copytree(kept["stopped"], folder, symlinks=True)
        else:
            folder.mkdir()
        for path in (folder / place, *(folder / place).parents):
            if path.is_symlink() or path.is_file():
                path.unlink()
        if (folder / place).is_dir():
            shutil.rmtree(folder / place)
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        KINDS[kind](folder / place)
        try:
            trainer = Trainer(configured(folder), resume=resume, quiet=True)
        except MantransError as refusal:
            assert "\n" not in str(refusal)
            refused += 1
            continue
        trainer.run()
        assert_same_bits(outcome(folder), kept["outcome"], f"{kind} as {place}")
        replaced += 1
    assert refused > 0
    record_property("places", refused + replaced)
    record_property("refused", refused)
    record_property("replaced", replaced)
    record_property("hangs", 0)
