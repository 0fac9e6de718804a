"""Recognizes what is not UTF-8 text by its first bytes, to say what it is and what to do."""

from __future__ import annotations

import codecs
import shlex
from collections import Counter
from pathlib import Path

from mantrans.errors import DataError

SAMPLE = 2**16  # bytes looked at
_FILES = (  # (first bytes, what they begin, what to do with {file})
    (b"\x1f\x8b", "gzip data", "rename it to {file}.gz, which is read as it is"),
    (b"\x28\xb5\x2f\xfd", "Zstandard data", "rename it to {file}.zst, which is read as it is"),
    (b"BZh", "bzip2 data", "decompress it: bunzip2 < {file} > {new}"),
    (b"\xfd7zXZ\0", "xz data", "decompress it: xz -d < {file} > {new}"),
    (b"PK\x03\x04", "a zip archive", "unpack it: unzip {file}, or save a document as plain text"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it: 7z x {file}"),
    (b"Rar!\x1a\x07", "a RAR archive", "unpack it: unrar x {file}"),
    (b"%PDF-", "a PDF", "extract its text: pdftotext {file} {new}"),
    (b"{\\rtf", "an RTF document", "save it as plain text"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document", "save it as plain text"),
    (b"\x88\xd8\x34\x01", "tokens of llm.c", "rename it to {stem}.bin, which is read as it is"),
    (b"PAR1", "a Parquet file", "rename it to {stem}.parquet"),
)
_TAR = 257, b"ustar"
_MARKS = (  # UTF-32's little-endian mark begins with UTF-16's
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_UNMARKED = ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE")
_SHORTEST = 16, 512  # bytes that show a UTF-16 without a mark, and that the text is none at all
_MOST_CONTROLS = {True: 0.2, False: 0.02}  # the largest share in UTF-8, and in bytes that are not
_CONTROLS = bytes([*range(0x00, 0x07), *range(0x0E, 0x1B), 0x7F])  # which no text is full of


def require_text(sample: bytes, file: Path) -> None:
    """DataError if `sample`, the first bytes of `file`, does not look like UTF-8 text."""
    new = shlex.quote(f"{file.stem.partition('.')[0]}-utf8.txt")
    names = {"file": shlex.quote(str(file)), "stem": shlex.quote(file.stem), "new": new}
    for start, what, advice in _FILES:
        if sample.startswith(start) and (start != b"BZh" or sample[4:7] == b"1AY"):
            raise _refusal(file, what, advice.format(**names))
    if sample[_TAR[0] :].startswith(_TAR[1]):
        raise _refusal(file, "a tar archive", f"unpack it: tar -xf {names['file']}")
    encoding = next((name for mark, name in _MARKS if sample.startswith(mark)), None)
    if encoding:
        raise _refusal(file, encoding, _conversion(file, encoding))
    if fault := _fault(sample, file):
        raise fault


def not_utf8(file: Path, bad: UnicodeDecodeError, place: int) -> DataError:
    """The error of `file`, whose byte number `place` is not UTF-8: with a guess of what it is."""
    return _fault(bad.object, file) or DataError(
        f"{file}: expected UTF-8, got {bad.object[bad.start]:#04x} at byte {place}; if it is "
        f"Latin-1 or Windows-1252, {_conversion(file, 'WINDOWS-1252')}"
    )


def _fault(raw: bytes, file: Path) -> DataError | None:
    """The error of bytes that look like UTF-16 or UTF-32 without a mark, or like no text at all."""
    try:
        codecs.getincrementaldecoder("utf-8")("strict").decode(raw)
        is_utf8 = True
    except UnicodeDecodeError:
        is_utf8 = False
    if (b"\0" in raw or not is_utf8) and (encoding := _unmarked(raw, is_utf8)):
        return _refusal(file, encoding, _conversion(file, encoding))
    if len(raw) >= _SHORTEST[1] and _share(raw, _CONTROLS) > _MOST_CONTROLS[is_utf8]:
        return _refusal(file, "binary data", "give its text, as UTF-8")
    return None


def _unmarked(raw: bytes, is_utf8: bool) -> str | None:
    """The UTF-16 or UTF-32 without a mark that `raw` is, or None.

    Text has spaces or line ends, and next to no character that cannot be printed. What is valid
    UTF-8 too must also look like an alphabet in UTF-16: nearly all of its high bytes are two.
    """
    if len(raw) < _SHORTEST[0]:
        return None
    spaces: dict[str, tuple[int, int]] = {}  # the usual ones, and all
    for name in _UNMARKED:
        try:
            text = codecs.getincrementaldecoder(name)("strict").decode(raw)
        except UnicodeDecodeError:
            continue
        printable = sum(c.isprintable() or c.isspace() for c in text)
        high = Counter(raw[(1 if name.endswith("LE") else 0) :: 2]).most_common(2)
        if printable < 0.95 * len(text):
            continue
        if is_utf8 and sum(count for _, count in high) < 0.9 * (len(raw) // 2):
            continue
        spaces[name] = text.count(" ") + text.count("\n"), sum(c.isspace() for c in text)
    best = max(spaces, key=spaces.__getitem__, default=None)
    return best if best and any(spaces[best]) else None


def _conversion(file: Path, encoding: str) -> str:
    read = {".gz": "gzip -dc", ".zst": "zstd -dc"}.get(file.suffix.lower())
    name = shlex.quote(str(file))
    command = f"iconv -f {encoding} -t UTF-8"
    command = f"{read} {name} | {command}" if read else f"{command} {name}"
    return f"convert it: {command} > {shlex.quote(file.name.partition('.')[0] + '-utf8.txt')}"


def _share(raw: bytes, characters: bytes) -> float:
    """The share of `raw` that is one of `characters`."""
    return 1.0 - len(raw.translate(None, characters)) / len(raw)


def _refusal(file: Path, what: str, advice: str) -> DataError:
    return DataError(f"{file}: expected UTF-8 text, got {what}; {advice}")
