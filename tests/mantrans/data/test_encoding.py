"""Tokens are the same however many processes make them and however often they are broken off."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from mantrans import terminal
from mantrans.config import DataConfig
from mantrans.data import encoding, files, text
from mantrans.data.dataset import TokenDataset, prepare
from mantrans.data.encoding import JOURNAL, Batch, BatchWriter, SplitWriter
from mantrans.data.shards import TokenFileWriter
from mantrans.data.text import Piece, ReadReport
from mantrans.data.tokenizer import Tokenizer, load_tokenizer
from mantrans.errors import UnfinishedError
from tests.support.damage import damaged

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("tinystories_bpe_4096")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """A text of some 20 batches."""
    rng = random.Random(5)
    words = ["Once", "upon", "a", "time", "there", "was", "a", "girl", "who", "liked", "é", "漢"]
    texts = [" ".join(rng.choices(words, k=rng.randrange(1, 40))) for _ in range(400)]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(texts), encoding="utf-8")
    monkeypatch.setattr(encoding, "BATCH", 1500)
    return DataConfig(dataset="local", path=str(tmp_path / "a.txt"), validation_fraction=0.2)


def contents(data: TokenDataset) -> list[bytes]:
    """Of both files, which are all that is kept."""
    folder = data.train.path.parent
    assert sorted(os.listdir(folder)) == ["train.tokens", "validation.tokens"]
    assert not [name for name in os.listdir(folder.parent) if name.endswith(".unfinished")]
    return [stream.path.read_bytes() for stream in (data.train, data.validation)]


@pytest.fixture
def unbroken(tmp_path: Path, config: DataConfig, tokenizer: Tokenizer) -> list[bytes]:
    return contents(prepare(config, tokenizer, cache_dir=tmp_path / "unbroken", quiet=True))


def test_prepare_processes(
    tmp_path: Path, config: DataConfig, tokenizer: Tokenizer, unbroken: list[bytes]
) -> None:
    several = prepare(config, tokenizer, cache_dir=tmp_path / "new", processes=2, quiet=True)
    assert contents(several) == unbroken


def test_batch_digest() -> None:
    """Another one for all that the tokens depend on: texts, their cuts, which of them end."""
    tokens = np.array([1, 2, 3], dtype=np.uint16)
    batches = [
        [Piece("ab", True), Piece("c", True)],
        [Piece("a", True), Piece("bc", True)],
        [Piece("ab", False), Piece("c", True)],
        [Piece("ad", True), Piece("c", True)],
        [Piece("abc", True)],
        [Piece("", True, tokens)],
        [Piece("", False, tokens)],
        [Piece("", True, tokens + np.uint16(1))],
        [Piece("", True, tokens[:2])],
    ]
    assert len({Batch("train", pieces, 0).digest() for pieces in batches}) == len(batches)


def test_batch_pieces_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """However short they are, so that a batch of them takes little memory."""
    found: list[Batch] = []
    monkeypatch.setattr(encoding, "BATCH", 6400)
    split = SplitWriter("train", SimpleNamespace(submit=found.append), ReadReport())
    for _ in range(250):
        split.add(Piece("a", True))
    split.flush()
    assert [len(batch.pieces) for batch in found] == [100, 100, 50]


def left_after(
    batches: int, where: str, config: DataConfig, tokenizer: Tokenizer, cache: Path
) -> Path:
    """The unfinished folder of a process that ended while it wrote its next batch: before its
    tokens, in the middle of them, before its line of the journal, or in that line."""
    write = BatchWriter._write

    def and_end(self: BatchWriter, *arguments: Any) -> None:
        if self._written == batches and where == "tokens":
            raise KeyboardInterrupt
        write(self, *arguments)
        if self._written > batches:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(BatchWriter, "_write", and_end)
        prepare(config, tokenizer, cache_dir=cache, quiet=True)
        raise AssertionError("not ended")
    [folder] = cache.glob("*.unfinished")
    file = folder / {"half tokens": "train.tokens"}.get(where, JOURNAL)
    lines = file.read_bytes()
    if where == "half tokens":  # of both files the ends may be missing
        for name in ("train.tokens", "validation.tokens"):
            whole = (folder / name).read_bytes()
            (folder / name).write_bytes(whole[: max(4096, len(whole) - 31)])
    elif where != "tokens":
        last = lines.splitlines(keepends=True)[-1]
        cut = len(last) if where == "line" else len(last) // 2
        file.write_bytes(lines[: len(lines) - cut])
    return folder


@pytest.fixture
def tokenized(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Has a number for each batch that is tokenized from now on."""
    found: list[int] = []
    encode = encoding.encoded

    def counted(tokenizer: Tokenizer, pieces: list[Any]) -> Any:
        found.append(len(pieces))
        return encode(tokenizer, pieces)

    monkeypatch.setattr(encoding, "encoded", counted)
    return found


