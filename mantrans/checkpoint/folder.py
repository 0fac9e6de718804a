"""The checkpoints of a run: which are kept, their names, and which is the newest intact one.

    checkpoints/<experiment>/step_00001000.pt   the newest few
    checkpoints/<experiment>/latest.pt          the newest: a second name of the same file
    checkpoints/<experiment>/best.pt            the one with the lowest validation loss
    checkpoints/latest.pt, best.pt              links to those of the run that saved last

`mantrans.checkpoint.state_file` writes and verifies such a file.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from mantrans.checkpoint.atomic import (
    remove_leftovers,
    replacing,
    sync_folder,
    temporary_name,
    write_all,
)
from mantrans.checkpoint.state_file import reason, save, verify
from mantrans.errors import CheckpointError


def newest_intact(directory: str | Path) -> tuple[Path, list[str]]:
    """Return the newest intact checkpoint in `directory`, and why newer ones were skipped.

    Raises:
        CheckpointError: there is no intact checkpoint.
    """
    skipped: list[str] = []
    seen: set[int] = set()
    for path, inode in _by_age(Path(directory)):
        if inode in seen:
            continue
        seen.add(inode)
        try:
            verify(path)
        except CheckpointError as error:
            skipped.append(str(error))
        else:
            return path, skipped
    if skipped:
        found = f"{len(skipped)} damaged; the first: {skipped[0]}"
        raise CheckpointError(f"{directory}: expected an intact checkpoint, got {found}")
    raise CheckpointError(
        f"{directory}: expected a checkpoint (*.pt), got none; without --resume a new run starts"
    )


class CheckpointFolder:
    """The checkpoints of one run. Only one process may hold one: see `training.lock`."""

    def __init__(self, checkpoint_dir: str | Path, experiment_name: str, keep: int) -> None:
        """Create the folder if needed, and remove a killed process's temporary files.

        Raises:
            CheckpointError: the folder cannot be created.
        """
        self.root = Path(checkpoint_dir)
        self.folder = self.root / experiment_name
        self.keep = keep
        with _explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder)

    @property
    def latest(self) -> Path:
        return self.folder / "latest.pt"

    @property
    def best(self) -> Path:
        return self.folder / "best.pt"

    def save(self, step: int, state: dict[str, Any], *, best: bool = False) -> Path:
        """Save the `state` of `step`; name it latest, and best if `best`; remove the oldest.

        Returns the path of latest.pt, the name that stays the same.

        Raises:
            CheckpointError: it could not be written; latest.pt and best.pt are still intact.
        """
        path = self.folder / f"step_{step:08d}.pt"
        save(path, state)
        self.name(path, best=best)
        return self.latest

    def name(self, path: Path, *, best: bool) -> None:
        """Name one of this folder's checkpoints latest, and best if `best`; remove the oldest.

        This is the second half of `save`. A resumed run repeats it, because the earlier process may
        have been killed between the two.

        Raises:
            CheckpointError: the folder cannot be changed.
        """
        with _explained(path):
            _name_too(path, self.latest)
            if best:
                _name_too(path, self.best)
            sync_folder(self.folder)
            self._rotate()
            self._link("latest.pt")
            self._link("best.pt")

    def _rotate(self) -> None:
        """Remove all numbered checkpoints but the last `keep` written."""
        numbered = [path for path, _ in _by_age(self.folder) if path.name.startswith("step_")]
        for path in numbered[self.keep :]:
            path.unlink()

    def _link(self, name: str) -> None:
        """Point the link `name` above the runs at this run's file, or remove the link."""
        link = self.root / name
        if link.exists() and not link.is_symlink():
            raise CheckpointError(
                f"{link}: is a file, not a link, and is left alone; move it away so that it can "
                f"point to {self.folder / name}"
            )
        if (self.folder / name).exists():
            temporary = temporary_name(link)
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
            temporary.symlink_to(Path(self.folder.name) / name)
            os.replace(temporary, link)
        elif link.is_symlink():
            link.unlink()


def _by_age(folder: Path) -> list[tuple[Path, int]]:
    """Return the checkpoints in `folder` and their inodes, the last written first.

    Sorted by time, not by step: a run resumed from an older step leaves files with higher numbers.
    """
    found = []
    with contextlib.suppress(OSError):
        for path in folder.glob("*.pt"):
            with contextlib.suppress(OSError):
                status = path.stat()
                found.append((status.st_mtime_ns, path.name, path, status.st_ino))
    return [(path, inode) for _, _, path, inode in sorted(found, reverse=True)]


def _name_too(path: Path, other: Path) -> None:
    """Make `other` a second name of the file `path`; `other` exists at all times."""
    temporary = temporary_name(other)
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    try:
        os.link(path, temporary)
    except OSError:
        # A file system without hard links: write a second copy.
        with replacing(other) as file, open(path, "rb") as source:
            _copy(source.read, file)
        return
    os.replace(temporary, other)
    # Renaming one name of a file over another name of the same file leaves both.
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()


def _copy(read: Callable[[int], bytes], file: FileIO) -> None:
    while part := read(1 << 20):
        write_all(file, part)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn an OSError into a CheckpointError about `path`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path}: the checkpoint folder cannot be changed ({reason(error)})"
        ) from None
