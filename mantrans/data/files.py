"""Which local files hold text or tokens, and how they are opened.

A `.txt` or `.jsonl` may be compressed: `.txt.gz`, `.jsonl.zst`. Files of other kinds, hidden ones
and folders that were entered before are passed over, which is said.
"""

from __future__ import annotations

import gzip
import io
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from mantrans.data.foreign import SAMPLE, require_text
from mantrans.errors import DataError, single_line

KINDS = (".txt", ".jsonl", ".parquet", ".bin")
COMPRESSED = (".gz", ".zst")
ACCEPTED = ".txt, .jsonl (also as .gz or .zst), .parquet or .bin (tokens)"
_BUFFER = 2**18  # bytes read at once
_SPECIAL = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


class LocalFiles(NamedTuple):
    """The files of a path, sorted, and notes on what was passed over or followed."""

    files: list[Path]
    notes: list[str]


def kind_of(file: Path) -> str | None:
    """The member of KINDS that the name stands for, compressed or not; None for none."""
    suffixes = [suffix.lower() for suffix in file.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSED:
        return suffixes[0] if suffixes[0] in KINDS[:2] else None
    return suffixes[-1] if suffixes and suffixes[-1] in KINDS else None


def local_files(path: str | Path, name: str = "data.path") -> LocalFiles:
    """The file, or the folder's files of the accepted kinds at any depth.

    A linked folder is entered like any other, each folder once. `name`: what an error calls the
    path. Raises DataError if there is no such file, and OSError for a folder that cannot be read.
    """
    root = Path(path).expanduser()
    expected = f"{name}: expected a file {ACCEPTED}, or a folder"
    try:
        mode = stat.S_IFMT(root.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{expected}, got no such path: {root}") from None
    if mode in _SPECIAL:
        raise DataError(
            f"{expected}, got {_SPECIAL[mode]}: {root}; write the text to a file first, since it "
            "is read more than once"
        )
    if not root.is_dir():
        if kind_of(root) is None:
            raise DataError(f"{expected}, got {root}")
        return LocalFiles([root], [])
    found: list[Path] = []
    links: list[Path] = []
    others = 0
    for folder, names in _folders(root, links):
        for file in (folder / name for name in names if not name.startswith(".")):
            if kind_of(file) and file.is_file():
                found.append(file)
            else:
                others += 1
    if not found:
        raise DataError(f"{name}: expected a folder with files {ACCEPTED}, got none in {root}")
    notes = []
    if links:
        shown = single_line(", ".join(str(link.relative_to(root)) for link in links[:3]))
        notes.append(f"linked folders were followed: {shown}{', ...' if len(links) > 3 else ''}")
    if others:
        where = single_line(str(root))
        notes.append(f"files in {where} that are not {ACCEPTED}, and are not read: {others:,}")
    return LocalFiles(sorted(found), notes)


class _Counting(io.FileIO):
    """A file that calls `count` with the number of bytes that were read of it."""

    def __init__(self, file: Path, count: Callable[[int], None]) -> None:
        super().__init__(file, "rb")
        self.count = count

    def readinto(self, buffer: Any) -> int:
        n_bytes = super().readinto(buffer) or 0
        self.count(n_bytes)
        return n_bytes


@contextmanager
def opened(file: Path, count: Callable[[int], None] = lambda n: None) -> Iterator[IO[bytes]]:
    """The bytes of a text file, decompressed, after a look at what they are.

    count: called with the number of bytes, compressed ones, that were read of the file.
    DataError for what is not UTF-8 text, OSError for what cannot be read.
    """
    try:
        with _decompressed(file, lambda n: None) as stream:
            require_text(stream.read(SAMPLE), file)
        with _decompressed(file, count) as stream:
            yield stream
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{file}: expected whole gzip data, got: {single_line(str(error))}"
        ) from None
    except OSError as error:
        if error.errno is None:  # Arrow's, about the data
            raise DataError(
                f"{file}: expected whole Zstandard data, got: {single_line(str(error))}"
            ) from None
        raise


def _decompressed(file: Path, count: Callable[[int], None]) -> IO[bytes]:
    suffix = file.suffix.lower()
    raw = io.BufferedReader(_Counting(file, count), _BUFFER)
    if suffix == ".gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    if suffix == ".zst":
        try:
            import pyarrow
        except ImportError:
            raise DataError(
                f"{file}: .zst needs the package pyarrow (pip install pyarrow); .gz needs none"
            ) from None
        return io.BufferedReader(pyarrow.input_stream(raw, compression="zstd"))
    return raw


def _folders(root: Path, links: list[Path]) -> Iterator[tuple[Path, list[str]]]:
    """(folder, names of what is no folder) of each folder below `root`, once. Real folders come
    before linked ones, which are added to `links` as they are entered."""
    entered: set[tuple[int, int]] = set()
    waiting = [root]
    for start in waiting:  # grows on the way
        for place, names, others in os.walk(start, onerror=_refuse):
            folder, facts = Path(place), os.stat(place)
            if (facts.st_dev, facts.st_ino) in entered:
                names.clear()
                continue
            entered.add((facts.st_dev, facts.st_ino))
            if folder == start and start != root:
                links.append(start)
            names[:] = sorted(name for name in names if not name.startswith("."))
            waiting += [folder / name for name in names if (folder / name).is_symlink()]
            yield folder, others


def _refuse(error: OSError) -> None:
    raise error