@pytest.mark.promise("prepared text survives kills")
@pytest.mark.parametrize("where", ["tokens", "half tokens", "line", "half line"])
@pytest.mark.parametrize("batches", [0, 1, 11])
def test_prepare_resumed(
    tmp_path: Path,
    config: DataConfig,
    tokenizer: Tokenizer,
    unbroken: list[bytes],
    tokenized: list[int],
    batches: int,
    where: str,
) -> None:
    """The same bytes, and what was finished is not done again."""
    left_after(batches, where, config, tokenizer, tmp_path / "new")
    tokenized.clear()
    data = prepare(config, tokenizer, cache_dir=tmp_path / "new", quiet=True)
    assert contents(data) == unbroken
    again = len(tokenized)
    prepare(config, tokenizer, cache_dir=tmp_path / "third", quiet=True)
    in_all = len(tokenized) - again
    if where == "half tokens":  # both ends are missing, of which one is of an earlier batch
        assert batches == 0 or in_all - batches <= again < in_all
    else:
        assert again == in_all - batches and in_all > 15


@pytest.mark.promise("prepared text survives kills")
def test_prepare_resumed_damaged(
    tmp_path: Path, config: DataConfig, tokenizer: Tokenizer, unbroken: list[bytes]
) -> None:
    """Whatever happens to what is left is noticed, and done again."""
    rng = random.Random(7)
    for number in range(12):
        cache = tmp_path / str(number)
        folder = left_after(9, "tokens", config, tokenizer, cache)
        name = rng.choice(["train.tokens", "validation.tokens", JOURNAL])
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(damaged(whole, rng) if number else whole * 2)
        assert contents(prepare(config, tokenizer, cache_dir=cache, quiet=True)) == unbroken


@pytest.mark.promise("prepared text survives kills")
def test_journal_any_bit(tmp_path: Path, config: DataConfig, tokenizer: Tokenizer) -> None:
    """A line with a flipped bit is not used, whatever it says there; the one before it is."""
    folder = left_after(3, "tokens", config, tokenizer, tmp_path / "new")
    first, second, third = (folder / JOURNAL).read_bytes().splitlines(keepends=True)
    rng = random.Random(3)
    for place in range(len(second)):
        (folder / JOURNAL).write_bytes(first + damaged(second, rng, place) + third)
        writers = {
            name: TokenFileWriter(folder / f"{name}.tokens", tokenizer.vocab_size, kept=True)
            for name in ("train", "validation")
        }
        assert [line["step"] for line in encoding._verified(folder / JOURNAL, writers)] == [1]
        for writer in writers.values():
            writer._file.close()


def goes_on(
    after: int,
    tmp_path: Path,
    config: DataConfig,
    tokenizer: Tokenizer,
    unbroken: list[bytes],
    tokenized: list[int],
) -> None:
    """The same call does what `after` batches are not, and leaves the same bytes."""
    tokenized.clear()
    assert contents(prepare(config, tokenizer, cache_dir=tmp_path / "new", quiet=True)) == unbroken
    again = len(tokenized)
    prepare(config, tokenizer, cache_dir=tmp_path / "third", quiet=True)
    assert again == len(tokenized) - again - after


