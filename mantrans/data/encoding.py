"""Text to tokens on the disk, batch by batch: in this process or in several, and resumable.

The pieces of a split are collected in batches. Each is tokenized, here or in another process, and
written, in the order in which they were collected; then a line of the journal says so. After a
kill, the text is read and divided again, which is fast, and a batch whose text is the journal's is
not tokenized again: its tokens are in the file, and have the checksum that the journal gives them;
so has each line of the journal. So the files are the same however often the work was broken off,
and nothing needs to reach the disk in any order.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from operator import index
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from mantrans.data.shards import TokenFileWriter
from mantrans.data.text import Piece, ReadReport
from mantrans.data.tokenizer import Tokenizer
from mantrans.errors import UnfinishedError
from mantrans.records import JsonLines, read_records

JOURNAL = "journal.jsonl"
BATCH = 2**20  # characters
_SHORTEST = 64  # of a piece, on average, so that a batch has a limited number of them
_WAITING = 2  # batches for each process, so that none waits for work and memory is bounded


class OtherTextError(Exception):
    """The text is not the one of the journal: all has to be tokenized anew."""


class Batch(NamedTuple):
    """Pieces of one split. `read`: bytes of the source that were read until then."""

    split: str
    pieces: list[Piece]
    read: int

    def digest(self) -> str:
        """Of all that its tokens depend on, besides the tokenizer."""
        parts = [piece.text if piece.tokens is None else piece.tokens for piece in self.pieces]
        digest = hashlib.blake2b(digest_size=16)
        digest.update(bytes(piece.is_last for piece in self.pieces))
        digest.update(np.array([len(part) for part in parts], dtype="<i8").tobytes())
        digest.update("".join(part for part in parts if isinstance(part, str)).encode())
        for part in parts:
            if not isinstance(part, str):
                digest.update(part.tobytes())
        return digest.hexdigest()


class BatchWriter:
    """Tokenizes batches and writes them in order, each to the file of its split.

    folder: has the journal. writers: by split, opened with `kept`. processes: that tokenize beside
    this one; 1: none, this one does it.

    `done`: bytes of the source that are done, at first by an earlier process; `advance` is called
    with the number of those that are done now. Use as a context manager.
    Raises UnfinishedError if one of the processes ends.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        writers: dict[str, TokenFileWriter],
        processes: int = 1,
    ) -> None:
        self.tokenizer, self.writers = tokenizer, writers
        self.advance: Callable[[int], None] = lambda n: None
        self._taken_over = deque(_verified(folder / JOURNAL, writers))
        self.done: int = self._taken_over[-1]["read"] if self._taken_over else 0
        self._written = len(self._taken_over)
        self._journal = JsonLines(folder / JOURNAL, self._written)
        self._waiting: deque[tuple[Batch, str, Future[np.ndarray]]] = deque()
        self._most = _WAITING * processes
        self._pool = _pool(tokenizer, processes) if processes > 1 else None

    def submit(self, batch: Batch) -> None:
        """Tokenize and write it, now or later. OtherTextError if the journal has another text."""
        text = batch.digest()
        if self._taken_over:
            line = self._taken_over.popleft()
            if (line["split"], line["text"]) != (batch.split, text):
                raise OtherTextError
        elif self._pool is None or any(piece.tokens is not None for piece in batch.pieces):
            self.finish()
            self._write(batch, text, encoded(self.tokenizer, batch.pieces))
        else:
            with _explained(), _interrupts_later():
                plain = [(piece.text, piece.is_last) for piece in batch.pieces]
                self._waiting.append((batch, text, self._pool.submit(_encoded_here, plain)))
            if len(self._waiting) >= self._most:
                self._write_oldest()

    def finish(self) -> None:
        """Write what has been submitted. OtherTextError if the journal's text is longer."""
        if self._taken_over:
            raise OtherTextError
        while self._waiting:
            self._write_oldest()

    def _write_oldest(self) -> None:
        batch, text, future = self._waiting.popleft()
        with _explained():
            tokens = future.result()
        self._write(batch, text, tokens)

    def _write(self, batch: Batch, text: str, tokens: np.ndarray) -> None:
        writer = self.writers[batch.split]
        n_bytes = int(self.tokenizer.token_bytes[tokens].sum())
        n_documents = sum(piece.is_last for piece in batch.pieces)
        checksum = writer.write(tokens, n_bytes, n_documents)
        writer.flush()
        self._written += 1
        line = {
            "step": self._written, "split": batch.split, "text": text, "tokens": tokens.size,
            "bytes": n_bytes, "documents": n_documents, "checksum": checksum, "read": batch.read,
        }  # fmt: skip
        self._journal.append({**line, "seal": _seal(line)})
        self.advance(batch.read - self.done)
        self.done = batch.read

    def __enter__(self) -> BatchWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._journal.close()
        if self._pool is not None:
            self._pool.shutdown(wait=kind is None, cancel_futures=True)


