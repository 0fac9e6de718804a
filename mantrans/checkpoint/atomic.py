"""Replaces a file atomically: a reader, or a crash, sees the complete old or new file.

The new content is written to a temporary file in the same folder, flushed to the disk, and renamed
to the old file's name. Then the folder is flushed, so that the rename survives a power failure.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from io import BufferedReader, FileIO
from pathlib import Path

TEMPORARY = ".{name}.{pid}.partial"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[FileIO]:
    """Yield an empty unbuffered file open for reading and writing; it becomes `path` at the end.

    If the body or the disk fails, the temporary file is removed and `path` is as it was.

    Raises:
        OSError: the folder cannot be written to, or the disk is full.
    """
    temporary = temporary_name(path)
    try:
        with open(temporary, "w+b", buffering=0) as file:
            yield file
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)


def open_regular(path: Path) -> BufferedReader:
    """Open a file to read bytes. OSError for a FIFO, a device or the like, which could hang."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def temporary_name(path: Path) -> Path:
    """Return the name of this process's temporary file beside `path`."""
    return path.with_name(TEMPORARY.format(name=path.name, pid=os.getpid()))


def remove_leftovers(folder: Path) -> None:
    """Remove a killed process's temporary files; no other process may write to the folder."""
    for leftover in folder.glob(TEMPORARY.format(name="*", pid="*")):
        with contextlib.suppress(OSError):
            leftover.unlink()


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to the disk, if its file system can."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def write_all(file: FileIO, data: bytes | memoryview) -> None:
    """Write every byte: an unbuffered write may write fewer, for example on a full disk.

    Raises:
        OSError: nothing more can be written.
    """
    view = memoryview(data).cast("B")
    while view:
        n_written = file.write(view[: 1 << 24])
        if not n_written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        view = view[n_written:]
