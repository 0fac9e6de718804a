"""Where things lie in a checkpoint file, found without trusting it.

A checkpoint is the zip archive that `torch.save` writes, every entry stored uncompressed, plus an
archive comment of ours:

    archive/data.pkl       the state, with tensors as references to records
    archive/data/0, 1, …   the records: the bytes of one tensor storage each
    …                      version marks of torch
    directory              names, places, sizes and a CRC-32 of every entry
    comment                "mantrans-checkpoint 1 <file size> <BLAKE2b of everything but records>"

So each record is guarded by its CRC-32 in the directory, and the directory with all else by the
digest: a changed byte or a missing end is seen wherever it is. Any program that reads zip or
`torch.load(weights_only=True)` can read the file too.

The layout of the zip structures is that of PKWARE's APPNOTE.TXT 6.3, sections 4.3.7, 4.3.12,
4.3.14, 4.3.16 and 4.5.3.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import struct
import zlib
from io import FileIO
from typing import NamedTuple

from mantrans.checkpoint.atomic import write_all

MAX_DIRECTORY_BYTES = 16 << 20
MAX_PICKLE_BYTES = 16 << 20
_CHUNK = 1 << 20

_LOCAL = struct.Struct("<4s22xHH")
_CENTRAL = struct.Struct("<4s4xHH4xIIIHHH8xI")
_END = struct.Struct("<4s4xHHIIH")
_END64 = struct.Struct("<4s28xQQQ")
_COMMENT_FORM = "mantrans-checkpoint 1 {size:020d} {digest}"
_DIGEST_BYTES = 32
COMMENT_LENGTH = len(_COMMENT_FORM.format(size=0, digest="0" * (2 * _DIGEST_BYTES)))


class DamagedError(Exception):
    """The file is not what `seal` left; the text says in what."""


class Entry(NamedTuple):
    """One file inside the archive; its bytes lie at [offset, offset + size)."""

    name: str
    offset: int
    size: int
    crc: int

    @property
    def is_record(self) -> bool:
        """Whether this holds a tensor storage."""
        return self.name.startswith("data/")


def seal(file: FileIO) -> None:
    """Add the comment to the archive `torch.save` has just written to `file`, open for both.

    Raises:
        DamagedError: it is not such an archive, or one that would not be accepted when read.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(size - 2)
    write_all(file, struct.pack("<H", COMMENT_LENGTH))
    entries = _directory(file, size)
    if any(e.size > MAX_PICKLE_BYTES for e in entries if not e.is_record):
        raise DamagedError(f"its plain data exceed {MAX_PICKLE_BYTES >> 20} MiB")
    comment = _comment(file, entries, size)
    file.seek(size)
    write_all(file, comment)


def open_sealed(file: FileIO) -> dict[str, Entry]:
    """Return the entries of a sealed archive by name, all but the records verified.

    Raises:
        DamagedError: the file is cut short, changed, or not a sealed archive.
    """
    total = os.fstat(file.fileno()).st_size
    size = total - COMMENT_LENGTH
    if size < _END.size or _read(file, 0, 4) != b"PK\x03\x04":
        raise DamagedError("it does not begin as a checkpoint does")
    comment = _read(file, size, COMMENT_LENGTH)
    if not comment.startswith(b"mantrans-checkpoint"):
        raise DamagedError("it was cut short, or another program wrote it")
    entries = _directory(file, size)
    if _comment(file, entries, size) != comment:
        raise DamagedError("its header has changed since it was written")
    return {entry.name: entry for entry in entries}


def read_entry(file: FileIO, entry: Entry, limit: int) -> bytes:
    """Return an entry's bytes; DamagedError if there are more than `limit`."""
    if entry.size > limit:
        raise DamagedError(f"{entry.name} has {entry.size} bytes; at most {limit} are accepted")
    return _read(file, entry.offset, entry.size)


def read_record(file: FileIO, entry: Entry, into: memoryview | None) -> None:
    """Read a record's bytes into `into` (or nowhere) and hold them against its CRC-32.

    Raises:
        DamagedError: they have changed since they were written.
    """
    file.seek(entry.offset)
    scratch = memoryview(bytearray(_CHUNK)) if into is None else into
    crc, n_read = 0, 0
    while n_read < entry.size:
        start = 0 if into is None else n_read
        part = scratch[start : start + min(_CHUNK, entry.size - n_read)]
        n = file.readinto(part)
        if not n:
            raise DamagedError("it became shorter while it was read")
        crc = zlib.crc32(part[:n], crc)
        n_read += n
    if crc != entry.crc:
        raise DamagedError(f"the tensor in {entry.name} has changed since it was written")