class SplitWriter:
    """Collects the pieces of one split, which `report` counts, in batches."""

    def __init__(self, split: str, batches: BatchWriter, report: ReadReport) -> None:
        self.split, self.batches, self.report = split, batches, report
        self._pieces: list[Piece] = []
        self._length = 0

    def add(self, piece: Piece) -> None:
        self._pieces.append(piece)
        self._length += len(piece.text) if piece.tokens is None else len(piece.tokens)
        if self._length >= BATCH or len(self._pieces) >= BATCH // _SHORTEST:
            self.flush()

    def flush(self) -> None:
        """Submit what has been collected."""
        if self._pieces:
            self.batches.submit(Batch(self.split, self._pieces, self.report.read))
        self._pieces, self._length = [], 0


def encoded(tokenizer: Tokenizer, pieces: list[Piece]) -> np.ndarray:
    """The tokens of all pieces, uint32. A text that ends a document is followed by end-of-text."""
    texts = iter(tokenizer.encode_batch([p.text for p in pieces if p.tokens is None]))
    tokens = array("I")  # numpy reads a list of integers more slowly
    for piece in pieces:
        if piece.tokens is not None:
            tokens.frombytes(piece.tokens.astype(np.uintc).tobytes())
            continue
        tokens.fromlist(next(texts))
        if piece.is_last:
            tokens.append(tokenizer.eot_id)
    return np.array(tokens, dtype=np.uint32)


def _verified(journal: Path, writers: dict[str, TokenFileWriter]) -> list[dict[str, Any]]:
    """The journal's lines until the first whose tokens are not in the files as it says."""
    lines: list[dict[str, Any]] = []
    with contextlib.suppress(FileNotFoundError, LookupError, TypeError, ValueError):
        for line in read_records(journal):
            if line.pop("seal") != _seal(line) or line["step"] != len(lines) + 1:
                break
            tokens, n_bytes, documents, _ = (
                index(line[name]) for name in ("tokens", "bytes", "documents", "read")
            )
            if not writers[line["split"]].adopt(tokens, n_bytes, documents, line["checksum"]):
                break
            lines.append(line)
    return lines


def _seal(line: dict[str, Any]) -> str:
    """Of a line of the journal, so that any change in it is noticed."""
    text = json.dumps(line, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


# ------------------------------------------------------------------------------ other processes

_tokenizer: Tokenizer | None = None  # of such a process


def _pool(tokenizer: Tokenizer, processes: int) -> ProcessPoolExecutor:
    """Processes that each have the tokenizer. They are new ones: a copy of this one (fork) could
    hold a lock of a thread that is not copied."""
    new = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, new, initializer=_begin, initargs=(tokenizer,))


def _begin(tokenizer: Tokenizer) -> None:
    """In a new process: one thread, and an end with the first process."""
    global _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _tokenizer = tokenizer


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encoded_here(pieces: list[tuple[str, bool]]) -> np.ndarray:
    """In such a process: the tokens of (text, is_last) of each piece."""
    assert _tokenizer is not None
    return encoded(_tokenizer, [Piece(*piece) for piece in pieces])


@contextlib.contextmanager
def _interrupts_later() -> Iterator[None]:
    """Ctrl-C comes after this; to the processes that are started here, which inherit it, never."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool:
        raise UnfinishedError(
            "a process that tokenizes has ended, perhaps for lack of memory, of which fewer "
            "--processes need less"
        ) from None
