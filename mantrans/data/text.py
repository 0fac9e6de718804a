"""Reads documents from local files in bounded memory, however large the file, line or document.

A document is read as one or more `Piece`s; only its last piece has `ends` set. Pieces are cut where
GPT-2's pre-tokenizer cuts too (before white space), so that tokens are those of the whole document.
Only a run of over `PIECE` characters without white space is cut inside a word: this keeps the text,
but may change some tokens beside the cut.

White space around documents is removed, and empty documents are skipped. Text is UTF-8, with or
without a byte order mark; in `.txt`, CRLF is read as LF. Anything else is refused with the file's
name and the place; encodings are not guessed.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mantrans.data.tokenizer import END_OF_TEXT
from mantrans.errors import DataError

PIECE = 2**18  # characters: little memory, and few calls
_CHUNK = 2**18  # bytes read at once
_LONGEST_JSON_LINE = (
    2**27
)  # bytes: a line is parsed as a whole and must fit into memory a few times
_SUFFIXES = (".txt", ".jsonl", ".parquet")
_SEPARATORS = {
    "eot": re.compile(re.escape(END_OF_TEXT)),
    "blank_line": re.compile(r"\n[ \t]*\n\s*"),
}
_SPACE = " \t\n"


class Piece(NamedTuple):
    """A part of a document; `ends`: the document ends with it."""

    text: str
    ends: bool


@dataclass
class ReadReport:
    """What the readers skipped, updated while they run."""

    broken_lines: int = 0
    first_broken: str = ""

    def broken(self, file: Path, line: int, what: str, refuse: bool) -> None:
        """Count a broken line, or raise DataError if such lines are refused."""
        if refuse:
            raise DataError(
                f"{file}, line {line}: {what}; correct it, or set data.on_broken_lines to skip"
            )
        self.broken_lines += 1
        self.first_broken = self.first_broken or f"{what} ({file.name}, line {line})"

    def __str__(self) -> str:
        return f"{self.broken_lines:,} broken lines skipped; the first: {self.first_broken}"


def local_files(path: str | Path) -> list[Path]:
    """The file, or the folder's files of the accepted kinds at any depth, sorted by path."""
    root = Path(path)
    kinds = ", ".join(_SUFFIXES)
    if root.is_file():
        if root.suffix.lower() not in _SUFFIXES:
            raise DataError(f"data.path: expected a file {kinds} or a folder, got {root}")
        return [root]
    if not root.is_dir():
        raise DataError(f"data.path: expected a file {kinds} or a folder, got no such path: {root}")
    found = [
        file
        for file in sorted(root.rglob("*"))
        if file.suffix.lower() in _SUFFIXES
        and not any(part.startswith(".") for part in file.relative_to(root).parts)
        and file.is_file()
    ]
    if not found:
        raise DataError(f"data.path: expected a folder with {kinds} files, got none in {root}")
    return found


def read_files(
    files: Iterable[Path],
    separator: str,
    text_field: str,
    refuse_broken_lines: bool,
    report: ReadReport,
) -> Iterator[Piece]:
    """The documents of all files, in order. DataError for a file that cannot be read as text."""
    for file in files:
        try:
            if file.suffix.lower() == ".txt":
                yield from read_txt(file, separator)
            elif file.suffix.lower() == ".jsonl":
                yield from read_jsonl(file, text_field, refuse_broken_lines, report)
            else:
                yield from read_parquet(file, text_field)
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror or error}") from None


def read_txt(file: Path, separator: str = "eot") -> Iterator[Piece]:
    """Documents of a text file, separated by `<|endoftext|>` ("eot") or by blank lines."""
    return _stripped(_split(_characters(file), _SEPARATORS[separator]))


def read_jsonl(
    file: Path, text_field: str, refuse_broken_lines: bool, report: ReadReport
) -> Iterator[Piece]:
    """The texts in `text_field` of a file with one JSON object per line; blank lines are ignored.

    A line is broken if it is not UTF-8, not a JSON object, has no string in that field, or is over
    128 MiB. DataError if every line is broken.
    """
    good = False
    before, fields_seen = report.broken_lines, ""
    for number, line in _lines(file):
        text, fault = _text_of_line(line, text_field)
        if text is None:
            fields_seen = fields_seen or fault
            report.broken(file, number, fault, refuse_broken_lines)
            continue
        good = True
        del line
        yield from pieces_of(text)
    if not good and report.broken_lines > before:
        raise DataError(
            f"{file}: none of its {report.broken_lines - before:,} lines can be used; "
            f"the first: {fields_seen}"
        )


