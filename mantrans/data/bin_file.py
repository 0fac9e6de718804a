"""Files of tokens of other trainers, `.bin`: llm.c's and nanoGPT's, read as they are, and written.

    nanoGPT   tokens, uint16, and nothing else
    llm.c     256 int32: magic number, version, number of tokens, zeros; then the tokens, uint16
              (magic 20240520, version 1) or uint32 (20240801, version 7)

All are little-endian. The end of text is a token among them: in nanoGPT's after each document, in
llm.c's before each. Sources: dev/data/data_common.py of karpathy/llm.c, data/*/prepare.py of
karpathy/nanoGPT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mantrans.checkpoint.atomic import open_regular, replacing, write_all
from mantrans.data.shards import TokenStream
from mantrans.data.tokenizer import Tokenizer
from mantrans.errors import DataError

LLMC, NANOGPT = "llmc", "nanogpt"
FORMATS = (LLMC, NANOGPT)
_HEADER = 256  # int32
_VERSIONS: dict[int, tuple[int, np.dtype[Any]]] = {
    20240520: (1, np.dtype("<u2")),
    20240801: (7, np.dtype("<u4")),
}
_DATES = range(20240101, 20250101)  # of llm.c's magic numbers, its models' and tasks' too
_MOST = 2**31 - 1  # tokens that the header's number can be
_CHUNK = 2**20  # tokens read or written at once


class _Layout(NamedTuple):
    """Where the tokens of a file are; `start`: bytes before them."""

    dtype: np.dtype[Any]
    start: int
    tokens: int


def read_bin(
    file: Path, tokenizer: Tokenizer, count: Callable[[int], None] = lambda n: None
) -> Iterator[tuple[np.ndarray, bool]]:
    """(tokens, whether a document ends with them) of all tokens of the file, in order, cut after
    each end of text, which stays among them. The end of the file ends a document too.

    count: called with the bytes of the file that were read.
    Raises DataError for a file of another kind, and a token that the tokenizer does not have.
    """
    dtype, start, n_tokens = _layout(file)
    count(start)
    for first in range(0, n_tokens, _CHUNK):
        size = min(_CHUNK, n_tokens - first)
        chunk = np.fromfile(file, dtype, size, offset=start + first * dtype.itemsize)
        if len(chunk) < size:
            raise DataError(f"{file}: expected {n_tokens:,} tokens, got {first + len(chunk):,}")
        _require_vocabulary(file, chunk, first, tokenizer)
        count(chunk.nbytes)
        parts = np.split(chunk, np.flatnonzero(chunk == tokenizer.eot_id) + 1)
        for part in (part for part in parts if part.size):
            yield part, bool(part[-1] == tokenizer.eot_id)
    if n_tokens and chunk[-1] != tokenizer.eot_id:
        yield chunk[:0], True


def write_bin(stream: TokenStream, folder: Path, name: str, form: str) -> list[Path]:
    """Write a stream's tokens as folder/NAME.bin of llm.c's or nanoGPT's form (`FORMATS`); those
    of llm.c with more than 2^31 - 1 tokens as NAME_000001.bin, NAME_000002.bin, ...

    Raises DataError where nanoGPT's uint16 does not hold the tokens, OSError as for any file.
    """
    dtype = np.dtype("<u2") if form == NANOGPT else stream.dtype
    if stream.max_token > np.iinfo(dtype).max:
        raise DataError(
            f"--format: expected {LLMC}, whose tokens may be uint32, since nanoGPT's are uint16 "
            f"and {stream.path.name} has tokens up to {stream.max_token:,}, got {NANOGPT}"
        )
    most = _MOST if form == LLMC else max(len(stream), 1)
    starts = range(0, max(len(stream), 1), most)
    files = [folder / f"{name}_{number:06d}.bin" for number in range(1, len(starts) + 1)]
    files = files if len(files) > 1 else [folder / f"{name}.bin"]
    for file, start in zip(files, starts, strict=True):
        stop = min(start + most, len(stream))
        with replacing(file) as raw:
            write_all(raw, _header(stream.dtype, stop - start) if form == LLMC else b"")
            for first in range(start, stop, _CHUNK):
                tokens = stream.read(first, min(first + _CHUNK, stop))
                write_all(raw, tokens.astype(dtype).tobytes())
    return files


def _header(dtype: np.dtype[Any], n_tokens: int) -> bytes:
    """llm.c's, of a file with that many tokens."""
    header = np.zeros(_HEADER, dtype="<i4")
    magic = next(magic for magic, (_, kind) in _VERSIONS.items() if kind == dtype)
    header[:3] = magic, _VERSIONS[magic][0], n_tokens
    return header.tobytes()


def _layout(file: Path) -> _Layout:
    """What the file says of itself, compared with its size."""
    with open_regular(file) as raw:
        head = raw.read(4 * _HEADER)
        size = file.stat().st_size
    magic, swapped = (int.from_bytes(head[:4], order) for order in ("little", "big"))
    if swapped in _VERSIONS:
        raise DataError(f"{file}: expected llm.c's tokens, little-endian, got big-endian")
    if magic not in _DATES:
        if size % 2:
            raise DataError(
                f"{file}: expected nanoGPT's tokens, an even number of bytes, or llm.c's header, "
                f"got {size:,} bytes"
            )
        return _Layout(np.dtype("<u2"), 0, size // 2)
    if magic not in _VERSIONS:
        raise DataError(
            f"{file}: expected llm.c's tokens, magic number {' or '.join(map(str, _VERSIONS))}, "
            f"got {magic}"
        )
    if len(head) < 4 * _HEADER:
        raise DataError(f"{file}: expected llm.c's header of 1,024 bytes, got {len(head):,}")
    version, dtype = _VERSIONS[magic]
    _, found, n_tokens = (int(number) for number in np.frombuffer(head, "<i4")[:3])
    if found != version:
        raise DataError(f"{file}: expected version {version} in llm.c's header, got {found}")
    expected = len(head) + n_tokens * dtype.itemsize
    if n_tokens < 0 or size != expected:
        raise DataError(
            f"{file}: expected {expected:,} bytes for the {n_tokens:,} tokens of {dtype.name} in "
            f"its header, got {size:,}"
        )
    return _Layout(dtype, len(head), n_tokens)


def _require_vocabulary(file: Path, chunk: np.ndarray, first: int, tokenizer: Tokenizer) -> None:
    if int(chunk.max()) >= tokenizer.vocab_size:
        place = int(np.argmax(chunk >= tokenizer.vocab_size))
        raise DataError(
            f"{file}: expected tokens 0 to {tokenizer.vocab_size - 1}, as of data.tokenizer "
            f"{tokenizer.name!r}, got {chunk[place]} at token {first + place:,}"
        )
