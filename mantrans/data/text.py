"""Reads documents from local files in bounded memory, however large the file, line or document.

A document is read as one or more `Piece`s; only its last piece has `ends` set. Pieces are cut where
GPT-2's pre-tokenizer cuts too (before white space), so that tokens are those of the whole document.
Only a run of over `PIECE` characters without white space is cut inside a word: this keeps the text,
but may change some tokens beside the cut.

White space around documents is removed, and empty documents are skipped. Text is UTF-8, with or
without a byte order mark; in `.txt`, CRLF is read as LF. Anything else is refused with the file's
name and what it is; encodings are not guessed. White space and line ends are Unicode's: a blank
line may end with CR, NEL or U+2028 too, and hold no-break spaces.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from mantrans.data.bin_file import read_bin
from mantrans.data.files import kind_of, opened
from mantrans.data.foreign import not_utf8
from mantrans.data.parquet import column_of
from mantrans.data.tokenizer import END_OF_TEXT, Tokenizer
from mantrans.errors import DataError, UnfinishedError, single_line

PIECE = 2**18  # characters: little memory, and few calls
_CHUNK = 2**18  # bytes read at once
_LONGEST_JSON_LINE = (
    2**27
)  # bytes: a line is parsed as a whole and must fit into memory a few times
_LINE_END = r"\n\r\v\f\x85\u2028\u2029"  # Unicode's (UTS 18, RL1.6); CRLF is LF here
_SEPARATORS = {
    "eot": re.compile(re.escape(END_OF_TEXT)),
    "blank_line": re.compile(rf"[{_LINE_END}][^\S{_LINE_END}]*[{_LINE_END}]\s*"),
}
_SPACE = " \t\n"
_RARE_SPACE = "".join(c for c in map(chr, range(0x3001)) if c.isspace() and c not in _SPACE)


class Piece(NamedTuple):
    """A part of a document; `is_last`: the document ends with it. `tokens`, in place of a text: as
    a file of tokens has them, with the end of text if there is one."""

    text: str
    is_last: bool
    tokens: np.ndarray | None = None


@dataclass
class ReadReport:
    """What the readers found and what they skipped, updated while they run.

    `read`: bytes of the files, as they are on the disk. `rows`: of `.jsonl` and `.parquet`; those
    `broken` were skipped, those `empty` hold no text.
    """

    read: int = 0
    documents: int = 0
    bytes: int = 0
    rows: int = 0
    broken: int = 0
    first_broken: str = ""
    empty: int = 0

    def count(self, n_bytes: int) -> None:
        """More bytes were read."""
        self.read += n_bytes

    def texts(
        self,
        rows: Iterable[tuple[int, str | None, str]],
        place: str,
        refuse: bool,
        unit: str = "row",
    ) -> Iterator[str]:
        """The texts of (number, text or None, what is wrong with it), the others counted.

        place, unit: what the rows are of, such as a file, and what their number counts. Raises
        DataError for a wrong row if such rows are refused.
        """
        for number, text, fault in rows:
            self.rows += 1
            if text is None:
                self._skip(place, f"{unit} {number}", fault, refuse)
            elif text.isspace() or not text:
                self.empty += 1
            else:
                yield text

    def _skip(self, place: str, row: str, fault: str, refuse: bool) -> None:
        if refuse:
            raise DataError(
                f"{place}, {row}: {fault}; correct it, or set data.on_broken_lines to skip"
            )
        self.broken += 1
        name = Path(place).name
        self.first_broken = self.first_broken or single_line(f"{fault} ({name}, {row})")

    def notes(self) -> list[str]:
        """A line for each kind of thing that was skipped."""
        notes = []
        if self.broken:
            skipped = f"{self.broken:,} of {self.rows:,} rows skipped"
            notes.append(f"{skipped}; the first: {self.first_broken}")
        if self.empty:
            notes.append(f"{self.empty:,} of {self.rows:,} rows hold no text")
        return notes


def read_files(
    files: Iterable[Path],
    separator: str,
    text_field: str,
    refuse_broken_lines: bool,
    report: ReadReport,
    tokenizer: Tokenizer | None = None,
) -> Iterator[Piece]:
    """The documents of all files, in order. DataError for a file that is no text, UnfinishedError
    for one that the system does not give.

    tokenizer: that of the tokens in `.bin` files; None where only text will do.
    """
    for file in files:
        try:
            if kind_of(file) == ".txt":
                yield from read_txt(file, separator, report)
            elif kind_of(file) == ".jsonl":
                yield from read_jsonl(file, text_field, refuse_broken_lines, report)
            elif kind_of(file) == ".bin":
                yield from _read_tokens(file, tokenizer, report)
            else:
                yield from read_parquet(file, text_field, refuse_broken_lines, report)
        except OSError as error:
            raise UnfinishedError(f"{file}: cannot be read: {error.strerror or error}") from None


def _read_tokens(file: Path, tokenizer: Tokenizer | None, report: ReadReport) -> Iterator[Piece]:
    """The documents of a file of tokens."""
    if tokenizer is None:
        raise DataError(f"{file}: expected text, got a file of tokens (.bin)")
    for tokens, is_last in read_bin(file, tokenizer, report.count):
        yield Piece("", is_last, tokens)


def read_txt(
    file: Path, separator: str = "eot", report: ReadReport | None = None
) -> Iterator[Piece]:
    """Documents of a text file, separated by `<|endoftext|>` ("eot") or by blank lines."""
    characters = _characters(file, (report or ReadReport()).count)
    return _stripped(_split(characters, _SEPARATORS[separator]))


def read_jsonl(
    file: Path, text_field: str, refuse_broken_lines: bool, report: ReadReport
) -> Iterator[Piece]:
    """The texts in `text_field` of a file with one JSON object per line; blank lines are ignored.

    A line is broken if it is not UTF-8, not a JSON object, has no string in that field, or is over
    128 MiB. DataError if every line is broken.
    """
    before = report.rows - report.broken
    faults: list[str] = []

    def rows() -> Iterator[tuple[int, str | None, str]]:
        for number, line in _lines(file, report.count):
            text, fault = _text_of_line(line, text_field)
            if fault and not faults:
                faults.append(fault)
            del line
            yield number, text, fault

    for text in report.texts(rows(), str(file), refuse_broken_lines, "line"):
        yield from pieces_of(text)
    if faults and report.rows - report.broken == before:
        raise DataError(
            f"{file}: none of its lines can be used; the first: {single_line(faults[0])}"
        )


def read_parquet(
    file: Path, text_field: str, refuse_broken_lines: bool, report: ReadReport
) -> Iterator[Piece]:
    """The texts in the column `text_field` of a Parquet file. A row is broken if it has none."""
    for text in report.texts(
        column_of(file, text_field, report.count), str(file), refuse_broken_lines
    ):
        yield from pieces_of(text)


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


def _characters(file: Path, count: Callable[[int], None]) -> Iterator[str]:
    """The file's text in chunks, without a byte order mark and with CRLF as LF."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")("strict")
    held, read = "", 0
    with opened(file, count) as stream:
        while True:
            raw = stream.read(_CHUNK)
            try:
                text = held + decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                # The decoder's position includes the bytes it kept from an earlier chunk.
                place = read + len(raw) - len(error.object) + error.start
                raise not_utf8(file, error, place) from None
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
    for characters in (_SPACE, _RARE_SPACE):  # the rare ones take longer to look for
        space = max(text.rfind(character, start, stop) for character in characters)
        if space >= 0:
            break
    else:
        return 0
    while space > start and text[space - 1].isspace():
        space -= 1
    return space if space > start else 0


def _stripped(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Remove the white space around documents, and documents without other characters."""
    begun, held = False, ""
    for text, ends, _ in pieces:
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


def _lines(file: Path, count: Callable[[int], None]) -> Iterator[tuple[int, bytes | None]]:
    """(number, line) of lines that are not blank, without a byte order mark; None if too long.

    LF, CRLF or CR ends a line, because JSON text cannot hold any of them but between values.
    """
    with opened(file, count) as raw:
        # Latin-1 is bytes as characters: it brings readline with all line ends.
        stream = io.TextIOWrapper(cast(Any, raw), encoding="latin-1", newline=None)
        number = 0
        while line := stream.readline(_LONGEST_JSON_LINE + 1):
            number += 1
            too_long = len(line) > _LONGEST_JSON_LINE
            rest = line
            while too_long and rest and not rest.endswith("\n"):
                rest = stream.readline(_CHUNK)
            found = line.encode("latin-1")
            if number == 1:
                found = found.removeprefix(codecs.BOM_UTF8)
            if too_long:
                yield number, None
            elif found.strip():
                yield number, found


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
