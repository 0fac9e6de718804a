"""Allows one process at a time in a run's folder.

`filelock` takes a lock of the operating system. It ends with its process, so a killed process
leaves nothing to clean up. A second file beside it only tells who holds the lock.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import filelock

from mantrans.errors import MantransError


@contextlib.contextmanager
def run_lock(directory: str | Path) -> Iterator[None]:
    """Create `directory` if needed and lock it during the `with` statement.

    Raises:
        MantransError: another process holds it, or the folder cannot be written.
    """
    directory = Path(directory)
    lock, holder = filelock.FileLock(directory / ".lock", timeout=0), directory / ".lock.pid"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise MantransError(
            f"{directory}: is in use by {_name_of(holder)}; wait for it, or choose another "
            "training.experiment_name"
        ) from None
    except OSError as error:
        raise MantransError(
            f"{directory}: the run's folder cannot be written ({error.strerror})"
        ) from None
    try:
        with contextlib.suppress(OSError):  # on a full disk the lock holds without the number
            holder.write_text(f"{os.getpid()}\n")
        yield
    finally:
        lock.release()


def _name_of(holder: Path) -> str:
    """Return the process that holds the lock, with its id if it can be read."""
    with contextlib.suppress(OSError, ValueError):
        return f"process {int(holder.read_bytes()[:20])}"
    return "another process"
