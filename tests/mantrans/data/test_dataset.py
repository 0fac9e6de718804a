"""`prepare`: the right documents in the right split, written once, never half."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import filelock
import numpy as np
import pytest

from mantrans import terminal
from mantrans.config import DataConfig
from mantrans.data import dataset, registry, shards, stories
from mantrans.data.dataset import TokenDataset, prepare
from mantrans.data.holdout import held_out
from mantrans.data.known import KnownFiles
from mantrans.data.registry import find_source
from mantrans.data.shards import TokenFileWriter, TokenStream
from mantrans.data.text import ReadReport
from mantrans.data.tokenizer import Tokenizer, load_tokenizer
from mantrans.errors import DataError

ROOT = Path(__file__).parents[3]
END = "<|endoftext|>"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("tinystories_bpe_4096")


def local(path: Path, **changes: Any) -> DataConfig:
    return DataConfig(**{"dataset": "local", "path": str(path), **changes})


def numbered(path: Path, count: int) -> Path:
    """A text file of `count` documents that say their number."""
    path.write_text(END.join(f"\nThis is story {i}.\n" for i in range(count)))
    return path


def texts(stream: TokenStream, tokenizer: Tokenizer) -> list[str]:
    """The documents of a stream, each ended by the end of text."""
    whole = tokenizer.decode(stream.tokens)
    assert whole.endswith(END)
    return whole.split(END)[:-1]


# --- what is in the streams --------------------------------------------------------------------


def test_prepare_order_and_ends(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Documents are kept in order and ended."""
    file = numbered(tmp_path / "a.txt", 300)
    data = prepare(local(file, validation_fraction=0.1), tokenizer, cache_dir=tmp_path, quiet=True)
    kept = {held: [i for i in range(300) if held_out(i, 0.1) == held] for held in (False, True)}
    for stream, numbers in ((data.train, kept[False]), (data.validation, kept[True])):
        expected = [f"This is story {i}." for i in numbers]
        assert texts(stream, tokenizer) == expected
        assert stream.n_documents == len(expected)
        assert stream.n_bytes == sum(map(len, expected))
    assert 15 < len(kept[True]) < 50


def test_split_smaller_share() -> None:
    """It is part of a larger one."""
    small = {i for i in range(5000) if held_out(i, 0.05)}
    large = {i for i in range(5000) if held_out(i, 0.1)}
    assert small < large
    assert 180 < len(small) < 320
    assert 400 < len(large) < 600


