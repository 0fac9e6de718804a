"""The named data sets, and local files: each a `Source` of documents.

A source is cheap to create: it has an `identity`, the key of the token cache, and reads nothing
before it is opened. The `datasets` library is imported only for sets from the hub and for Parquet
files; built-in stories, `.txt` and `.jsonl` need no other package.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mantrans.config import DATASETS
from mantrans.data import stories, text
from mantrans.data.text import Piece, ReadReport
from mantrans.errors import DataError

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
    """An opened source; `validation` is None if the set has no such split."""

    train: Iterator[Piece]
    validation: Iterator[Piece] | None


@dataclass(frozen=True)
class Source:
    """A source of documents.

    `identity`: everything that determines them, as plain data, except the content of `files`;
    `n_bytes`: the size, if known; `open`: starts reading and counts broken lines in the report.
    """

    name: str
    identity: dict[str, Any]
    n_bytes: int | None
    open: Callable[[ReadReport], Splits]
    files: tuple[Path, ...] = ()


def find_source(
    dataset: str,
    *,
    path: str | Path | None = None,
    text_field: str | None = None,
    document_separator: str = "eot",
    on_broken_lines: str = "skip",
    subset_size: int | None = None,
    val_subset_size: int | None = None,
) -> Source:
    """The source of that name. DataError for an unknown name or missing files.

    The two sizes matter only for the built-in stories, of which there are `stories.COUNT`.
    """
    if dataset == "builtin-stories":
        return _builtin(subset_size, val_subset_size)
    if dataset == "local":
        if path is None:
            raise DataError("data.path: expected a file or folder for dataset local, got none")
        refuse = on_broken_lines == "refuse"
        return _local(Path(path), text_field or "text", document_separator, refuse)
    if dataset in HUB_SETS:
        return _from_hub(dataset, text_field)
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

    def opened(report: ReadReport) -> Splits:
        pieces = [Piece(story, True) for story in stories.stories()]
        return Splits(iter(pieces[n_held : n_held + n_train]), iter(pieces[:n_held]))

    digest = hashlib.sha256(stories.FILE.read_bytes()).hexdigest()
    identity = {"stories": digest, "held_out": n_held, "train": n_train}
    return Source("builtin-stories", identity, None, opened)


def _too_many(field: str, most: int, found: int) -> DataError:
    return DataError(
        f"data.{field}: expected at most {most:,}, got {found:,}; there are {stories.COUNT:,} "
        "built-in stories, for training and validation together"
    )


def _local(path: Path, text_field: str, separator: str, refuse: bool) -> Source:
    """The identity is the files' content and their kinds, which determine how they are read."""
    try:
        files = text.local_files(path)
        size = sum(file.stat().st_size for file in files)
    except OSError as error:
        raise DataError(f"data.path {path}: cannot be read: {error.strerror or error}") from None

    def opened(report: ReadReport) -> Splits:
        return Splits(text.read_files(files, separator, text_field, refuse, report), None)

    identity = {
        "kinds": [file.suffix.lower() for file in files],
        "text_field": text_field,
        "separator": separator,
        "refuse_broken_lines": refuse,
    }
    return Source(f"local-{path.stem or 'files'}", identity, size, opened, tuple(files))


def _from_hub(name: str, text_field: str | None) -> Source:
    """A set of the hub; its `validation` or `test` split is used for validation."""
    chosen = HUB_SETS[name]
    columns = (text_field,) if text_field else chosen.columns

    def opened(report: ReadReport) -> Splits:
        splits = _load_from_hub(name, chosen.repository)
        held = splits.get("validation", splits.get("test"))
        return Splits(
            _documents(splits["train"], columns, name),
            None if held is None else _documents(held, columns, name),
        )

    identity = {"repository": chosen.repository, "columns": list(columns)}
    return Source(name, identity, None, opened)


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


def _documents(rows: Any, columns: tuple[str, ...], name: str) -> Iterator[Piece]:
    """Each row's columns, joined by a blank line, as one document."""
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise DataError(
            f"data.dataset {name!r}: expected a column {missing[0]!r}, got "
            f"{', '.join(rows.column_names)}; set data.text_field"
        )
    for row in rows.select_columns(list(columns)):
        parts = [row[column] for column in columns]
        yield from text.pieces_of("\n\n".join(part for part in parts if isinstance(part, str)))
