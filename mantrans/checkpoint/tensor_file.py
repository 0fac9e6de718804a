"""A file of tensors and their digests in safetensors' format, read without trusting it.

    8 bytes   the header's length, little-endian
    header    JSON: {"__metadata__": {name: text}, tensor: {"dtype", "shape", "data_offsets"}, ...}
    tensors   row by row, little-endian, without gaps; wide elements first, so that all are aligned
    seal      the last tensor, U8 (n + 1, 32): SHA-256 of each of the n tensors, then of everything
              else: the length, the header and these digests

A changed byte or a missing end is found wherever it is. Any program that reads safetensors can read
the file and finds one more tensor, `seal`. The package safetensors is not used here: it accepts two
tensors with one name, and reads only through a memory map, where a bad sector ends the process.

The seal finds accidents, not attacks: anyone can write a valid seal. So every size in the header is
compared with the file's length before memory is allocated.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable, Mapping
from io import BufferedReader
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64, "I64": torch.int64, "F32": torch.float32, "I32": torch.int32,
    "BF16": torch.bfloat16, "F16": torch.float16, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA, SEAL = "__metadata__", "seal"
MAX_DIMENSIONS = 8
MAX_HEADER_BYTES = 16 << 20
_MAX_ELEMENTS = 2**48
_DIGEST_BYTES = hashlib.sha256().digest_size
_CHUNK = 1 << 20


class FormatError(Exception):
    """A file that `write` did not write, or data that it cannot write; says what is wrong."""


class Entry(NamedTuple):
    """One tensor in a file, at bytes [offset, offset + size)."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    size: int


# --------------------------------------------------------------------------------------- writing


def write(
    put: Callable[[bytes | memoryview], None],
    metadata: Mapping[str, str],
    tensors: Mapping[str, Tensor],
) -> None:
    """Write a sealed file by calling `put` with the next bytes.

    Tensors may be on any device and of any memory layout; they are copied one at a time.

    Raises:
        FormatError: the header would be larger than `read` accepts.
    """
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    seal = torch.empty((len(ordered) + 1, _DIGEST_BYTES), dtype=torch.uint8)
    head = header_for(metadata, {**ordered, SEAL: seal})
    put(head)
    digests = b""
    for tensor in ordered.values():
        content = content_of(tensor)
        digests += hashlib.sha256(content).digest()
        put(content)
    put(digests + hashlib.sha256(head + digests).digest())


def header_for(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> bytes:
    """The length and the header of a file in safetensors' format with these tensors.

    Raises:
        FormatError: it would be larger than `read` accepts.
    """
    header: dict[str, Any] = {METADATA: dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end],
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    if len(text) > MAX_HEADER_BYTES:
        raise FormatError(f"expected at most {MAX_HEADER_BYTES} bytes of header, got {len(text)}")
    return len(text).to_bytes(8, "little") + text


def content_of(tensor: Tensor) -> bytes | memoryview:
    """A tensor's bytes, row by row."""
    if tensor.numel() == 0:
        return b""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy().data)


# --------------------------------------------------------------------------------------- reading


def read(file: BufferedReader) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the metadata and the tensors of a file, after verifying every byte.

    The tensors map the file's bytes into memory: writing to one does not change the file.

    Raises:
        FormatError: the file is cut short, changed, or not a sealed file.
        OSError: it cannot be read.
    """
    total = os.fstat(file.fileno()).st_size
    head, metadata, header = _header(file, total)
    entries = _entries(header, len(head), total)
    if not entries or entries[-1][:3] != (SEAL, torch.uint8, (len(entries), _DIGEST_BYTES)):
        raise FormatError("it has no seal")
    seal = entries.pop()
    digests = _part(file, seal.offset, seal.size)
    if hashlib.sha256(head + digests[:-_DIGEST_BYTES]).digest() != digests[-_DIGEST_BYTES:]:
        raise FormatError("its header or its seal has changed since it was written")
    for index, entry in enumerate(entries):
        if _digest(file, entry) != digests[index * _DIGEST_BYTES : (index + 1) * _DIGEST_BYTES]:
            raise FormatError(f"the tensor {shown(entry.name)} has changed since it was written")
    memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return metadata, {entry.name: _mapped(memory, entry) for entry in entries}


def read_metadata(file: BufferedReader) -> dict[str, str]:
    """Return what a file says of itself, without verifying anything.

    Raises:
        FormatError, OSError: as for `read`, if not even this can be read.
    """
    return _header(file, os.fstat(file.fileno()).st_size)[1]


def _header(file: BufferedReader, total: int) -> tuple[bytes, dict[str, str], dict[str, Any]]:
    """The bytes before the tensors, and what they say: the metadata, the tensors' claims."""
    head = _part(file, 0, 8)
    n_bytes = int.from_bytes(head, "little")
    if n_bytes > min(MAX_HEADER_BYTES, total - 8):
        raise FormatError(
            f"its header claims {n_bytes} of {total} bytes: it was cut short, or is something else"
        )
    head += _part(file, 8, n_bytes)
    header = parse_json(head[8:])
    metadata = header.pop(METADATA, None) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(type(text) is str for text in metadata.values()):
        raise FormatError("its header is not a checkpoint's")
    return head, metadata, header