@pytest.mark.promise("full disk")
@pytest.mark.parametrize("method", ["write", "flush"])
def test_prepare_disk_full(
    tmp_path: Path,
    config: DataConfig,
    tokenizer: Tokenizer,
    unbroken: list[bytes],
    tokenized: list[int],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    """What is done is kept, which is said."""
    whole, calls = getattr(TokenFileWriter, method), []

    def until_full(self: TokenFileWriter, *arguments: Any) -> Any:
        calls.append(method)
        if len(calls) > 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(TokenFileWriter, method, until_full)
        with pytest.raises(UnfinishedError) as error:
            prepare(config, tokenizer, cache_dir=tmp_path / "new", quiet=True)
    [folder] = (tmp_path / "new").glob("*.unfinished")
    assert str(error.value).startswith("tokens cannot be written to ")
    assert str(error.value).endswith(
        f": No space left on device; what is done is kept in {folder}: free the disk and run the "
        "same command again"
    )
    goes_on(9, tmp_path, config, tokenizer, unbroken, tokenized)


@pytest.mark.promise("prepared text survives kills")
def test_prepare_text_unreadable(
    tmp_path: Path,
    config: DataConfig,
    tokenizer: Tokenizer,
    unbroken: list[bytes],
    tokenized: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For a moment, as on a network's disk: what is done is kept."""
    read = text.read_txt

    def failing(*arguments: Any) -> Iterator[Piece]:
        yield from islice(read(*arguments), 300)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(text, "read_txt", failing)
        with pytest.raises(UnfinishedError, match=r"a\.txt: cannot be read: Input/output error; "):
            prepare(config, tokenizer, cache_dir=tmp_path / "new", quiet=True)
    [journal] = (tmp_path / "new").glob(f"*.unfinished/{JOURNAL}")
    done = len(journal.read_bytes().splitlines())
    assert done > 5
    goes_on(done, tmp_path, config, tokenizer, unbroken, tokenized)


def test_prepare_resumed_other_text(
    tmp_path: Path, config: DataConfig, tokenizer: Tokenizer, unbroken: list[bytes]
) -> None:
    """What is left of another text is whole, but of no use."""
    file = tmp_path / "other" / "a.txt"
    file.parent.mkdir()
    file.write_text((tmp_path / "a.txt").read_text("utf-8").lower(), "utf-8")
    other = config.model_copy(update={"path": str(file)})
    left = left_after(9, "tokens", other, tokenizer, file.parent)
    ours = left_after(0, "tokens", config, tokenizer, tmp_path / "new")
    shutil.rmtree(ours)
    left.rename(ours)
    data = prepare(config, tokenizer, cache_dir=tmp_path / "new", quiet=True)
    assert contents(data) == unbroken


STOPPED = """
    import os, signal, sys
    from mantrans.config import DataConfig
    from mantrans.data import encoding
    from mantrans.data.dataset import prepare
    from mantrans.data.tokenizer import load_tokenizer

    if __name__ == "__main__":
        encoding.BATCH = 1500
        write = encoding.BatchWriter._write

        def and_die(self, *arguments):
            write(self, *arguments)
            if self._written == 9:
                print(*self._pool._processes, flush=True)
                if sys.argv[3] == "Ctrl-C":  # as a terminal does
                    os.killpg(0, signal.SIGINT)
                else:
                    os.kill(os.getpid(), signal.SIGKILL)

        encoding.BatchWriter._write = and_die
        config = DataConfig(dataset="local", path=sys.argv[1], validation_fraction=0.2)
        tokenizer = load_tokenizer("tinystories_bpe_4096")
        prepare(config, tokenizer, cache_dir=sys.argv[2], processes=2, quiet=True)
"""


@pytest.mark.slow
@pytest.mark.promise("prepared text survives kills")
@pytest.mark.parametrize("how", ["kill -9", "Ctrl-C"])
def test_prepare_stopped(
    tmp_path: Path, config: DataConfig, tokenizer: Tokenizer, unbroken: list[bytes], how: str
) -> None:
    """The processes that tokenize end too, and say nothing; the next one goes on."""
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(STOPPED))
    command = [sys.executable, str(script), str(config.path), str(tmp_path / "new"), how]
    stopped = subprocess.run(
        command, capture_output=True, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    signaled = signal.SIGKILL if how == "kill -9" else signal.SIGINT
    assert stopped.returncode == -signaled, stopped.stderr
    assert "SpawnProcess" not in stopped.stderr, stopped.stderr
    numbers = [int(word) for word in stopped.stdout.split()]
    assert len(numbers) == 2
    wait_until(lambda: not any(map(is_running, numbers)))
    data = prepare(config, tokenizer, cache_dir=tmp_path / "new", quiet=True)
    assert contents(data) == unbroken


@pytest.mark.slow
@pytest.mark.promise("prepared text survives kills")
def test_prepare_killed_at_random(
    tmp_path: Path, tokenizer: Tokenizer, record_property: Callable[[str, Any], None]
) -> None:
    """The command, killed again and again, at moments of which many are inside a write."""
    rng = random.Random(11)
    story = (ROOT / "tests" / "golden" / "stories.txt").read_text(encoding="utf-8")
    parts = [f"{number} {story}" for number in range(150)]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(parts), encoding="utf-8")
    config = DataConfig(dataset="local", path=str(tmp_path / "a.txt"), validation_fraction=0.2)
    whole = contents(prepare(config, tokenizer, cache_dir=tmp_path / "whole", quiet=True))
    command = [sys.executable, "-m", "mantrans", "prepare", "--processes", "2"]
    for name, value in (("path", "a.txt"), ("cache_dir", "new")):
        command += ["--set", f"data.{name}={tmp_path / value}"]
    command += ["--set", "data.dataset=local", "--set", "data.validation_fraction=0.2"]
    kills = 0
    while True:
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=rng.uniform(0.5, 0.8 + 0.2 * kills))
            break
        process.kill()
        process.communicate()
        kills += 1
    assert process.returncode == 0 and kills > 3
    record_property("kills", kills)
    assert contents(prepare(config, tokenizer, cache_dir=tmp_path / "new", quiet=True)) == whole