def _read(file: FileIO, offset: int, n_bytes: int) -> bytes:
    file.seek(offset)
    parts = []
    while n_bytes:
        part = file.read(min(n_bytes, _CHUNK))
        if not part:
            raise DamagedError("it ends before its directory says so")
        parts.append(part)
        n_bytes -= len(part)
    return b"".join(parts)


def _comment(file: FileIO, entries: list[Entry], size: int) -> bytes:
    """Return the comment that belongs to the `size` bytes before it."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    position = 0
    for start, end in [(e.offset, e.offset + e.size) for e in entries if e.is_record] + [(size, 0)]:
        while position < start:
            part = _read(file, position, min(_CHUNK, start - position))
            digest.update(part)
            position += len(part)
        position = end
    return _COMMENT_FORM.format(size=size, digest=digest.hexdigest()).encode()


def _directory(file: FileIO, size: int) -> list[Entry]:
    """Return the entries in the order they lie in the file, none overlapping another."""
    start, n_bytes, n_entries = _directory_place(file, size)
    raw = _read(file, start, n_bytes)
    entries: list[Entry] = []
    position = 0
    for _ in range(n_entries):
        try:
            entry, position = _central_entry(file, raw, position, start)
        except (struct.error, UnicodeDecodeError):
            raise DamagedError("its directory cannot be read") from None
        entries.append(entry)
    entries.sort(key=lambda entry: entry.offset)
    for before, after in itertools.pairwise(entries):
        if before.offset + before.size > after.offset:
            raise DamagedError(f"{before.name} and {after.name} overlap")
    if len({entry.name for entry in entries}) != len(entries) or position != n_bytes:
        raise DamagedError("its directory contradicts itself")
    return entries


def _directory_place(file: FileIO, size: int) -> tuple[int, int, int]:
    """Return the directory's offset, its bytes and its entries, from the archive's last bytes."""
    place = size - _END.size
    mark, _, n_entries, n_bytes, start, length = _END.unpack(_read(file, place, _END.size))
    if mark != b"PK\x05\x06" or length != COMMENT_LENGTH:
        raise DamagedError("its end is not a checkpoint's")
    # torch always writes the 64-bit record too, 20 bytes of locator between the two.
    place -= 20 + _END64.size
    if place >= 0:
        mark, n_entries64, n_bytes64, start64 = _END64.unpack(_read(file, place, _END64.size))
        if mark == b"PK\x06\x06":
            n_entries, n_bytes, start = n_entries64, n_bytes64, start64
    if n_bytes > MAX_DIRECTORY_BYTES or start + n_bytes > size:
        raise DamagedError(f"its directory claims {n_bytes} bytes at {start} in a file of {size}")
    if n_entries * _CENTRAL.size > n_bytes:
        raise DamagedError(f"its directory claims {n_entries} entries in {n_bytes} bytes")
    return start, n_bytes, n_entries


def _central_entry(file: FileIO, raw: bytes, position: int, end: int) -> tuple[Entry, int]:
    """Return the entry at `position` of the directory `raw`, and where the next one begins."""
    mark, flags, method, crc, packed, size, n_name, n_extra, n_comment, header = (
        _CENTRAL.unpack_from(raw, position)
    )
    position += _CENTRAL.size
    name = raw[position : position + n_name].decode()
    extra = raw[position + n_name : position + n_name + n_extra]
    size, packed, header = _wide(extra, size, packed, header)
    if mark != b"PK\x01\x02" or flags & 1 or not name.startswith("archive/"):
        raise DamagedError("its directory is not a checkpoint's")
    if method != 0 or packed != size:
        raise DamagedError(f"{name} is compressed; accepted: plain bytes")
    if header + _LOCAL.size > end:
        raise DamagedError(f"{name} lies outside the file")
    mark, n_local_name, n_local_extra = _LOCAL.unpack(_read(file, header, _LOCAL.size))
    offset = header + _LOCAL.size + n_local_name + n_local_extra
    if mark != b"PK\x03\x04" or offset + size > end:
        raise DamagedError(f"{name} claims {size} bytes, more than there are")
    name = name.removeprefix("archive/")
    return Entry(name, offset, size, crc), position + n_name + n_extra + n_comment


def _wide(extra: bytes, *narrow: int) -> list[int]:
    """Replace each 32-bit number that is all ones by its 64-bit form from the extra field."""
    values = list(narrow)
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        if kind == 1:
            place = position + 4
            for index, value in enumerate(values):
                if value == 0xFFFFFFFF:
                    (values[index],) = struct.unpack_from("<Q", extra, place)
                    place += 8
        position += 4 + length
    return values
