"""The two folders of a run, runs/NAME and checkpoints/NAME: locked, checked, and made ready.

    lock       at once: one process a run
    check      before any work: what is there can be replaced
    begin      after everything that may refuse the run: an earlier run of that name moves to NAME.1
               (NAME.2, …), so that nothing is overwritten

A start that is refused leaves no trace.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Callable
from contextlib import ExitStack
from itertools import count
from pathlib import Path

from mantrans.checkpoint.atomic import sync_folder, temporary_name
from mantrans.config import TrainingConfig
from mantrans.errors import MantransError
from mantrans.training.lock import run_lock

FILES = (
    "config.yaml", "versions.json", "metrics.jsonl", "timings.jsonl", "report.json", "report.html",
    "profile.json", "tracker.json",
)  # fmt: skip
LINKS = ("latest.pt", "best.pt")


class RunFolders:
    """Locked from the start until `close`."""

    def __init__(self, training: TrainingConfig) -> None:
        """Raises MantransError if another process has this run, or a folder cannot be written."""
        self.name = training.experiment_name
        self.records = Path(training.output_dir) / self.name
        self.checkpoints = Path(training.checkpoint_dir) / self.name
        self._absent = [
            folder for end in self._both() for folder in (end, *end.parents) if not folder.exists()
        ]
        for folder in self._absent:
            if folder.is_symlink():
                raise MantransError(f"{folder}: expected a folder, or none, got a broken link")
        self._locks = ExitStack()
        try:
            for place in dict.fromkeys(os.path.realpath(path) for path in self._both()):
                self._locks.enter_context(run_lock(place))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Unlock them, and remove what was made but is empty."""
        self._locks.close()
        for folder in self._absent:
            with contextlib.suppress(OSError):
                folder.rmdir()

    def has_checkpoints(self) -> bool:
        """Whether an earlier run has been saved here."""
        return any(self.checkpoints.glob("*.pt"))

    def has_run(self) -> bool:
        """Whether an earlier run has left a checkpoint, a record or a report here."""
        records = (self.records / name for name in ("metrics.jsonl", "report.json"))
        return self.has_checkpoints() or any(
            path.is_file() and path.stat().st_size for path in records
        )

    def is_inside(self, checkpoint: Path) -> bool:
        """Whether a checkpoint file, links followed, is one of this run's."""
        return os.path.dirname(os.path.realpath(checkpoint)) == os.path.realpath(self.checkpoints)

    def is_of_this_run(self, checkpoint: Path, saved_name: str) -> bool:
        """Whether a checkpoint with this experiment's name in it goes on here: one of this run's,
        or a copy that lies elsewhere, but not one of an earlier run that was moved to NAME.1."""
        folder = os.path.basename(os.path.dirname(os.path.realpath(checkpoint)))
        moved = re.fullmatch(rf"{re.escape(self.name)}\.[0-9]+", folder)
        return self.is_inside(checkpoint) or (saved_name == self.name and not moved)

    def check(self, *, replaced: bool) -> None:
        """Refuse what cannot be written, before any work. replaced: `begin` moves all away.

        Raises MantransError: a name of ours is taken by something else, such as a folder or FIFO.
        """
        for folder in self._both():
            if folder.exists() and not folder.is_dir():
                raise MantransError(f"{folder}: expected a folder, or none, got a file")
        if not replaced:
            for path in [self.records / name for name in FILES]:
                _require(path, stat.S_ISREG, "a regular file")
            events = self.records / "tensorboard"
            _require(events, stat.S_ISDIR, "a folder")
            for path in [*events.glob("*"), *self.checkpoints.glob("*.pt")]:
                _require(path, stat.S_ISREG, "a regular file")
        for name in LINKS:
            _require(self.checkpoints.parent / name, stat.S_ISLNK, "a link", follow=False)
        for folder in self._both():
            if folder.exists():
                _require_room_for_files(folder)

    def begin(self, *, replace: bool) -> list[str]:
        """Create both folders; with `replace`, move those of an earlier run to NAME.N before.

        Returns a note on what was moved. Raises MantransError if that is not possible.
        """
        try:
            notes = [self._move_away()] if replace and self.has_run() else []
            for folder in self._both():
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MantransError(
                f"{error.filename}: the run's folder cannot be written ({error.strerror})"
            ) from None
        return notes

    def _both(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys((self.records, self.checkpoints)))

    def _move_away(self) -> str:
        """Rename both folders to the first NAME.N that neither has."""
        for number in count(1):
            name = f"{self.name}.{number}"
            targets = [folder.with_name(name) for folder in self._both()]
            if any(os.path.lexists(target) for target in targets):
                continue
            with ExitStack() as locks:
                try:
                    for target in targets:
                        locks.enter_context(run_lock(target))
                except MantransError:
                    continue  # a run of that name is just beginning
                moved = []
                for folder, target in zip(self._both(), targets, strict=True):
                    if os.path.lexists(folder):
                        folder.rename(target)
                        sync_folder(folder.parent)
                        moved.append(str(target))
                self._relink(name)
            return f"note: the earlier run of this name is kept: {' and '.join(moved)}"
        raise AssertionError("count() does not end")

    def _relink(self, name: str) -> None:
        """Let the links above the runs that named the moved run's checkpoints name them again."""
        for file in LINKS:
            link = self.checkpoints.parent / file
            if link.is_symlink() and os.readlink(link) == f"{self.name}/{file}":
                temporary = temporary_name(link)
                with contextlib.suppress(FileNotFoundError):
                    temporary.unlink()
                temporary.symlink_to(f"{name}/{file}")
                os.replace(temporary, link)


def _require_room_for_files(folder: Path) -> None:
    """MantransError if a file cannot be created in `folder`."""
    probe = temporary_name(folder / "probe")
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        probe.unlink()
    except OSError as error:
        raise MantransError(f"{folder}: cannot be written ({error.strerror})") from None


def _require(
    path: Path, is_kind: Callable[[int], bool], words: str, *, follow: bool = True
) -> None:
    """Refuse what is at `path` if its mode is not of that kind. With `follow` a link is what it
    leads to, and one that leads nowhere is nothing: names are replaced, not written through."""
    try:
        mode = os.stat(path, follow_symlinks=follow).st_mode
    except OSError:
        return
    if not is_kind(mode):
        got = next((name for test, name in _KINDS if test(mode)), "something else")
        raise MantransError(f"{path}: expected {words}, or nothing of that name, got {got}")


_KINDS = (
    (stat.S_ISREG, "a file"), (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
)  # fmt: skip
