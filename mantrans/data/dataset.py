"""From a config to two checked token streams, written once and cached.

Each split is one file in a folder whose name is a hash of everything that its tokens depend on: the
source's content, the tokenizer, the settings. Files that have not changed since they were hashed
are not read again at every start: `known` says what that assumes. The folder is created under
another name and renamed when both files are complete and on the disk, so a half-written one is
never used. A lock lets one process write while others wait; it ends with its process.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import numpy as np

from mantrans import terminal
from mantrans.data.files import kind_of
from mantrans.data.holdout import held_out
from mantrans.data.known import KnownFiles, content_hash
from mantrans.data.registry import Source, Splits, find_source
from mantrans.data.shards import TokenFileWriter, TokenStream
from mantrans.data.text import Piece, ReadReport, read_txt
from mantrans.data.tokenizer import Tokenizer
from mantrans.errors import DataError, single_line

if TYPE_CHECKING:
    from mantrans.config import DataConfig

FORMAT = 2
"""Increased whenever the same text and settings would give other files."""
_BATCH = 2**20  # characters tokenized in one call
_COPY = 2**20  # tokens copied at once
_LONGEST_NAME, _LONGEST_NOTE = 60, 160  # characters, so that a file's header has room for them
_ROOM_FOR_NOTES = 2048  # bytes of its JSON


@dataclass(frozen=True)
class TokenDataset:
    """Both splits.

    `documents`, `bytes`: of the whole text, used or not; None for what is not known. `notes`: a
    line for each kind of thing that was passed over, now or when the tokens were written.
    """

    train: TokenStream
    validation: TokenStream
    documents: int | None = None
    bytes: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def identity(self) -> dict[str, dict[str, Any]]:
        """What a checkpoint keeps of each split, to know its tokens again."""
        splits = {"train": self.train, "validation": self.validation}
        return {
            name: {"tokens": len(stream), "checksum": stream.checksum}
            for name, stream in splits.items()
        }

    def usage(self) -> str:
        """How many documents and bytes of text are used, of how many."""
        documents = self.train.n_documents + self.validation.n_documents
        n_bytes = self.train.n_bytes + self.validation.n_bytes
        if documents == self.documents:
            of_text = f"all {documents:,} documents" if documents > 1 else "one document"
            return f"{of_text}, {n_bytes:,} bytes"
        of_all = "more" if self.documents is None else f"{self.documents:,}"
        of_bytes = "" if self.bytes is None else f" of {self.bytes:,}"
        return f"{documents:,} of {of_all} documents, {n_bytes:,}{of_bytes} bytes"


def prepare(
    data_config: DataConfig,
    tokenizer: Tokenizer,
    *,
    cache_dir: str | Path,
    quiet: bool = False,
) -> TokenDataset:
    """The data set's tokens, from the cache or written now.

    They do not depend on the seed: all runs are validated on the same documents. Unless quiet, its
    notes are printed. Raises DataError for text that cannot be used, or a cache that is damaged or
    cannot be written.
    """
    source = find_source(
        data_config.dataset,
        path=data_config.path,
        val_path=data_config.val_path,
        text_field=data_config.text_field,
        document_separator=data_config.document_separator,
        on_broken_lines=data_config.on_broken_lines,
        subset_size=data_config.subset_size,
        val_subset_size=data_config.val_subset_size,
    )
    plan = _Plan(data_config.share_held_out, data_config.subset_size, data_config.val_subset_size)
    known = KnownFiles(Path(cache_dir) / "known_files.json")
    folder = Path(cache_dir) / _folder_name(source, tokenizer, plan, known)
    try:
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(folder.parent / f"{folder.name}.lock"):
                if not folder.is_dir():
                    _write_folder(folder, source, tokenizer, plan, quiet)
    except OSError as error:
        raise DataError(
            f"tokens cannot be written to {folder}: {error.strerror or error}; "
            "free the disk, or set data.cache_dir to a folder that can be written"
        ) from None
    opened = _open_folder(folder, tokenizer, known, source.notes)
    known.save()
    for note in () if quiet else opened.notes:
        terminal.say(f"note: {note}")
    return opened


@contextmanager
def tokenized(
    path: Path, data_config: DataConfig, tokenizer: Tokenizer, *, name: str
) -> Iterator[TokenStream]:
    """All tokens of a file or folder, read as training would read it, in no split and no cache.

    A file of a kind that is not known is plain text. name: what an error calls the path. Raises
    DataError for text that cannot be used.
    """
    report, path, separator = ReadReport(), path.expanduser(), data_config.document_separator
    notes: tuple[str, ...] = ()
    size: int | None = None
    if path.is_file() and kind_of(path) is None:
        pieces = read_txt(path, separator)
    else:
        source = find_source(
            "local",
            path=path,
            path_name=name,
            text_field=data_config.text_field,
            document_separator=separator,
            on_broken_lines=data_config.on_broken_lines,
        )
        pieces, notes, size = source.open(report, tokenizer).train, source.notes, source.n_bytes
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "text.tokens"
        writer = TokenFileWriter(file, tokenizer.vocab_size, {})
        with writer, terminal.Progress(size, f"tokenizing {path.name}", "B") as bar:
            encoder = _Encoder(tokenizer, writer, bar.update)
            for piece in pieces:
                encoder.add(piece)
            encoder.flush()
        for note in (*notes, *report.notes()):
            terminal.say(f"note: {note}")
        stream = TokenStream(file)
        if not len(stream):
            raise DataError(f"{name}: expected text, got none in {path}")
        yield stream


@dataclass(frozen=True)
class _Plan:
    """How documents are divided between the splits."""

    fraction: float
    train_size: int | None
    validation_size: int | None


def _folder_name(source: Source, tokenizer: Tokenizer, plan: _Plan, known: KnownFiles) -> str:
    """Readable first, unique last."""
    try:
        contents = [known.hash(file, content_hash) for file in source.files]
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror or error}") from None
    key = {
        "format": FORMAT,
        "source": source.identity,
        "contents": contents,
        "tokenizer": tokenizer.hash,
        "plan": [plan.fraction, plan.train_size, plan.validation_size],
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    names = re.sub(r"[^A-Za-z0-9_-]+", "-", f"{source.name}-{tokenizer.name}")[:80]
    return f"{names}-{digest}"


def _write_folder(
    folder: Path, source: Source, tokenizer: Tokenizer, plan: _Plan, quiet: bool
) -> None:
    """Write both files to a temporary folder, then rename it. Called under the lock."""
    aside = folder.parent / f"{folder.name}.unfinished"
    shutil.rmtree(aside, ignore_errors=True)  # left behind by a process that was killed
    aside.mkdir()
    try:
        report = ReadReport()
        title = f"tokenizing {source.name}"
        with terminal.Progress(source.n_bytes, title, "B", quiet=quiet) as bar:
            _write_splits(aside, source, tokenizer, plan, report, bar.update)
        _sync_folder(aside)
        aside.rename(folder)
        _sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _write_splits(
    aside: Path,
    source: Source,
    tokenizer: Tokenizer,
    plan: _Plan,
    report: ReadReport,
    advance: Callable[[int], Any],
) -> None:
    """Tokenize the source into aside/train.tokens and aside/validation.tokens."""
    splits = source.open(report, tokenizer)
    facts = {
        "source": source.name[:_LONGEST_NAME],
        "tokenizer": tokenizer.name[:_LONGEST_NAME],
        "tokenizer_hash": tokenizer.hash,
    }
    train = TokenFileWriter(aside / "train.tokens", tokenizer.vocab_size, facts)
    validation = TokenFileWriter(aside / "validation.tokens", tokenizer.vocab_size, facts)
    with train, validation:
        into_train = _Encoder(tokenizer, train, advance)
        into_validation = _Encoder(tokenizer, validation, advance)
        texts, held = (
            _counted(pieces or (), report, tokenizer)
            for pieces in (splits.train, splits.validation)
        )
        if splits.validation is None:
            _share_out(texts, into_train, into_validation, plan)
        else:
            _take(held, into_validation, plan.validation_size)
            _take(texts, into_train, plan.train_size)
        into_train.flush()
        into_validation.flush()
        train.facts |= _record(report, splits.documents, chain(texts, held), advance)
    _require_documents(source, splits, train, validation, report)
    if splits.validation is None and 0 in (train.n_tokens, validation.n_tokens):
        _split_by_tokens(aside, tokenizer, plan, facts | train.facts)


def _counted(pieces: Iterable[Piece], report: ReadReport, tokenizer: Tokenizer) -> Iterator[Piece]:
    """The pieces, their documents and bytes counted in `report`."""
    for piece in pieces:
        report.documents += piece.is_last
        report.bytes += _text_bytes(piece, tokenizer)
        yield piece


def _text_bytes(piece: Piece, tokenizer: Tokenizer) -> int:
    if piece.tokens is None:
        return len(piece.text.encode())
    return int(tokenizer.token_bytes[piece.tokens].sum())


def _record(
    report: ReadReport,
    documents: int | None,
    unused: Iterable[Piece],
    advance: Callable[[int], Any],
) -> dict[str, Any]:
    """What the cache keeps of the reading: how much text there is, and what was skipped.

    Text that is not used is read to count it, unless the number of documents is known without.
    """
    n_bytes: int | None = None
    if documents is None:
        with contextlib.suppress(DataError):  # it is not used: a fault in it leaves it uncounted
            for piece in unused:
                advance(len(piece.text))
            documents, n_bytes = report.documents, report.bytes
    notes = [note[:_LONGEST_NOTE] for note in report.notes()]
    while len(json.dumps(notes)) > _ROOM_FOR_NOTES:
        notes = [note[: len(note) // 2] for note in notes]
    return {"documents": documents, "bytes": n_bytes, "notes": notes}


def _require_documents(
    source: Source,
    splits: Splits,
    train: TokenFileWriter,
    validation: TokenFileWriter,
    report: ReadReport,
) -> None:
    """DataError without any token, or in a split of its own without one."""
    empty = [name for name, split in (("train", train), ("validate", validation))
             if not split.n_tokens]  # fmt: skip
    if len(empty) == 2 or (empty and splits.validation is not None):
        where = source.name if len(empty) == 2 else f"{source.name}, to {empty[0]} on"
        skipped = f" ({'; '.join(report.notes())})" if report.notes() else ""
        raise DataError(
            f"{where}: expected a document of at least one character, got none{skipped}"
        )


def _take(pieces: Iterable[Piece], encoder: _Encoder, size: int | None) -> None:
    """The first `size` documents, or all."""
    taken = 0
    for piece in pieces:
        if size is not None and taken >= size:
            return
        encoder.add(piece)
        taken += piece.is_last


def _share_out(pieces: Iterable[Piece], train: _Encoder, validation: _Encoder, plan: _Plan) -> None:
    """Write each document to its split, until both have the requested size."""
    sizes = {id(train): plan.train_size, id(validation): plan.validation_size}
    taken = {id(train): 0, id(validation): 0}
    index, encoder = 0, validation if held_out(0, plan.fraction) else train
    for piece in pieces:
        size = sizes[id(encoder)]
        if size is None or taken[id(encoder)] < size:
            encoder.add(piece)
            taken[id(encoder)] += piece.is_last
        if piece.is_last:
            if _enough(taken[id(train)], taken[id(validation)], plan):
                return
            index += 1
            encoder = validation if held_out(index, plan.fraction) else train


def _enough(n_train: int, n_validation: int, plan: _Plan) -> bool:
    """Whether both splits are full. Without a training size everything is read; without a
    validation size validation has what was held out while training was filled."""
    if plan.train_size is None or n_train < plan.train_size:
        return False
    return plan.validation_size is None or n_validation >= plan.validation_size


def _split_by_tokens(aside: Path, tokenizer: Tokenizer, plan: _Plan, facts: dict[str, Any]) -> None:
    """If one split got no document, hold out the last part of all tokens instead."""
    names = ("train.tokens", "validation.tokens")
    (whole,) = (stream for name in names if len(stream := TokenStream(aside / name)))
    if len(whole) < 4:
        raise DataError(
            f"{facts['source']}: expected at least 4 tokens, got {len(whole)}; give more text"
        )
    cut = len(whole) - min(max(2, round(len(whole) * plan.fraction)), len(whole) - 2)
    for name, start, stop in ((names[0], 0, cut), (names[1], cut, len(whole))):
        with TokenFileWriter(aside / f"part-{name}", tokenizer.vocab_size, facts) as writer:
            for first in range(start, stop, _COPY):
                part = whole.read(first, min(first + _COPY, stop))
                n_bytes = int(tokenizer.token_bytes[part].sum())
                n_documents = int((part == tokenizer.eot_id).sum())
                if first + len(part) == len(whole):  # a file of tokens may lack the last end
                    n_documents += int(part[-1] != tokenizer.eot_id)
                writer.write(part, n_bytes, n_documents)
    for name in names:
        (aside / f"part-{name}").replace(aside / name)


class _Encoder:
    """Collects pieces, tokenizes many at once, and ends each document with end-of-text."""

    def __init__(
        self, tokenizer: Tokenizer, writer: TokenFileWriter, advance: Callable[[int], Any]
    ) -> None:
        self._tokenizer, self._writer, self._advance = tokenizer, writer, advance
        self._pieces: list[Piece] = []
        self._characters = 0

    def add(self, piece: Piece) -> None:
        self._pieces.append(piece)
        self._characters += len(piece.text) if piece.tokens is None else len(piece.tokens)
        if self._characters >= _BATCH or len(self._pieces) >= _BATCH // 64:
            self.flush()

    def flush(self) -> None:
        array = _encoded(self._tokenizer, self._pieces)
        n_bytes = int(self._tokenizer.token_bytes[array].sum())
        self._writer.write(array, n_bytes, sum(piece.is_last for piece in self._pieces))
        self._advance(n_bytes)
        self._pieces, self._characters = [], 0


def _encoded(tokenizer: Tokenizer, pieces: list[Piece]) -> np.ndarray:
    """The tokens of all pieces, int64. A text that ends a document is followed by end-of-text."""
    given = [piece.tokens for piece in pieces if piece.tokens is not None]
    if given and len(given) == len(pieces):
        return np.concatenate(given).astype(np.int64)
    texts = iter(tokenizer.encode_batch([p.text for p in pieces if p.tokens is None]))
    tokens: list[int] = []
    for piece in pieces:
        if piece.tokens is not None:
            tokens += piece.tokens.tolist()
            continue
        tokens += next(texts)
        if piece.is_last:
            tokens.append(tokenizer.eot_id)
    return np.asarray(tokens, dtype=np.int64)


def _open_folder(
    folder: Path, tokenizer: Tokenizer, known: KnownFiles, notes: tuple[str, ...]
) -> TokenDataset:
    """Open both files and check that they were written with this tokenizer. `notes`: today's."""
    train, validation = (TokenStream(folder / f"{name}.tokens", known)
                         for name in ("train", "validation"))  # fmt: skip
    for stream in (train, validation):
        stream.require_vocabulary(tokenizer.vocab_size)
        if stream.facts.get("tokenizer_hash") != tokenizer.hash:
            raise DataError(
                f"token file {stream.path}: expected the tokenizer {tokenizer.name!r}, got "
                f"{stream.facts.get('tokenizer')!r}; delete the folder {folder} and run again"
            )
    documents, n_bytes = (
        count if type(count := train.facts.get(name)) is int else None
        for name in ("documents", "bytes")
    )
    written = train.facts.get("notes")
    if isinstance(written, list):
        notes += tuple(single_line(str(note)) for note in written)
    return TokenDataset(train, validation, documents, n_bytes, notes)


def _sync_folder(folder: Path) -> None:
    """Make names in the folder survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
