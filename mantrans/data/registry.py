"""The named data sets, and local files: each a `Source` of documents.

A source is cheap to create: it has an `identity`, the key of the token cache, and reads nothing
before it is opened. The `datasets` library is imported only for sets from the hub, `pyarrow` for
Parquet and `.zst` files; built-in stories, `.txt` and `.jsonl` need no other package.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol

from mantrans.config import DATASETS
from mantrans.data import stories, text
from mantrans.data.files import COMPRESSED, kind_of, local_files
from mantrans.data.hub import HubFiles, HubName
from mantrans.data.parquet import columns
from mantrans.data.text import Piece, ReadReport
from mantrans.data.tokenizer import Tokenizer
from mantrans.errors import DataError, single_line

DEFAULT_VALIDATION_STORIES = 500


@dataclass(frozen=True)
class HubSet:
    """A data set on the Hugging Face hub: its repository, and the columns of a document."""

    repository: str
    columns: tuple[str, ...]


HUB_SETS = {
    "tinystories": HubSet("roneneldan/TinyStories", ("text",)),
    "tiny-textbooks": HubSet("nampdn-ai/tiny-textbooks", ("textbook",)),
    "tiny-strange-textbooks": HubSet("nampdn-ai/tiny-strange-textbooks", ("text",)),
    "tiny-codes": HubSet("nampdn-ai/tiny-codes", ("prompt", "response")),
}


@dataclass(frozen=True)
class Splits:
    """An opened source; `validation` is None if the set has no such split.

    `documents`: how many there are in all, or None where only reading them tells. `n_bytes`: of the
    files as they are on the disk, which `ReadReport.read` counts; None for a source without files.
    `is_remote`: what is not used is not read either, to count it, since it would be downloaded.
    """

    train: Iterator[Piece]
    validation: Iterator[Piece] | None
    documents: int | None = None
    n_bytes: int | None = None
    is_remote: bool = False


class Opener(Protocol):
    """Starts reading a source; what it skips is counted in `report`.

    tokenizer: that of files that hold tokens; None to accept only text. folder: where files may be
    kept until all is read; None for a source that needs none.
    """

    def __call__(
        self, report: ReadReport, tokenizer: Tokenizer | None = None, folder: Path | None = None
    ) -> Splits: ...


@dataclass(frozen=True)
class Source:
    """A source of documents.

    `identity`: everything that determines them, as plain data, except the content of `files`;
    `open`: starts reading; `notes`: which files were passed over.
    """

    name: str
    identity: dict[str, Any]
    open: Opener
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()


def find_source(
    dataset: str,
    *,
    path: str | Path | None = None,
    val_path: str | Path | None = None,
    text_field: str | None = None,
    document_separator: str = "eot",
    on_broken_lines: str = "skip",
    subset_size: int | None = None,
    val_subset_size: int | None = None,
    path_name: str = "data.path",
) -> Source:
    """The source of that name. DataError for an unknown name or missing files.

    val_path: text to validate on, of dataset local. path_name: what an error calls `path`. The two
    sizes matter only for the built-in stories, of which there are `stories.COUNT`.
    """
    refuse = on_broken_lines == "refuse"
    if dataset == "builtin-stories":
        return _builtin(subset_size, val_subset_size)
    if dataset == "local":
        if path is None:
            raise DataError("data.path: expected a file or folder for dataset local, got none")
        chosen = _local_files(Path(path), path_name, val_path)
        return _local(chosen, Path(path).stem, text_field or "text", document_separator, refuse)
    if dataset in HUB_SETS:
        return _from_hub(dataset, text_field, refuse)
    if dataset.startswith("hub:"):
        return _streamed(HubName.of(dataset), text_field, refuse)
    close = get_close_matches(dataset, DATASETS, n=1)
    raise DataError(
        f"data.dataset: expected one of {', '.join(DATASETS)}, got {dataset!r}"
        + (f"; did you mean {close[0]!r}?" if close else "")
    )


def _builtin(subset_size: int | None, val_subset_size: int | None) -> Source:
    """The first stories are for validation, those after them for training."""
    n_held = DEFAULT_VALIDATION_STORIES if val_subset_size is None else val_subset_size
    if n_held >= stories.COUNT:
        raise _too_many("val_subset_size", stories.COUNT - 1, n_held)
    n_train = stories.COUNT - n_held if subset_size is None else subset_size
    if n_held + n_train > stories.COUNT:
        raise _too_many("subset_size", stories.COUNT - n_held, n_train)

    def opened(
        report: ReadReport, tokenizer: Tokenizer | None = None, folder: Path | None = None
    ) -> Splits:
        pieces = [Piece(story, True) for story in stories.stories()]
        held, rest = pieces[:n_held], pieces[n_held : n_held + n_train]
        return Splits(iter(rest), iter(held), stories.COUNT)

    digest = hashlib.sha256(stories.FILE.read_bytes()).hexdigest()
    identity = {"stories": digest, "held_out": n_held, "train": n_train}
    return Source("builtin-stories", identity, opened)


def _too_many(field: str, most: int, found: int) -> DataError:
    return DataError(
        f"data.{field}: expected at most {most:,}, got {found:,}; there are {stories.COUNT:,} "
        "built-in stories, for training and validation together"
    )


@dataclass(frozen=True)
class _Chosen:
    """Files to train on and, if they are files of their own, to validate on."""

    train: list[Path]
    validation: list[Path] | None
    notes: tuple[str, ...]


def _local_files(path: Path, path_name: str, val_path: str | Path | None) -> _Chosen:
    """The files of both paths; those to validate on are never trained on."""
    where = path_name, path
    try:
        files, notes = local_files(path, path_name)
        if val_path is None:
            return _Chosen(files, None, tuple(notes))
        where = "data.val_path", Path(val_path)
        held, more = local_files(val_path, where[0])
        to_validate = {_place(file) for file in held}
        kept = [file for file in files if _place(file) not in to_validate]
    except OSError as error:
        raise DataError(
            f"{where[0]} {where[1]}: cannot be read: {error.strerror or error}"
        ) from None
    if not kept:
        raise DataError(
            f"data.val_path: expected other files than all of data.path ({path}), got {val_path}"
        )
    if len(kept) < len(files):
        notes.append(
            f"{len(files) - len(kept)} of {len(files)} files of data.path are also in "
            "data.val_path, and are not trained on"
        )
    return _Chosen(kept, held, (*notes, *more))


def _place(file: Path) -> tuple[int, int]:
    """Where the content is, under whatever name."""
    facts = file.stat()
    return facts.st_dev, facts.st_ino


def _local(chosen: _Chosen, name: str, text_field: str, separator: str, refuse: bool) -> Source:
    """The identity is the files' content and their kinds, which determine how they are read."""
    files = (*chosen.train, *(chosen.validation or ()))
    size = sum(file.stat().st_size for file in files)

    def opened(
        report: ReadReport, tokenizer: Tokenizer | None = None, folder: Path | None = None
    ) -> Splits:
        train, held = (
            text.read_files(part or [], separator, text_field, refuse, report, tokenizer)
            for part in (chosen.train, chosen.validation)
        )
        return Splits(train, None if chosen.validation is None else held, n_bytes=size)

    identity = {
        "kinds": [[kind_of(file), file.suffix.lower() in COMPRESSED] for file in files],
        "trained_on": len(chosen.train),
        "text_field": text_field,
        "separator": separator,
        "refuse_broken_lines": refuse,
    }
    return Source(f"local-{name or 'files'}", identity, opened, files, chosen.notes)


