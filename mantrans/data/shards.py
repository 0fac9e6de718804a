"""Tokens on disk: one memory-mapped file per split, checked before use.

Layout, little-endian:

    0 .. 7       magic
    8 .. 23      blake2b-128 of bytes 24 .. 4095
    24 .. 4095   header: JSON, padded with spaces
    4096 ..      the tokens, uint16 where the vocabulary allows it, else uint32

The header has the numbers of tokens, of documents and of bytes of their text, the largest token and
a blake2b-128 of the tokens. A reader first checks the file's size, both checksums and the largest
token. So a flipped byte, a truncation or a header that claims 2^60 tokens is refused, and an id
outside the vocabulary never reaches an embedding.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from mantrans.checkpoint.atomic import open_regular
from mantrans.data.known import KnownFiles
from mantrans.errors import DataError

MAGIC = b"MTTOKEN1"
HEADER_BYTES = 4096
_CHECKED_FROM = len(MAGIC) + 16
_CHUNK = 2**22  # bytes read at once while checking
_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_COUNTS = ("n_tokens", "n_documents", "n_bytes", "max_token")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smaller of uint16 and uint32 that holds ids 0 .. vocab_size-1."""
    return _DTYPES["uint16" if vocab_size <= 2**16 else "uint32"]


class TokenFileWriter:
    """Writes one token file, which is complete after `close`.

    Use as a context manager. `facts` (small, JSON) are kept in the header. kept: what is in an
    earlier, unfinished file can be taken over by `adopt`, before anything is written.
    """

    def __init__(
        self,
        path: str | Path,
        vocab_size: int,
        facts: dict[str, Any] | None = None,
        kept: bool = False,
    ) -> None:
        self.path = Path(path)
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)
        self.facts = dict(facts or {})
        self.n_tokens = self.n_documents = self.n_bytes = 0
        self.max_token = 0
        self._digest = hashlib.blake2b(digest_size=16)
        is_kept = kept and self.path.is_file()
        self._file: BinaryIO = self.path.open("r+b" if is_kept else "w+b")
        self._file.write(b"\0" * HEADER_BYTES)

    def write(self, tokens: Sequence[int] | np.ndarray, n_bytes: int, n_documents: int) -> str:
        """Append tokens that encode `n_bytes` bytes of text and end `n_documents` documents.

        Returns a checksum of these tokens.
        """
        array = np.asarray(tokens, dtype=np.int64)
        if not array.size:
            return _checksum(b"")
        if array.min() < 0 or array.max() >= self.vocab_size:
            raise DataError(
                f"{self.path}: expected tokens 0 to {self.vocab_size - 1}, got "
                f"{array.min()} to {array.max()}"
            )
        packed = array.astype(self.dtype).tobytes()
        self._file.write(packed)
        self._count(packed, n_bytes, n_documents)
        return _checksum(packed)

    def adopt(self, n_tokens: int, n_bytes: int, n_documents: int, checksum: str) -> bool:
        """Take over what an earlier process wrote here by a call of `write` that returned
        `checksum`. False, and nothing is taken over, unless it is there unchanged."""
        start, size = self._file.tell(), n_tokens * self.dtype.itemsize
        if not 0 <= size <= os.fstat(self._file.fileno()).st_size - start:
            return False
        packed = self._file.read(size)
        if _checksum(packed) != checksum:
            self._file.seek(start)
            return False
        self._count(packed, n_bytes, n_documents)
        return True

    def flush(self) -> None:
        """Give what was written to the system, which has it even if this process is killed."""
        self._file.flush()

    def _count(self, packed: bytes, n_bytes: int, n_documents: int) -> None:
        self._digest.update(packed)
        if packed:
            largest = int(np.frombuffer(packed, self.dtype).max())
            self.max_token = max(self.max_token, largest)
        self.n_tokens += len(packed) // self.dtype.itemsize
        self.n_bytes += n_bytes
        self.n_documents += n_documents

    def close(self) -> None:
        """Write the header, and flush everything to the disk."""
        header = {
            "dtype": self.dtype.name,
            "n_tokens": self.n_tokens,
            "n_documents": self.n_documents,
            "n_bytes": self.n_bytes,
            "max_token": self.max_token,
            "checksum": self._digest.hexdigest(),
            "facts": self.facts,
        }
        self._file.truncate()  # what an earlier process wrote and this one did not take over
        self._file.seek(0)
        self._file.write(_packed_header(header))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> TokenFileWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