def parse_json(text: bytes | str) -> Any:
    """The value of a JSON text.

    Raises:
        FormatError: not JSON, or with a repeated name in an object, NaN or Infinity.
    """
    try:
        text = text if isinstance(text, str) else text.decode()
        return json.loads(text, object_pairs_hook=_distinct, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"its header is not JSON ({type(error).__name__})") from None


def shown(name: str) -> str:
    """A name from a file, printable on one line."""
    return ascii(name[:80])


def _part(file: BufferedReader, offset: int, size: int) -> bytes:
    file.seek(offset)
    part = file.read(size)
    if len(part) < size:
        raise FormatError("it was cut short")
    return part


def _digest(file: BufferedReader, entry: Entry) -> bytes:
    digest = hashlib.sha256()
    for start in range(0, entry.size, _CHUNK):
        digest.update(_part(file, entry.offset + start, min(_CHUNK, entry.size - start)))
    return digest.digest()


def _mapped(memory: mmap.mmap, entry: Entry) -> Tensor:
    if entry.size == 0:
        return torch.empty(entry.shape, dtype=entry.dtype)
    count = entry.size // entry.dtype.itemsize
    flat = torch.frombuffer(memory, dtype=entry.dtype, count=count, offset=entry.offset)
    return flat.view(entry.shape)


def _entries(header: dict[str, Any], start: int, end: int) -> list[Entry]:
    """The tensors in file order; checks that they fill [start, end) without gap or overlap."""
    entries = [_entry(name, claim, start) for name, claim in header.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.size))
    position = start
    for entry in entries:
        if entry.offset != position or position % entry.dtype.itemsize:
            raise FormatError(f"{shown(entry.name)} has a gap before it, overlaps, or is unaligned")
        position += entry.size
    if position != end:
        raise FormatError(
            f"expected {position - start} bytes of tensors, got {end - start}: it was cut short, "
            "or its header has changed"
        )
    return entries


def _entry(name: str, claim: Any, start: int) -> Entry:
    """One entry of the header, checked for consistency; its offsets are counted from `start`."""
    try:
        kind, shape, (begin, end) = claim["dtype"], claim["shape"], claim["data_offsets"]
        dtype, numbers = DTYPES[kind], [*shape, begin, end]
    except (LookupError, TypeError, ValueError):
        raise FormatError(f"{shown(name)}: expected a dtype, a shape and two offsets") from None
    is_list = type(shape) is list
    if not is_list or any(type(n) is not int or not 0 <= n <= _MAX_ELEMENTS for n in numbers):
        raise FormatError(f"{shown(name)}: expected counts from 0 to 2^48 as shape and offsets")
    if len(shape) > MAX_DIMENSIONS or math.prod(n or 1 for n in shape) > _MAX_ELEMENTS:
        raise FormatError(f"{shown(name)}: expected up to {MAX_DIMENSIONS} dimensions, up to 2^48")
    size = math.prod(shape) * dtype.itemsize
    if end - begin != size:
        raise FormatError(f"{shown(name)}: expected {size} bytes, got {end - begin}")
    return Entry(name, dtype, tuple(shape), start + begin, size)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