def wait_until(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_running(number: int) -> bool:
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_prepare_process_ends(
    tmp_path: Path,
    config: DataConfig,
    tokenizer: Tokenizer,
    unbroken: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that tokenizes is killed, as the system does without memory: one line, and what was done
    is kept."""
    write = BatchWriter._write

    def and_kill(self: BatchWriter, *arguments: Any) -> None:
        write(self, *arguments)
        if self._written == 9:
            assert self._pool is not None
            for number in list(self._pool._processes):
                os.kill(number, signal.SIGKILL)

    monkeypatch.setattr(BatchWriter, "_write", and_kill)
    with pytest.raises(
        UnfinishedError, match=r"has ended, .*; what is done is kept in .*: run the same"
    ):
        prepare(config, tokenizer, cache_dir=tmp_path / "new", processes=2, quiet=True)
    monkeypatch.undo()
    [folder] = (tmp_path / "new").glob("*.unfinished")
    assert len((folder / JOURNAL).read_bytes().splitlines()) >= 9
    monkeypatch.setattr(encoding, "BATCH", 1500)
    data = prepare(config, tokenizer, cache_dir=tmp_path / "new", quiet=True)
    assert contents(data) == unbroken


@pytest.mark.parametrize("begun", [0, 12])
def test_prepare_progress(
    tmp_path: Path,
    config: DataConfig,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    begun: int,
) -> None:
    """Bytes of the file, of how many, the time left and the speed; what was done before is not
    counted as this process's speed."""
    monkeypatch.setattr(terminal, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(files, "_BUFFER", 1000)
    monkeypatch.setattr(text, "_CHUNK", 1000)
    if begun:
        left_after(begun, "tokens", config, tokenizer, tmp_path / "new")
    capsys.readouterr()
    prepare(config, tokenizer, cache_dir=tmp_path / "new")
    lines = capsys.readouterr().err.splitlines()
    assert all(re.search(r"tokenizing local-a: .*\[\d\d:\d\d<.*B/s\]", line) for line in lines)
    shares = [int(found[1]) for line in lines if (found := re.search(r" (\d+)%", line))]
    assert shares == sorted(shares) and shares[-1] == 100
    assert (shares[0] > 30) == (begun > 0) and len(shares) > 4


MEASURED = """
    import resource, sys
    from pathlib import Path
    from mantrans.config import DataConfig
    from mantrans.data.dataset import prepare
    from mantrans.data.tokenizer import load_tokenizer

    if __name__ == "__main__":
        config = DataConfig(dataset="local", path=sys.argv[1])
        tokenizer = load_tokenizer("tinystories_bpe_4096")
        prepare(config, tokenizer, cache_dir=sys.argv[2], processes=2, quiet=True)
        status = Path("/proc/self/status").read_text()
        print(status.partition("VmHWM:")[2].split()[0])
        print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="it is read there")
def test_prepare_memory(tmp_path: Path, record_property: Callable[[str, Any], None]) -> None:
    """Of this process and of those that tokenize: the same for four times as long a text."""
    script = tmp_path / "measured.py"
    script.write_text(textwrap.dedent(MEASURED))
    story = (ROOT / "tests" / "golden" / "stories.txt").read_text(encoding="utf-8")
    peaks = []  # MB, of both
    for size in (2**23, 2**25):
        whole = "<|endoftext|>".join([story] * (size // len(story)))
        (tmp_path / "a.txt").write_text(whole, encoding="utf-8")
        command = [sys.executable, str(script), str(tmp_path / "a.txt"), str(tmp_path / str(size))]
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        assert done.returncode == 0, done.stderr
        peaks.append([int(word) / 1024 for word in done.stdout.split()])
    record_property("peaks", peaks)
    for short, long in zip(*peaks, strict=True):
        assert long < short + 8, peaks  # the text is 24 MB longer
