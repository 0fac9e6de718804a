"""Data sets of the Hugging Face hub, `hub:NAME[:FIELD]`: their Parquet files, one after the other.

NAME is OWNER/SET, or OWNER/SET/FOLDER for one of several subsets. The files are those of the main
branch, or where it has none those that the hub has made of the set, on the branch
refs/convert/parquet. Which split a file belongs to is in its name or its folder's. A file is
downloaded when its turn comes, by `huggingface_hub`, which every tokenizer needs anyway: it reads
HF_ENDPOINT and HF_TOKEN, tries again, and goes on with a file that was broken off. The list of
files, with the set's revision, is kept beside them, so that what goes on goes on with the same.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

from mantrans.checkpoint.atomic import replacing, write_all
from mantrans.errors import DataError, UnfinishedError, single_line

CONVERTED = "refs/convert/parquet"
LIST, _FILES = "hub.json", "hub"
_UNKNOWN = 0  # size of a file whose size the hub does not say
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {word: split for split, words in _SPLITS.items() for word in words}
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
Answer = TypeVar("Answer")


class HubName(NamedTuple):
    """`data.dataset: hub:...`. repository: OWNER/SET, or an old set's one name; folder: "" for all
    that it has; field: None if none is named."""

    repository: str
    folder: str
    field: str | None

    @classmethod
    def of(cls, dataset: str) -> HubName:
        """Of a name that a configuration has accepted."""
        name, _, field = dataset.removeprefix("hub:").partition(":")
        parts = name.split("/")
        return cls("/".join(parts[:2]), "/".join(parts[2:]), field or None)

    def __str__(self) -> str:
        return f"hub:{'/'.join(filter(None, self[:2]))}"


class HubFiles:
    """The set's files. folder: where they are downloaded to, one by one.

    `n_bytes`: of all files that are read. Raises DataError: there is no such set, or it has no
    Parquet file or several subsets; UnfinishedError: the hub does not answer.
    """

    def __init__(self, name: HubName, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.revision, self.sizes = _kept(folder / LIST) or self._ask()
        with replacing(folder / LIST) as kept:
            write_all(kept, json.dumps([self.revision, self.sizes]).encode())
        chosen = _subset(name, [file for file in self.sizes if file.startswith(_prefix(name))])
        self.train = chosen.get("train") or chosen.get("", [])
        self.validation = chosen.get("validation", chosen.get("test"))
        if not self.train:
            raise DataError(f"{name}: expected files to train on, got only {', '.join(chosen)}")
        self.n_bytes = sum(self.sizes[file] for file in [*self.train, *(self.validation or [])])

    def paths(self, files: list[str]) -> Iterator[Path]:
        """Where each file is, once it is there, whole."""
        from huggingface_hub import hf_hub_download

        for file in files:
            path = self.folder / _FILES / file
            if not (path.is_file() and self.sizes[file] in (path.stat().st_size, _UNKNOWN)):
                path.unlink(missing_ok=True)
                download = partial(
                    hf_hub_download, self.name.repository, file, repo_type="dataset",
                    revision=self.revision, local_dir=self.folder / _FILES, endpoint=_endpoint(),
                )  # fmt: skip
                with _quiet():
                    _answer(self.name, download)
            yield path

    def _ask(self) -> tuple[str, dict[str, int]]:
        """The revision and the sizes of the set's Parquet files."""
        from huggingface_hub import HfApi

        for branch in (None, CONVERTED):
            try:
                ask = partial(
                    HfApi(_endpoint()).dataset_info, self.name.repository, files_metadata=True
                )
                found = _answer(self.name, partial(ask, revision=branch))
            except _NoSuchRevisionError:
                break
            files = {
                s.rfilename: s.size or _UNKNOWN for s in found.siblings or [] if _is_parquet(s)
            }
            if files:
                return found.sha or branch or "main", files
        raise DataError(f"{self.name}: expected Parquet files, got a set that has none on the hub")


class _NoSuchRevisionError(DataError):
    """A branch that the set does not have, or a revision that is gone: history can be rewritten."""


def _kept(file: Path) -> tuple[str, dict[str, int]] | None:
    """The list that an earlier process has kept; None if it is not there, or damaged."""
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, RecursionError):
        revision, sizes = json.loads(file.read_bytes())
        if isinstance(revision, str) and all(type(size) is int for size in sizes.values()):
            return revision, sizes
    return None


def _answer(name: HubName, ask: Callable[[], Answer]) -> Answer:
    """What the hub answers; one line for whatever it does not."""
    from huggingface_hub import errors

    try:
        return ask()
    except errors.HFValidationError as error:
        raise DataError(
            f"{name}: expected a name that the hub accepts, got another: {single_line(str(error))}"
        ) from None
    except errors.RevisionNotFoundError:
        raise _NoSuchRevisionError(
            f"{name}: expected the revision that was listed before, got none on the hub; run the "
            "same command again to begin anew"
        ) from None
    except errors.GatedRepoError:
        raise DataError(
            f"{name}: expected a set that may be read, got one whose terms are not accepted: "
            "accept them on its page, and set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise _no_such_set(name) from None
    except Exception as error:  # network, proxy, disk: the library raises many kinds
        reason = single_line((str(error).splitlines() or [""])[0] or type(error).__name__)
        local = isinstance(error, errors.LocalEntryNotFoundError)  # there was no answer
        if isinstance(error, errors.EntryNotFoundError) and not local:
            raise DataError(f"{name}: expected the files that it lists, got {reason}") from None
        if getattr(getattr(error, "response", None), "status_code", None) in (403, 404):
            raise _no_such_set(name) from None
        if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
            raise
        raise UnfinishedError(f"{name}: the hub does not answer ({reason})") from None


def _endpoint() -> str | None:
    """The library reads the variable only when it is imported, which may have been earlier."""
    return os.environ.get("HF_ENDPOINT") or None


def _no_such_set(name: HubName) -> DataError:
    return DataError(
        f"{name}: expected a data set on the hub, got no such set, or one that needs HF_TOKEN"
    )


def _is_parquet(sibling: Any) -> bool:
    """DataError for a name that leads out of the folder."""
    path = PurePosixPath(sibling.rfilename)
    if path.is_absolute() or ".." in path.parts or "\\" in sibling.rfilename:
        raise DataError(f"hub: expected names of files, got {single_line(sibling.rfilename)}")
    return path.suffix == ".parquet"


def _prefix(name: HubName) -> str:
    return f"{name.folder}/" if name.folder else ""


def _subset(name: HubName, files: list[str]) -> dict[str, list[str]]:
    """The files of each split, "" for those that name none, of the only subset or the default."""
    subsets: dict[str, dict[str, list[str]]] = {}
    for file in sorted(files):
        *folders, own = file.split("/")
        split = next((s for part in (own, *reversed(folders)) if (s := _split(part))), "")
        subset = "/".join(f for f in folders if f != "data" and not _split(f))
        subsets.setdefault(subset, {}).setdefault(split, []).append(file)
    if "default" in subsets:
        return subsets["default"]
    if len(subsets) != 1:
        known = single_line(", ".join(sorted({"/".join(f.split("/")[:-1]) for f in files})))
        raise DataError(
            f"{name}: expected one subset, as hub:{name.repository}/FOLDER, got "
            f"{f'the folders {known}' if files else 'no file there'}"
        )
    return next(iter(subsets.values()))


def _split(part: str) -> str:
    """The split that is a word of a file's or a folder's name, or ""."""
    words = re.split(r"[^a-z]+", part.lower())
    return next((_SPLIT_OF[word] for word in words if word in _SPLIT_OF), "")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's own bars: there is one for all."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()