def test_prepare_subsets(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Subsets are the first documents."""
    file = numbered(tmp_path / "a.txt", 500)
    options = {"cache_dir": tmp_path, "quiet": True}
    whole = prepare(local(file, validation_fraction=0.2), tokenizer, **options)
    part = prepare(
        local(file, validation_fraction=0.2, subset_size=20, val_subset_size=30),
        tokenizer,
        **options,
    )
    assert texts(part.train, tokenizer) == texts(whole.train, tokenizer)[:20]
    assert texts(part.validation, tokenizer) == texts(whole.validation, tokenizer)[:30]
    early = prepare(local(file, validation_fraction=0.2, subset_size=20), tokenizer, **options)
    assert texts(early.train, tokenizer) == texts(part.train, tokenizer)
    count = early.validation.n_documents
    assert 0 < count < 20
    assert texts(early.validation, tokenizer) == texts(whole.validation, tokenizer)[:count]


def test_prepare_one_document(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """One document is split by its tokens."""
    text = "A mouse, a fox and a bear. " * 200
    (tmp_path / "a.txt").write_text(text)
    data = prepare(
        local(tmp_path / "a.txt", validation_fraction=0.1),
        tokenizer,
        cache_dir=tmp_path,
        quiet=True,
    )
    together = np.concatenate([data.train.tokens, data.validation.tokens])
    assert tokenizer.decode(together) == text.strip() + END
    assert len(data.validation) == pytest.approx(0.1 * len(together), abs=1)
    assert data.train.n_bytes + data.validation.n_bytes == len(text.strip())
    assert (data.train.n_documents, data.validation.n_documents) == (0, 1)


def test_prepare_end_of_text_inside(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A written end of text inside a document does not end it."""
    lines = [json.dumps({"text": f"one {END} document {i}"}) for i in range(50)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    data = prepare(local(tmp_path / "a.jsonl"), tokenizer, cache_dir=tmp_path, quiet=True)
    n_ends = sum(int((s.tokens == tokenizer.eot_id).sum()) for s in (data.train, data.validation))
    assert n_ends == data.train.n_documents + data.validation.n_documents == 50


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "expected a document"),
        (b"\n\n \r\n", "expected a document"),
        (b"\xef\xbb\xbf", "expected a document"),
        (b"a", "expected at least 4 tokens, got 2"),
        (b"\xff", "expected UTF-8, got 0xff at byte 0"),
    ],
)
def test_prepare_too_small_or_broken(
    tmp_path: Path, tokenizer: Tokenizer, raw: bytes, message: str
) -> None:
    (tmp_path / "a.txt").write_bytes(raw)
    cache = tmp_path / "cache"
    with pytest.raises(DataError, match=message) as error:
        prepare(local(tmp_path / "a.txt"), tokenizer, cache_dir=cache, quiet=True)
    assert "\n" not in str(error.value)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_prepare_broken_lines(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one story"}\nbroken\n' * 30)
    config = local(tmp_path / "a.jsonl")
    for _ in range(2):  # written, and from the cache
        data = prepare(config, tokenizer, cache_dir=tmp_path / "cache")
        said = "30 of 60 rows skipped; the first: not JSON (a.jsonl, line 2)"
        assert data.notes == (said,)
        assert capsys.readouterr().err.count(f"note: {said}\n") == 1
    config = local(tmp_path / "a.jsonl", on_broken_lines="refuse")
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: not JSON"):
        prepare(config, tokenizer, cache_dir=tmp_path / "cache", quiet=True)


def test_prepare_builtin_disjoint(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Builtin stories share none between the splits."""
    config = DataConfig(dataset="builtin-stories", subset_size=600, val_subset_size=80)
    data = prepare(config, tokenizer, cache_dir=tmp_path, quiet=True)
    train, validation = (texts(stream, tokenizer) for stream in (data.train, data.validation))
    assert (len(set(train)), len(set(validation))) == (600, 80)
    assert not set(train) & set(validation)


@pytest.mark.parametrize(
    ("sizes", "field", "most", "found"),
    [
        ({"subset_size": 10_001}, "subset_size", "10,000", "10,001"),
        ({"subset_size": 10_400, "val_subset_size": 101}, "subset_size", "10,399", "10,400"),
        ({"val_subset_size": 10_500}, "val_subset_size", "10,499", "10,500"),
    ],
)
def test_prepare_builtin_too_many(
    tmp_path: Path, tokenizer: Tokenizer, sizes: dict[str, int], field: str, most: str, found: str
) -> None:
    """More builtin stories than there are is refused."""
    config = DataConfig(dataset="builtin-stories", **sizes)
    with pytest.raises(DataError) as error:
        prepare(config, tokenizer, cache_dir=tmp_path, quiet=True)
    assert str(error.value).startswith(f"data.{field}: expected at most {most}, got {found}")
    assert "\n" not in str(error.value)
    assert not any(tmp_path.iterdir())


def test_builtin_all_stories() -> None:
    everything = stories.stories()
    for sizes, n_held in (({}, 500), ({"val_subset_size": 10_499}, 10_499)):
        splits = find_source("builtin-stories", **sizes).open(ReadReport())
        assert splits.validation is not None
        assert [piece.text for piece in splits.validation] == everything[:n_held]
        assert [piece.text for piece in splits.train] == everything[n_held:]


def test_prepare_progress(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    """A progress bar is shown unless quiet."""
    file = numbered(tmp_path / "a.txt", 50)
    prepare(local(file), tokenizer, cache_dir=tmp_path / "one")
    assert "tokenizing local-a" in capsys.readouterr().err
    prepare(local(file), tokenizer, cache_dir=tmp_path / "two", quiet=True)
    assert capsys.readouterr() == ("", "")


# --- how much of the text is used --------------------------------------------------------------


@pytest.mark.promise("what is used is said")
@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
@pytest.mark.parametrize("own_validation", [False, True])
def test_prepare_used_share(
    tmp_path: Path, tokenizer: Tokenizer, suffix: str, own_validation: bool
) -> None:
    """How much of the text is used is said at each start."""

    def written(name: str, stories: list[str]) -> str:
        file = tmp_path / f"{name}.{suffix}"
        if suffix == "txt":
            file.write_text(END.join(stories))
        elif suffix == "jsonl":
            file.write_text("\n".join(json.dumps({"text": story}) for story in stories))
        else:
            pytest.importorskip("datasets").Dataset.from_dict({"text": stories}).to_parquet(file)
        return str(file)

    stories = [f"Number {i}: a naïve fox." for i in range(100)]
    n_bytes = sum(len(story.encode()) for story in stories)
    path = written("a", stories)
    changes: dict[str, Any] = {"validation_fraction": 0.2}
    if own_validation:
        path = written("a", stories[:70])
        changes = {"val_path": written("b", stories[70:])}
    for _ in range(2):  # written, and from the cache
        data = prepare(local(Path(path), **changes), tokenizer, cache_dir=tmp_path, quiet=True)
        assert (data.documents, data.bytes) == (100, n_bytes)
        assert data.usage() == f"all 100 documents, {n_bytes:,} bytes"
        part = local(Path(path), **changes, subset_size=20, val_subset_size=3)
        part_used = prepare(part, tokenizer, cache_dir=tmp_path, quiet=True)
        assert (part_used.documents, part_used.bytes) == (100, n_bytes)
        used = part_used.train.n_bytes + part_used.validation.n_bytes
        assert part_used.usage() == f"23 of 100 documents, {used} of {n_bytes:,} bytes"


def test_prepare_unused_fault(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A fault in text that is not used only leaves that text uncounted."""
    file = numbered(tmp_path / "a.txt", 20_000)
    with file.open("ab") as stream:
        stream.write(b"\xff")
    with pytest.raises(DataError, match="expected UTF-8"):
        prepare(local(file), tokenizer, cache_dir=tmp_path / "cache", quiet=True)
    few = local(file, subset_size=10, val_subset_size=2)
    data = prepare(few, tokenizer, cache_dir=tmp_path / "cache", quiet=True)
    assert data.usage().startswith("12 of more documents, ")


def test_prepare_builtin_counts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Builtin stories say how many there are."""
    config = DataConfig(subset_size=60, val_subset_size=8)
    data = prepare(config, tokenizer, cache_dir=tmp_path, quiet=True)
    assert data.usage().startswith(f"68 of {stories.COUNT:,} documents, ")


# --- a text to validate on ---------------------------------------------------------------------


def test_prepare_validation_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    train, held = numbered(tmp_path / "a.txt", 60), tmp_path / "held"
    held.mkdir()
    (held / "b.txt").write_text("held out one" + END + "held out two")
    (held / "c.jsonl").write_text('{"text": "held out three"}')
    options = {"cache_dir": tmp_path / "cache", "quiet": True}
    data = prepare(local(train, val_path=str(held)), tokenizer, **options)
    assert texts(data.train, tokenizer) == [f"This is story {i}." for i in range(60)]
    assert texts(data.validation, tokenizer) == [f"held out {n}" for n in ("one", "two", "three")]
    first = prepare(local(train, val_path=str(held), val_subset_size=1), tokenizer, **options)
    assert texts(first.validation, tokenizer) == ["held out one"]
    (held / "b.txt").write_text("other")
    other = prepare(local(train, val_path=str(held)), tokenizer, **options)
    assert texts(other.validation, tokenizer)[0] == "other"
    swapped = prepare(local(held, val_path=str(train)), tokenizer, **options)
    assert swapped.train.checksum == other.validation.checksum
    one = prepare(local(train, val_path=str(held / "c.jsonl")), tokenizer, **options)
    assert one.validation.n_documents == 1 and one.train.n_documents == 60


@pytest.mark.promise("other tokens")
def test_prepare_validation_files(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are never trained on."""
    folder = tmp_path / "texts"
    (folder / "held").mkdir(parents=True)
    (folder / "a.txt").write_text("the text to train on")
    (folder / "held" / "b.txt").write_text("the text to validate on")
    (tmp_path / "link.txt").symlink_to(folder / "held" / "b.txt")
    for val_path in (folder / "held", folder / "held" / "b.txt", tmp_path / "link.txt"):
        data = prepare(
            local(folder, val_path=str(val_path)), tokenizer, cache_dir=tmp_path / "cache"
        )
        assert texts(data.train, tokenizer) == ["the text to train on"]
        assert texts(data.validation, tokenizer) == ["the text to validate on"]
        assert "1 of 2 files of data.path are also in data.val_path" in capsys.readouterr().err
    for path in (folder / "held", tmp_path / "link.txt"):
        config = local(path, val_path=str(folder))
        with pytest.raises(DataError, match=r"data\.val_path: expected other files than all of"):
            prepare(config, tokenizer, cache_dir=tmp_path / "cache", quiet=True)


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("none.txt", None, r"data\.val_path: expected a file .* got no such path"),
        ("a.csv", b"x", r"data\.val_path: expected a file"),
        ("a.txt", b" \n", "local-train, to validate on: expected a document"),
        ("a.txt", "held".encode("utf-16"), "expected UTF-8 text, got UTF-16"),
    ],
)
def test_prepare_validation_text_broken(
    tmp_path: Path, tokenizer: Tokenizer, name: str, raw: bytes | None, message: str
) -> None:
    if raw is not None:
        (tmp_path / name).write_bytes(raw)
    config = local(numbered(tmp_path / "train.txt", 30), val_path=str(tmp_path / name))
    with pytest.raises(DataError, match=message):
        prepare(config, tokenizer, cache_dir=tmp_path / "cache", quiet=True)