def _streamed(name: HubName, text_field: str | None, refuse: bool) -> Source:
    """Any set of the hub, file by file; its `validation` or `test` split is used for validation."""
    field = name.field or text_field or "text"

    def opened(
        report: ReadReport, tokenizer: Tokenizer | None = None, folder: Path | None = None
    ) -> Splits:
        if folder is None:
            raise ValueError("expected a folder for the files")
        found = HubFiles(name, folder)

        def pieces(files: list[str]) -> Iterator[Piece]:
            paths = _with_field(name, field, found.paths(files))
            yield from text.read_files(paths, "eot", field, refuse, report)

        held = None if found.validation is None else pieces(found.validation)
        return Splits(pieces(found.train), held, n_bytes=found.n_bytes, is_remote=True)

    identity = {"hub": name.repository, "folder": name.folder, "field": field}
    return Source(
        f"hub-{name.repository}-{name.folder}".rstrip("-"),
        {**identity, "refuse_broken_lines": refuse},
        opened,
    )


def _with_field(name: HubName, field: str, paths: Iterator[Path]) -> Iterator[Path]:
    """The files, each of which must have that field."""
    for path in paths:
        fields = columns(path)
        if field not in fields:
            given = repr(field) if name.field else f"none, and there is no {field!r}"
            raise DataError(
                f"{name}: expected one of its fields {single_line(', '.join(fields))}, as "
                f"hub:NAME:FIELD, got {given}"
            )
        yield path


