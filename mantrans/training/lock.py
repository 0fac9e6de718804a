"""Keeps a run's folder to one process at a time.

The lock is the kernel's, by way of `filelock`: it ends with the process however that ends, so a
dead one leaves nothing to clean up. A second file beside it only tells who holds it.
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
    """Hold `directory`, made if need be, for as long as the `with` statement lasts.

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
        with contextlib.suppress(OSError):  # a full disk: the lock holds without the number
            holder.write_text(f"{os.getpid()}\n")
        yield
    finally:
        lock.release()


def _name_of(holder: Path) -> str:
    """Return who holds the lock, as far as it can be told."""
    with contextlib.suppress(OSError, ValueError):
        return f"process {int(holder.read_bytes()[:20])}"
    return "another process"