# --- the cache ---------------------------------------------------------------------------------


def test_prepare_twice(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = local(numbered(tmp_path / "a.txt", 100))
    first = prepare(config, tokenizer, cache_dir=tmp_path / "cache", quiet=True)
    monkeypatch.setattr(dataset, "_write_folder", lambda *_: pytest.fail("written twice"))
    second = prepare(config, tokenizer, cache_dir=tmp_path / "cache", quiet=True)
    assert second.train.path == first.train.path
    assert second.train.checksum == first.train.checksum


def test_cache_key_parts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Everything that decides the tokens is in the key."""
    file = tmp_path / "a.txt"
    file.write_text("\n\n".join(f"story {i}" for i in range(100)))
    folders = set()

    def folder_of(**changes: Any) -> Path:
        data = prepare(local(file, **changes), tokenizer, cache_dir=tmp_path / "cache", quiet=True)
        return data.train.path.parent

    for changes in (
        {},
        {"document_separator": "blank_line"},
        {"validation_fraction": 0.2},
        {"subset_size": 5},
        {"val_subset_size": 5},
        {"text_field": "body"},
        {"on_broken_lines": "refuse"},
    ):
        folders.add(folder_of(**changes))
    assert len(folders) == 7
    facts = file.stat()
    file.write_text(file.read_text().replace("story 7\n", "storY 7\n"))  # of the same size
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))  # and time
    folders.add(folder_of())
    os.utime(file, ns=(0, 12345))  # the same text at another time, and in another place
    folders.add(folder_of())
    (tmp_path / "sub").mkdir()
    file = file.rename(tmp_path / "sub" / "a.txt")
    folders.add(folder_of())
    assert len(folders) == 8
    tokenizer = SimpleNamespace(**vars(tokenizer))
    tokenizer.hash = "0" * 64
    source = find_source("local", path=file)
    plan, known = dataset.Plan(0.05, None, None), KnownFiles(tmp_path / "known")
    folders.add(tmp_path / "cache" / dataset._folder_name(source, tokenizer, plan, known))
    file = file.rename(tmp_path / "sub" / "a.jsonl")  # read in another way
    source = find_source("local", path=file)
    folders.add(tmp_path / "cache" / dataset._folder_name(source, tokenizer, plan, known))
    assert len(folders) == 10


def test_file_digest_known_and_changed(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is known is not read again; what changed is."""
    monkeypatch.setattr("mantrans.data.known._SETTLED", 0)
    file = numbered(tmp_path / "a.txt", 100)

    def start() -> TokenDataset:
        time.sleep(0.02)  # a tick of the file system's clock
        return prepare(local(file), tokenizer, cache_dir=tmp_path / "cache", quiet=True)

    first = start()
    assert start().train.checksum == first.train.checksum
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "content_hash", lambda file: pytest.fail("text read again"))
        patch.setattr(shards, "_summary", lambda *_, **__: pytest.fail("tokens read again"))
        assert start().train.checksum == first.train.checksum

    facts, raw = first.train.path.stat(), bytearray(first.train.path.read_bytes())
    raw[-1] ^= 1
    with first.train.path.open("r+b") as tokens:  # in place: same inode, size and mtime
        tokens.write(raw)
    os.utime(first.train.path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    with pytest.raises(DataError, match="its tokens' checksum is wrong"):
        start()


def test_file_digest_just_changed(tmp_path: Path) -> None:
    """A file that has just changed is not known yet."""
    file, read = tmp_path / "a", []

    def hashed() -> str:
        known = KnownFiles(tmp_path / "known")
        value = known.hash(file, lambda file: str(len(read.append(file) or read)))
        known.save()
        return value

    file.write_text("x")
    assert [hashed(), hashed()] == ["1", "2"]
    os.utime(file, (0, 2**31))  # what counts is ctime: mtime can be set to anything
    assert hashed() == "3" and not (tmp_path / "known").exists()
    time.sleep(2.05)
    assert [hashed(), hashed()] == ["4", "4"]
    for damaged in ("", "[1]", "{", json.dumps({str(file): [1]}), json.dumps({str(file): "x"})):
        (tmp_path / "known").write_text(damaged)
        assert hashed() == str(len(read))
        assert hashed() == str(len(read))
    assert len(read) == 9
    file.unlink()
    with pytest.raises(FileNotFoundError):
        hashed()


def test_cache_earlier_format(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache of an earlier format is written anew."""
    config = local(numbered(tmp_path / "a.txt", 100))
    monkeypatch.setattr(dataset, "FORMAT", 1)
    old = prepare(config, tokenizer, cache_dir=tmp_path / "cache", quiet=True)
    monkeypatch.undo()
    new = prepare(config, tokenizer, cache_dir=tmp_path / "cache", quiet=True)
    assert new.train.path.parent != old.train.path.parent
    assert new.identity == old.identity and new.documents == 100


def test_cache_damaged(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A damaged cache says what to do."""
    config = local(numbered(tmp_path / "a.txt", 100))

    def run() -> TokenDataset:
        return prepare(config, tokenizer, cache_dir=tmp_path / "cache", quiet=True)

    path = run().validation.path
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match=rf"{re.escape(str(path))} is damaged.*delete the folder"):
        run()
    path.unlink()
    with pytest.raises(DataError, match="delete the folder"):
        run()
    for file in path.parent.iterdir():
        file.unlink()
    path.parent.rmdir()
    assert run().validation.path == path


def test_cache_other_tokenizer(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A cache of another tokenizer is refused."""
    config = local(numbered(tmp_path / "a.txt", 100))
    path = prepare(config, tokenizer, cache_dir=tmp_path, quiet=True).train.path
    for facts, message in (
        (
            {"tokenizer_hash": "other", "tokenizer": "theirs"},
            "expected the tokenizer .*, got 'theirs'",
        ),
        ({"tokenizer_hash": tokenizer.hash}, "got 5000: it was written with another tokenizer"),
    ):
        with TokenFileWriter(path, 6000, facts) as writer:
            writer.write([1, 5000 if "5000" in message else 1], 1, 1)
        with pytest.raises(DataError, match=message):
            prepare(config, tokenizer, cache_dir=tmp_path, quiet=True)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_cache_disk_refuses(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """One line, and nothing is left behind."""

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    config = local(numbered(tmp_path / "a.txt", 100))
    with monkeypatch.context() as patch:
        patch.setattr(TokenFileWriter, "write", refuse)
        with pytest.raises(DataError, match=f"{os.strerror(code)}.*data.cache_dir"):
            prepare(config, tokenizer, cache_dir=tmp_path / "cache", quiet=True)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    prepare(config, tokenizer, cache_dir=tmp_path / "cache", quiet=True)


def test_cache_folder_is_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = local(numbered(tmp_path / "a.txt", 100))
    with pytest.raises(DataError, match="tokens cannot be written to"):
        prepare(config, tokenizer, cache_dir=tmp_path / "a.txt" / "x", quiet=True)


def test_cache_file_names(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """File names never leave the cache folder."""
    file = numbered(tmp_path / ("..%2f~ \u6f22" + "\U0001f600" * 50 + ".txt"), 100)
    data = prepare(local(file), tokenizer, cache_dir=tmp_path / "cache", quiet=True)
    assert data.train.path.parent.parent == tmp_path / "cache"
    assert re.fullmatch(r"[A-Za-z0-9_-]+", data.train.path.parent.name)


WORKER = """
    import os, signal, sys
    from mantrans.config import DataConfig
    from mantrans.data.dataset import prepare
    from mantrans.data.shards import TokenFileWriter
    from mantrans.data.tokenizer import load_tokenizer

    if sys.argv[3] == "die":
        whole = TokenFileWriter.write
        def write(self, *arguments):
            whole(self, *arguments)
            self._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        TokenFileWriter.write = write
    config = DataConfig(dataset="local", path=sys.argv[1])
    tokenizer = load_tokenizer("tinystories_bpe_4096")
    data = prepare(config, tokenizer, cache_dir=sys.argv[2], quiet=True)
    print(data.train.checksum)
"""


def worker(file: Path, cache: Path, how: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(WORKER), str(file), str(cache), how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def test_cache_writer_killed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A killed writer leaves nothing that is used."""
    file, cache = numbered(tmp_path / "a.txt", 2000), tmp_path / "cache"
    killed = worker(file, cache, "die")
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert any(path.name.endswith(".unfinished") for path in cache.iterdir())
    data = prepare(local(file), tokenizer, cache_dir=cache, quiet=True)
    assert data.train.n_documents + data.validation.n_documents == 2000
    assert not any(path.name.endswith(".unfinished") for path in cache.iterdir())


def test_cache_two_processes(tmp_path: Path) -> None:
    """Two processes at once agree."""
    file, cache = numbered(tmp_path / "a.txt", 5000), tmp_path / "cache"
    both = [worker(file, cache, "live") for _ in range(2)]
    checksums = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert checksums[0] == checksums[1] != ""
    assert sum(path.is_dir() for path in cache.iterdir()) == 1


def test_cache_waiting_is_said(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits for another process to write the tokens says so."""
    config = local(numbered(tmp_path / "a.txt", 100))
    folder = prepare(config, tokenizer, cache_dir=tmp_path / "cache", quiet=True).train.path.parent
    shutil.rmtree(folder)
    lock = filelock.FileLock(f"{folder}.lock")
    lock.acquire()
    said: list[str] = []

    def say(line: str, stream: Any = None) -> None:
        said.append(line)
        lock.release()

    monkeypatch.setattr(terminal, "say", say)
    prepare(config, tokenizer, cache_dir=tmp_path / "cache")
    assert said[0] == f"waiting for another process, which writes {folder}"


# --- named sets --------------------------------------------------------------------------------


def test_dataset_unknown_name() -> None:
    """Unknown and incomplete names end in one line."""
    with pytest.raises(
        DataError, match=r"expected one of .*, got 'tinystory'; did you mean 'tinystories'"
    ):
        find_source("tinystory")
    with pytest.raises(DataError, match=r"data\.path: expected a file or folder"):
        find_source("local")


@pytest.mark.parametrize("offline", [True, False])
def test_hub_unreachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: bool) -> None:
    """At once with HF_HUB_OFFLINE=1; else after the library's own tries, here without its waits."""
    pytest.importorskip("datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(DataError, match="hub or the cache") as error:
        find_source("tinystories").open(ReadReport())
    for way in ("data.dataset: local", "fill its cache", "builtin-stories"):
        assert way in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "columns", "document"),
    [
        ("tinystories", {"text": "T"}, "T"),
        ("tiny-textbooks", {"text": "no", "textbook": "B"}, "B"),
        ("tiny-strange-textbooks", {"text": "S"}, "S"),
        ("tiny-codes", {"prompt": "P", "response": "R"}, "P\n\nR"),
    ],
)
def test_hub_columns(
    monkeypatch: pytest.MonkeyPatch, name: str, columns: dict[str, str], document: str
) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(repository: str) -> Any:
        asked.append(repository)
        rows = datasets.Dataset.from_dict({key: [value] * 3 for key, value in columns.items()})
        return datasets.DatasetDict({"train": rows, "test": rows.select([0])})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    splits = find_source(name).open(ReadReport())
    assert asked == [registry.HUB_SETS[name].repository]
    assert [piece.text for piece in splits.train] == [document] * 3
    assert splits.validation is not None
    assert [piece.text for piece in splits.validation] == [document]
    with pytest.raises(DataError, match=r"expected a column 'body', got .*set data\.text_field"):
        list(find_source(name, text_field="body").open(ReadReport()).train)


def test_prepare_local_imports(tmp_path: Path) -> None:
    """Local and builtin text need none of the large packages."""
    script = """
        import sys
        for name in ("datasets", "transformers", "huggingface_hub", "pyarrow", "pandas"):
            sys.modules[name] = None  # importing it fails
        from mantrans.config import DataConfig
        from mantrans.data.dataset import prepare
        from mantrans.data.tokenizer import load_tokenizer
        tokenizer = load_tokenizer("tinystories_bpe_4096")
        for config in (
            DataConfig(dataset="local", path=sys.argv[1]),
            DataConfig(dataset="builtin-stories", subset_size=20, val_subset_size=5),
        ):
            data = prepare(config, tokenizer, cache_dir=sys.argv[2])
            print(data.train.n_documents + data.validation.n_documents)
    """
    numbered(tmp_path / "a.txt", 50)
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n')
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path), str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.stdout.split() == ["51", "25"], result.stderr