def _from_hub(name: str, text_field: str | None, refuse: bool) -> Source:
    """A set of the hub; its `validation` or `test` split is used for validation."""
    chosen = HUB_SETS[name]
    columns = (text_field,) if text_field else chosen.columns

    def opened(
        report: ReadReport, tokenizer: Tokenizer | None = None, folder: Path | None = None
    ) -> Splits:
        splits = _load_from_hub(name, chosen.repository)
        held = splits.get("validation", splits.get("test"))
        train, validation = (
            None if rows is None else _documents(rows, columns, name, refuse, report)
            for rows in (splits["train"], held)
        )
        assert train is not None
        return Splits(train, validation, len(splits["train"]) + len(held or ()))

    identity = {
        "repository": chosen.repository, "columns": list(columns), "refuse_broken_lines": refuse
    }  # fmt: skip
    return Source(name, identity, opened)


def _load_from_hub(name: str, repository: str) -> Any:
    """The set's splits, memory-mapped by `datasets`; from its cache if the hub does not answer
    (after several tries by the library; HF_HUB_OFFLINE=1 uses the cache at once)."""
    ways = (
        "give a local file (data.dataset: local, data.path: ...), run once with access to the hub "
        "to fill its cache, or use data.dataset: builtin-stories"
    )
    try:
        import datasets

        return datasets.load_dataset(repository)
    except ImportError:
        raise DataError(
            f"data.dataset {name!r} needs the package datasets (pip install datasets); or {ways}"
        ) from None
    except Exception as error:  # network, access, disk: the libraries raise many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0][:150]
        raise DataError(
            f"data.dataset {name!r} ({repository}) cannot be loaded from the hub or the cache "
            f"({reason}): {ways}"
        ) from None


def _documents(
    rows: Any, columns: tuple[str, ...], name: str, refuse: bool, report: ReadReport
) -> Iterator[Piece]:
    """Each row's columns, joined by a blank line, as one document."""
    for column in columns:
        if column not in rows.column_names:
            raise DataError(
                f"data.dataset {name!r}: expected a column {column!r}, got "
                f"{single_line(', '.join(rows.column_names))}; set data.text_field"
            )
        kind = getattr(rows.features[column], "dtype", rows.features[column])
        if kind not in ("string", "large_string", "null"):
            raise DataError(
                f"data.dataset {name!r}: expected text in column {column!r}, got {kind}; "
                "set data.text_field"
            )

    def texts() -> Iterator[tuple[int, str | None, str]]:
        for number, row in enumerate(rows.select_columns(list(columns)), start=1):
            parts = [row[column] for column in columns if row[column] is not None]
            yield number, "\n\n".join(parts) if parts else None, "its text is null"

    for document in report.texts(texts(), name, refuse):
        yield from text.pieces_of(document)