def read_parquet(file: Path, text_field: str) -> Iterator[Piece]:
    """The column `text_field` of a Parquet file, streamed by the `datasets` library."""
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{file}: .parquet needs the package datasets (pip install datasets); "
            ".txt and .jsonl need none"
        ) from None
    try:
        rows = datasets.load_dataset(
            "parquet", data_files={"train": str(file)}, split="train", streaming=True
        )
        columns = list(rows.features or {})
        if text_field not in columns:
            raise DataError(
                f"{file}: expected a column {text_field!r}, got {', '.join(columns)}; "
                "set data.text_field"
            )
        for row in rows.select_columns([text_field]):
            if isinstance(row[text_field], str):
                yield from pieces_of(row[text_field])
    except DataError:
        raise
    except Exception as error:  # pyarrow and datasets raise many kinds for a damaged file
        raise DataError(
            f"{file}: expected a Parquet file, got {str(error).splitlines()[0]:.150}"
        ) from None


def pieces_of(document: str) -> Iterator[Piece]:
    """A document in memory, stripped, in pieces."""
    text = document.strip()
    start = 0
    while len(text) - start > PIECE:
        cut = _safe_cut(text, start, start + PIECE) or start + PIECE
        yield Piece(text[start:cut], False)
        start = cut
    if text:
        yield Piece(text[start:], True)


def _characters(file: Path) -> Iterator[str]:
    """The file's text in chunks, without a byte order mark and with CRLF as LF."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")("strict")
    held, read = "", 0
    with file.open("rb") as stream:
        while True:
            raw = stream.read(_CHUNK)
            try:
                text = held + decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                # The decoder's position includes the bytes it kept from an earlier chunk.
                place = read + len(raw) - len(error.object) + error.start
                raise DataError(
                    f"{file}: expected UTF-8, got {error.object[error.start]:#04x} at byte "
                    f"{place}; convert it, for example with iconv -f latin1 -t utf-8"
                ) from None
            read += len(raw)
            held = "\r" if raw and text.endswith("\r") else ""
            yield (text[:-1] if held else text).replace("\r\n", "\n")
            if not raw:
                return


def _split(chunks: Iterable[str], separator: re.Pattern[str]) -> Iterator[Piece]:
    """Cut a stream of text at the separator; hold back what may be the start of one."""
    buffer = ""
    for chunk in chunks:
        buffer += chunk
        *documents, buffer = separator.split(buffer)
        for document in documents:
            yield Piece(document, True)
        # White space of a separator, or the start of <|endoftext|>, comes after a safe cut.
        cut = _safe_cut(buffer, 0, len(buffer) - len(END_OF_TEXT))
        if not cut and len(buffer) > PIECE:
            cut = len(buffer) - len(END_OF_TEXT)
        if cut:
            yield Piece(buffer[:cut], False)
            buffer = buffer[cut:]
    yield Piece(buffer, True)


def _safe_cut(text: str, start: int, stop: int) -> int:
    """The start of the last run of white space before `stop`, or 0 if there is none."""
    if stop <= start:
        return 0
    space = max(text.rfind(character, start, stop) for character in _SPACE)
    if space < 0:
        return 0
    while space > start and text[space - 1].isspace():
        space -= 1
    return space if space > start else 0


def _stripped(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Remove the white space around documents, and documents without other characters."""
    begun, held = False, ""
    for text, ends in pieces:
        text = held + text if begun else text.lstrip()
        # Hold back white space at the end: dropped if the document ends, else kept before the rest.
        kept = text.rstrip()
        held = text[len(kept) :]
        if len(held) > PIECE and not ends:
            kept, held = text, ""  # too much to hold back
        begun = begun or bool(kept)
        if begun and (kept or ends):
            yield Piece(kept, ends)
        if ends:
            begun, held = False, ""


def _lines(file: Path) -> Iterator[tuple[int, bytes | None]]:
    """(number, line) of lines that are not blank, without a byte order mark; None if too long."""
    with file.open("rb") as stream:
        number = 0
        while line := stream.readline(_LONGEST_JSON_LINE + 1):
            number += 1
            too_long = len(line) > _LONGEST_JSON_LINE
            rest = line
            while too_long and rest and not rest.endswith(b"\n"):
                rest = stream.readline(_CHUNK)
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if too_long:
                yield number, None
            elif line.strip():
                yield number, line


def _text_of_line(line: bytes | None, text_field: str) -> tuple[str | None, str]:
    """(text, "") of a line, or (None, what is wrong with it)."""
    if line is None:
        return None, f"the line is longer than {_LONGEST_JSON_LINE:,} bytes"
    try:
        row: Any = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return None, "not UTF-8"
    except (ValueError, RecursionError):
        return None, "not JSON"
    if not isinstance(row, dict):
        return None, f"not a JSON object but {type(row).__name__}"
    if text_field not in row:
        return (
            None,
            f"no field {text_field!r}, only {', '.join(map(repr, list(row)[:5])) or 'none'}",
        )
    text = row[text_field]
    if not isinstance(text, str):
        return None, f"field {text_field!r} is {type(text).__name__}, not text"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return None, f"field {text_field!r} holds half of a surrogate pair"
    return text, ""
