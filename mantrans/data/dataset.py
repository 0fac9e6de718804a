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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from mantrans import terminal
from mantrans.data.encoding import JOURNAL, BatchWriter, OtherTextError, SplitWriter
from mantrans.data.files import kind_of
from mantrans.data.hub import LIST
from mantrans.data.known import KnownFiles, content_hash
from mantrans.data.registry import Source, find_source
from mantrans.data.shards import TokenFileWriter, TokenStream
from mantrans.data.splitting import Plan, write_splits
from mantrans.data.text import ReadReport, read_txt
from mantrans.data.tokenizer import Tokenizer
from mantrans.errors import DataError, UnfinishedError, single_line

if TYPE_CHECKING:
    from mantrans.config import DataConfig

FORMAT = 2
"""Increased whenever the same text and settings would give other files."""


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
    processes: int = 1,
    quiet: bool = False,
) -> TokenDataset:
    """The data set's tokens, from the cache or written now.

    They do not depend on the seed: all runs are validated on the same documents. Unless quiet, its
    notes are printed. processes: that tokenize; with more than one the program that calls this
    needs the line `if __name__ == "__main__":`, as for any use of `multiprocessing`. Raises
    UnfinishedError if the work was broken off, by the hub, the disk or a lack of memory, which the
    same call goes on with; other DataError for text that cannot be used, or a cache that is damaged
    or cannot be written.
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
    plan = Plan(data_config.share_held_out, data_config.subset_size, data_config.val_subset_size)
    known = KnownFiles(Path(cache_dir) / "known_files.json")
    folder = Path(cache_dir) / _folder_name(source, tokenizer, plan, known)
    try:
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _locked(folder, quiet):
                if not folder.is_dir():
                    _write_folder(folder, source, tokenizer, plan, processes, quiet)
        _remove_workings(folder)
    except (OSError, UnfinishedError) as error:
        raise _unfinished(folder, error) from None
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
        pieces, size = read_txt(path, separator, report), path.stat().st_size
    else:
        source = find_source(
            "local",
            path=path,
            path_name=name,
            text_field=data_config.text_field,
            document_separator=separator,
            on_broken_lines=data_config.on_broken_lines,
        )
        splits, notes = source.open(report, tokenizer), source.notes
        pieces, size = splits.train, splits.n_bytes
    with tempfile.TemporaryDirectory() as folder:
        writer = TokenFileWriter(Path(folder) / "text.tokens", tokenizer.vocab_size)
        with (
            writer,
            BatchWriter(Path(folder), tokenizer, {"text": writer}) as batches,
            terminal.Progress(size, f"tokenizing {path.name}", "B") as bar,
        ):
            batches.advance = bar.update
            split = SplitWriter("text", batches, report)
            for piece in pieces:
                split.add(piece)
            split.flush()
            batches.finish()
        for note in (*notes, *report.notes()):
            terminal.say(f"note: {note}")
        stream = TokenStream(writer.path)
        if not len(stream):
            raise DataError(f"{name}: expected text, got none in {path}")
        yield stream


def _folder_name(source: Source, tokenizer: Tokenizer, plan: Plan, known: KnownFiles) -> str:
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


@contextmanager
def _locked(folder: Path, quiet: bool) -> Iterator[None]:
    """Hold the lock of the process that writes the folder; whoever waits for it says so."""
    lock = filelock.FileLock(folder.parent / f"{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        if not quiet:
            terminal.say(f"waiting for another process, which writes {folder}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _write_folder(
    folder: Path, source: Source, tokenizer: Tokenizer, plan: Plan, processes: int, quiet: bool
) -> None:
    """Write both files to a folder beside it, then rename that. Called under the lock.

    What a process leaves there that was killed or broken off, the next one takes over.
    """
    aside = _aside(folder)
    aside.mkdir(exist_ok=True)
    try:
        try:
            write_splits(aside, source, tokenizer, plan, processes, quiet)
        except OtherTextError:
            shutil.rmtree(aside)
            aside.mkdir()
            write_splits(aside, source, tokenizer, plan, processes, quiet)
        _sync_folder(aside)
        aside.rename(folder)
        _sync_folder(folder.parent)
    except Exception as error:
        cannot_go_on = isinstance(error, DataError) and not isinstance(error, UnfinishedError)
        if cannot_go_on or not _is_begun(aside):
            shutil.rmtree(aside, ignore_errors=True)
        raise


def _aside(folder: Path) -> Path:
    return folder.parent / f"{folder.name}.unfinished"


def _is_begun(aside: Path) -> bool:
    """Whether there is something that the next process takes over."""
    files = (aside / name for name in (JOURNAL, LIST))
    return any(file.is_file() and file.stat().st_size > 0 for file in files)


def _unfinished(folder: Path, error: OSError | UnfinishedError) -> DataError:
    """The error of tokens that are not written, and what to do."""
    aside, again = _aside(folder), "run the same command again"
    kept = f"what is done is kept in {aside}" if aside.is_dir() else ""
    if isinstance(error, UnfinishedError):
        return UnfinishedError(f"{error}; {kept}: {again}" if kept else str(error))
    what = f"tokens cannot be written to {folder}: {error.strerror or error}; "
    if kept:
        return UnfinishedError(f"{what}{kept}: free the disk and {again}")
    return DataError(f"{what}free the disk, or set data.cache_dir to a folder that can be written")


def _remove_workings(folder: Path) -> None:
    """What was needed to write the tokens, such as the journal, also of a process that was killed
    just after it had renamed the folder."""
    for path in folder.iterdir():
        if path.suffix != ".tokens":
            with contextlib.suppress(OSError):  # the folder may be read-only
                shutil.rmtree(path) if path.is_dir() else path.unlink()


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
