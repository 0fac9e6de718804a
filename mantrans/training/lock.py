"""Allows one process at a time in a run's folder.

The lock is of the operating system, on a file beside the folder, so that the folder can be renamed
while it is locked. It ends with its process: a killed one leaves a file, but no lock. The file
tells who holds it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from mantrans.errors import MantransError


@contextlib.contextmanager
def run_lock(directory: str | Path) -> Iterator[None]:
    """Lock the run's folder `directory` during the `with` statement. It need not exist; the folder
    that it is in is created if needed.

    Raises:
        MantransError: another process holds the lock, or it cannot be written.
    """
    directory = Path(directory)
    file = directory.parent / f".{directory.name}.lock"
    try:
        descriptor = _lock(file)
    except BlockingIOError:
        raise MantransError(
            f"{directory}: is in use by {_holder(file)}; wait for it, or choose another "
            "training.experiment_name"
        ) from None
    except OSError as error:
        raise MantransError(
            f"{directory}: the run's folder cannot be written ({error.strerror})"
        ) from None
    try:
        with contextlib.suppress(OSError):  # on a full disk the lock holds without the number
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink()
        os.close(descriptor)


def _lock(file: Path) -> int:
    """Open and lock the file. BlockingIOError if another process has it, OSError for others."""
    # Not through a link; and not waiting for the other end of a planted FIFO.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(file, flags, 0o666)
        except FileNotFoundError:  # another start was refused and removed the folder again
            continue
        try:
            opened = os.fstat(descriptor)
            if not stat.S_ISREG(opened.st_mode):
                raise OSError(0, f"{file.name} is not a regular file")
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(opened, os.stat(file)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed it since it was opened: lock the new one


def _holder(file: Path) -> str:
    """The process that holds the lock, with its id if it can be read."""
    with contextlib.suppress(OSError, ValueError):
        return f"process {int(file.read_bytes()[:20])}"
    return "another process"
