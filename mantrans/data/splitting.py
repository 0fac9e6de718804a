"""Divides a source's documents between training and validation, and writes the tokens of both."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from mantrans.data.encoding import BatchWriter, SplitWriter
from mantrans.data.holdout import held_out
from mantrans.data.registry import Source, Splits
from mantrans.data.shards import TokenFileWriter, TokenStream
from mantrans.data.text import Piece, ReadReport
from mantrans.data.tokenizer import Tokenizer
from mantrans.errors import DataError
from mantrans.terminal import Progress

NAMES = ("train", "validation")
_COPY = 2**20  # tokens copied at once
_LONGEST_NAME, _LONGEST_NOTE = 60, 160  # characters, so that a file's header has room for them
_ROOM_FOR_NOTES = 2048  # bytes of its JSON


@dataclass(frozen=True)
class Plan:
    """How documents are divided between the splits."""

    fraction: float
    train_size: int | None
    validation_size: int | None


def write_splits(
    folder: Path,
    source: Source,
    tokenizer: Tokenizer,
    plan: Plan,
    processes: int = 1,
    quiet: bool = False,
) -> None:
    """Tokenize the source into folder/train.tokens and folder/validation.tokens.

    Batches that an earlier process has left in the folder are taken over. processes: see
    `encoding.BatchWriter`. Raises DataError for text that cannot be used, OtherTextError if the
    earlier process read another text.
    """
    report = ReadReport()
    splits = source.open(report, tokenizer, folder)
    facts = {
        "source": source.name[:_LONGEST_NAME],
        "tokenizer": tokenizer.name[:_LONGEST_NAME],
        "tokenizer_hash": tokenizer.hash,
    }
    train, validation = (
        TokenFileWriter(folder / f"{name}.tokens", tokenizer.vocab_size, facts, kept=True)
        for name in NAMES
    )
    writers = dict(zip(NAMES, (train, validation), strict=True))
    with train, validation, BatchWriter(folder, tokenizer, writers, processes) as batches:
        into_train, into_validation = (SplitWriter(name, batches, report) for name in NAMES)
        texts, held = (
            _counted(pieces or (), report, tokenizer, splits.n_bytes is None)
            for pieces in (splits.train, splits.validation)
        )
        title = f"tokenizing {source.name}"
        with Progress(splits.n_bytes, title, "B", first=batches.done, quiet=quiet) as bar:
            batches.advance = bar.update
            if splits.validation is None:
                _share_out(texts, into_train, into_validation, plan)
            else:
                _take(held, into_validation, plan.validation_size)
                _take(texts, into_train, plan.train_size)
            into_train.flush()
            into_validation.flush()
            batches.finish()
            is_part = (plan.train_size, plan.validation_size) != (None, None)
            unused = None if splits.is_remote and is_part else chain(texts, held)
            train.facts |= _record(report, splits.documents, unused)
            bar.update(report.read - bar.done)
    _require_documents(source, splits, train, validation, report)
    if splits.validation is None and 0 in (train.n_tokens, validation.n_tokens):
        _split_by_tokens(folder, tokenizer, plan, facts | train.facts)


def _counted(
    pieces: Iterable[Piece], report: ReadReport, tokenizer: Tokenizer, is_size_unknown: bool
) -> Iterator[Piece]:
    """The pieces, their documents and bytes counted in `report`; if the source has no size, their
    text is what was read of it."""
    for piece in pieces:
        n_bytes = _text_bytes(piece, tokenizer)
        report.documents += piece.is_last
        report.bytes += n_bytes
        report.read += n_bytes if is_size_unknown else 0
        yield piece


def _text_bytes(piece: Piece, tokenizer: Tokenizer) -> int:
    if piece.tokens is None:
        return len(piece.text.encode())
    return int(tokenizer.token_bytes[piece.tokens].sum())


def _record(
    report: ReadReport,
    documents: int | None,
    unused: Iterable[Piece] | None,
) -> dict[str, Any]:
    """What the cache keeps of the reading: how much text there is, and what was skipped.

    Text that is not used is read to count it, unless the number of documents is known without, or
    `unused` is None.
    """
    n_bytes: int | None = None
    if documents is None and unused is not None:
        with contextlib.suppress(DataError):  # it is not used: a fault in it leaves it uncounted
            for _ in unused:
                pass
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


def _take(pieces: Iterable[Piece], encoder: SplitWriter, size: int | None) -> None:
    """The first `size` documents, or all."""
    taken = 0
    for piece in pieces:
        encoder.add(piece)
        taken += piece.is_last
        if taken == size:  # before the next is read: it may have to be downloaded
            return


def _share_out(
    pieces: Iterable[Piece], train: SplitWriter, validation: SplitWriter, plan: Plan
) -> None:
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


def _enough(n_train: int, n_validation: int, plan: Plan) -> bool:
    """Whether both splits are full. Without a training size everything is read; without a
    validation size validation has what was held out while training was filled."""
    if plan.train_size is None or n_train < plan.train_size:
        return False
    return plan.validation_size is None or n_validation >= plan.validation_size


def _split_by_tokens(aside: Path, tokenizer: Tokenizer, plan: Plan, facts: dict[str, Any]) -> None:
    """If one split got no document, hold out the last part of all tokens instead."""
    names = tuple(f"{name}.tokens" for name in NAMES)
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
