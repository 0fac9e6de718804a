"""Files with one JSON object per line that survive kills, full disks and resumed runs.

When `append` returns, the system has the record: a killed process loses none. On a full disk,
records wait in memory and are written when there is room, so the file has no gap. A resumed run
removes the records of the steps that it repeats, so the file has no duplicates.
"""

from __future__ import annotations

import json
import math
import os
from io import FileIO
from pathlib import Path
from typing import Any

from mantrans.checkpoint.atomic import open_regular, replacing, write_all
from mantrans.errors import MantransError

_MAX_WAITING = 100_000


class JsonLines:
    """An append-only file of records, each with an integer "step"."""

    def __init__(self, path: Path, resume_step: int | None) -> None:
        """Open `path`, keeping the records up to and including `resume_step`.

        None starts a new file; an earlier one is kept as `<name>.previous`.

        Raises:
            MantransError: the file cannot be written.
        """
        self.path = path
        self.trouble: str | None = None
        self._waiting: list[bytes] = []
        try:
            if path.exists() and not path.is_file():
                raise OSError(0, "it is not a regular file")
            if resume_step is None:
                if path.exists() and path.stat().st_size:
                    os.replace(path, path.with_name(path.name + ".previous"))
            else:
                _keep_until(path, resume_step)
            self._file: FileIO = open(path, "ab", buffering=0, opener=_opened)  # noqa: SIM115
            self._end = self._file.seek(0, os.SEEK_END)
        except OSError as error:
            raise MantransError(f"{path}: cannot be written ({error.strerror})") from None

    def append(self, record: dict[str, Any]) -> None:
        """Write one record; on a disk error keep it for later and set `trouble`."""
        if len(self._waiting) < _MAX_WAITING:
            self._waiting.append(json.dumps(_strict(record), allow_nan=False).encode() + b"\n")
        lines = b"".join(self._waiting)
        try:
            write_all(self._file, lines)
        except OSError as error:
            self.trouble = f"{self.path}: cannot be written now ({error.strerror})"
            # Remove a partly written line; it is written again later.
            os.ftruncate(self._file.fileno(), self._end)
            return
        self._end += len(lines)
        self._waiting.clear()
        self.trouble = None

    def sync(self) -> None:
        """Flush to the disk, so that a checkpoint is never ahead of its records."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the complete records of a file, without a last line cut short by a kill."""
    with open_regular(path) as file:
        parsed = [_parsed(line) for line in file]
    return [record for record in parsed if record is not None]


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The record in a line; None for anything else."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # cut short; or a hundred thousand brackets
        return None
    return record if isinstance(record, dict) else None


def _opened(path: str, flags: int) -> int:
    """Not through a link, and not waiting for the other end of a FIFO."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def _keep_until(path: Path, step: int) -> None:
    """Remove the records after `step` and malformed lines, by replacing the file atomically."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        at = (_parsed(line) or {}).get("step")
        if isinstance(at, int) and at <= step and line.endswith(b"\n"):
            kept.append(line)
    with replacing(path) as file:
        write_all(file, b"".join(kept))


def _strict(value: Any) -> Any:
    """Return `value` for strict JSON: a number that is not finite becomes its name."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value
