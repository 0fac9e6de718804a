"""The hashes of files that were read before, so that an unchanged file is not read again.

A file counts as unchanged while its path, device, inode, size and both times of change (mtime and
ctime, in nanoseconds) are the same as when it was read. Every write through the file system sets
ctime to the present, and no program can set it to anything else. So this assumes that nothing
writes to the disk without the file system, that bits do not flip on it, and that no one sets the
clock back to the same nanosecond. To verify all files again, delete the record.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mantrans.checkpoint.atomic import open_regular, replacing, write_all

_SETTLED = 2_000_000_000  # ns: changes further apart than this have different times


class KnownFiles:
    """Hashes by file, kept in the JSON file `record`, which may be absent, damaged or read-only."""

    def __init__(self, record: Path) -> None:
        self.record, self._is_new = record, False
        self._known: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError, RecursionError):
            with open_regular(record) as file:
                found = json.load(file)
            self._known = found if isinstance(found, dict) else {}

    def hash(self, file: Path, read: Callable[[Path], str]) -> str:
        """What `read(file)` returns, or what it returned before for the unchanged file.

        Raises OSError for a missing file, and whatever `read` raises.
        """
        name, facts = str(file.resolve()), _facts(file)
        known = self._known.get(name)
        if isinstance(known, list) and known[:-1] == facts and isinstance(known[-1], str):
            return known[-1]
        begun = time.time_ns()
        value = read(file)
        # A file that changed just now may change again without a change of its times.
        if _facts(file) == facts and begun - facts[-1] > _SETTLED:
            self._known[name], self._is_new = [*facts, value], True
        return value

    def save(self) -> None:
        """Save the new hashes; if that fails, the files are read again next time."""
        if self._is_new:
            with contextlib.suppress(OSError), replacing(self.record) as record:
                write_all(record, json.dumps(self._known).encode())


def content_hash(file: Path) -> str:
    """blake2b of the file's bytes, in bounded memory."""
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        while chunk := stream.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


def _facts(file: Path) -> list[int]:
    found = os.stat(file)
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
