"""The checkpoints of a run: which are kept, their names, and which is the newest intact one.

    checkpoints/<experiment>/step_00001000.pt   the newest few
    checkpoints/<experiment>/latest.pt          the newest: a second name of the same file
    checkpoints/<experiment>/best.pt            the one with the lowest validation loss
    checkpoints/<experiment>/abandoned.1/       those after the one that a run was resumed from
    checkpoints/latest.pt, best.pt              links to those of the run that saved last

Which one is newer is decided by what is inside the files (`state_file.Order`): copies, moves and
clocks change their times, and a run resumed from an older step has lower steps again.

`mantrans.checkpoint.state_file` writes and verifies such a file.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Callable, Iterator
from io import FileIO
from itertools import count
from pathlib import Path
from typing import Any

from mantrans.checkpoint.atomic import (
    remove_leftovers,
    replacing,
    sync_folder,
    temporary_name,
    write_all,
)
from mantrans.checkpoint.state_file import Order, order, reason, save, verify
from mantrans.errors import CheckpointError

_STEP = re.compile(r"^step_([0-9]{1,18})\.pt$")


def newest_intact(directory: str | Path) -> tuple[Path, list[str]]:
    """Return the newest intact checkpoint in `directory`, and why newer ones were skipped.

    Raises:
        CheckpointError: there is no intact checkpoint.
    """
    skipped: list[str] = []
    seen: set[int] = set()
    for path in _newest_first(Path(directory)):
        inode = path.stat().st_ino
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


def by_step(directory: Path) -> dict[int, Path]:
    """A checkpoint of each step in `directory`; one that does not say its step has its name's."""
    found = {}
    for path in sorted(_files(directory)):  # step_*.pt comes after other names of the same file
        name, inside = _STEP.search(path.name), order(path)
        step = inside.step if inside else int(name[1]) if name else 0
        if step:
            found[step] = path
    return found


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
        self.saves = max((o.saves for p in _files(self.folder) if (o := order(p))), default=0)

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
        save(path, state, saves=self.saves + 1)
        self.saves += 1
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

    def set_aside_later_than(self, path: Path) -> Path | None:
        """Move the checkpoints that were saved after `path`, which a run is resumed from, to a
        folder of their own, and return it; None if there are none. latest.pt is then `path`.

        Raises:
            CheckpointError: the folder cannot be changed.
        """
        ours = order(path) or Order(0, 0)
        later = [p for p in _files(self.folder) if (found := order(p)) and found > ours]
        if not later:
            return None
        with _explained(self.folder):
            for number in count(1):
                aside = self.folder / f"abandoned.{number}"
                with contextlib.suppress(FileExistsError):
                    aside.mkdir()
                    break
            for other in later:
                _name_too(other, aside / other.name)
            sync_folder(aside)
            for other in later:
                if other != self.latest:
                    other.unlink()
            if not path.resolve().parent.samefile(self.folder):
                own = self.folder / f"step_{ours.step:08d}.pt"
                _name_too(path, own)
                path = own
            _name_too(path, self.latest)
            sync_folder(self.folder)
        return aside

    def _rotate(self) -> None:
        """Remove all numbered checkpoints but the newest `keep`; leave what cannot be read."""
        found = [(o, p) for p in _files(self.folder) if (o := order(p)) and _STEP.search(p.name)]
        for _, path in sorted(found, reverse=True)[self.keep :]:
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


def _files(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, in no order."""
    with contextlib.suppress(OSError):
        return [path for path in folder.glob("*.pt") if path.exists()]
    return []


def _newest_first(folder: Path) -> list[Path]:
    """The checkpoints in `folder`. One that does not say its order has that of its name's step
    among the others, or without one is the newest, so that it is not passed over in silence."""
    orders = {path: order(path) for path in _files(folder)}

    def place(path: Path) -> tuple[float, int, bool, str]:
        found = orders[path]
        if found is not None:
            return (*found, False, path.name)
        name = _STEP.search(path.name)
        if name is None:
            return math.inf, 0, True, path.name
        step = int(name[1])
        saves = max((o.saves for o in orders.values() if o and o.step < step), default=0)
        return saves, step, True, path.name

    return sorted(orders, key=place, reverse=True)


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