class TokenStream:
    """A token file, opened and checked; the tokens of a file that is `known` are not read again.

    `tokens`: (len,) uint16 or uint32, mapped, not read; `n_bytes`: UTF-8 bytes of their text,
    without separators; `n_documents`: documents that end in it; `max_token`; `checksum`: hex, of
    the tokens; `facts`: the writer's; `path`.
    """

    def __init__(self, path: str | Path, known: KnownFiles | None = None) -> None:
        self.path = Path(path)
        try:
            with open_regular(self.path) as file:
                header = _read_header(file, self.path)
            read = partial(_summary, dtype=_DTYPES[header["dtype"]])
            _verify(header, known.hash(self.path, read) if known else read(self.path), self.path)
        except OSError as error:
            raise DataError(
                f"token file {self.path} cannot be read: {error.strerror or error}; if it is lost, "
                f"delete the folder {self.path.parent} and run again to rewrite it"
            ) from None
        self.dtype = _DTYPES[header["dtype"]]
        self.n_documents: int = header["n_documents"]
        self.n_bytes: int = header["n_bytes"]
        self.max_token: int = header["max_token"]
        self.checksum: str = header["checksum"]
        self.facts: dict[str, Any] = header["facts"]
        self.tokens: np.ndarray = self._mapped(header["n_tokens"])

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        return f"TokenStream({str(self.path)!r}, {len(self):,} tokens)"

    def read(self, start: int, stop: int) -> np.ndarray:
        """A copy of tokens[start:stop], read: pages of a mapped file, once touched, would count as
        this process's memory."""
        offset = HEADER_BYTES + start * self.dtype.itemsize
        return np.fromfile(self.path, self.dtype, stop - start, offset=offset)

    def require_vocabulary(self, vocab_size: int) -> None:
        """DataError if a token is not below `vocab_size`."""
        if len(self) and self.max_token >= vocab_size:
            raise DataError(
                f"token file {self.path}: expected tokens 0 to {vocab_size - 1}, got "
                f"{self.max_token}: it was written with another tokenizer"
            )

    def _mapped(self, n_tokens: int) -> np.ndarray:
        if n_tokens == 0:  # an empty range cannot be mapped
            return np.empty(0, dtype=self.dtype)
        return np.memmap(self.path, self.dtype, "r", HEADER_BYTES, (n_tokens,))


def _checksum(packed: bytes) -> str:
    return hashlib.blake2b(packed, digest_size=16).hexdigest()


def _packed_header(header: dict[str, Any]) -> bytes:
    text = json.dumps(header, sort_keys=True).encode()
    room = HEADER_BYTES - _CHECKED_FROM
    if len(text) > room:
        raise ValueError(f"a token file's header has room for {room} bytes, not {len(text)}")
    text = text.ljust(room)
    return MAGIC + hashlib.blake2b(text, digest_size=16).digest() + text


def _read_header(file: BinaryIO, path: Path) -> dict[str, Any]:
    """The header, after checking its checksum and the file size that it gives."""
    raw = file.read(HEADER_BYTES)
    if raw[: len(MAGIC)] != MAGIC:
        raise _damaged(path, "it does not start like a token file")
    if len(raw) < HEADER_BYTES:
        raise _damaged(path, f"it ends after {len(raw)} bytes, inside its header")
    text = raw[_CHECKED_FROM:]
    if hashlib.blake2b(text, digest_size=16).digest() != raw[len(MAGIC) : _CHECKED_FROM]:
        raise _damaged(path, "its header's checksum is wrong")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise _damaged(path, "its header is not JSON") from None
    if not isinstance(header, dict) or header.get("dtype") not in _DTYPES:
        raise _damaged(path, "its header does not name the token type uint16 or uint32")
    for name in _COUNTS:
        if type(header.get(name)) is not int or header[name] < 0:
            raise _damaged(path, f"its header's {name} is not a count")
    if not isinstance(header.get("checksum"), str) or not isinstance(header.get("facts"), dict):
        raise _damaged(path, "its header lacks a checksum or facts")
    expected = HEADER_BYTES + header["n_tokens"] * _DTYPES[header["dtype"]].itemsize
    found = os.fstat(file.fileno()).st_size
    if found != expected:
        raise _damaged(path, f"expected {expected:,} bytes as in its header, got {found:,}")
    return header


def _summary(path: Path, dtype: np.dtype[Any]) -> str:
    """The tokens' checksum and their largest, in one pass and in bounded memory."""
    digest, largest = hashlib.blake2b(digest_size=16), 0
    with open_regular(path) as file:
        file.seek(HEADER_BYTES)
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            largest = max(largest, int(np.frombuffer(chunk, dtype).max()))
    return f"{digest.hexdigest()} {largest}"


def _verify(header: dict[str, Any], summary: str, path: Path) -> None:
    checksum, largest = summary.split()
    if checksum != header["checksum"]:
        raise _damaged(path, "its tokens' checksum is wrong")
    if int(largest) != header["max_token"]:
        raise _damaged(path, "its largest token is not the one in its header")


def _damaged(path: Path, what: str) -> DataError:
    return DataError(
        f"token file {path} is damaged: {what}; delete the folder {path.parent} and run again to "
        "rewrite it"
    )
