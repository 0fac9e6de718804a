"""llm.c's and nanoGPT's files of tokens: read as they are, refused in one line, and written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from mantrans.cli import main
from mantrans.config import DataConfig
from mantrans.data import bin_file
from mantrans.data.bin_file import read_bin, write_bin
from mantrans.data.dataset import prepare, tokenized
from mantrans.data.shards import TokenFileWriter, TokenStream
from mantrans.data.tokenizer import Tokenizer, load_tokenizer
from mantrans.errors import DataError

EOT = 0


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    found = load_tokenizer("tinystories_bpe_4096")
    assert (found.vocab_size, found.eot_id) == (4096, EOT)
    return found


def llmc(
    tokens: np.ndarray, magic: int, version: int, kind: str, count: int | None = None
) -> bytes:
    """As llm.c's write_datafile."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    return header.tobytes() + tokens.astype(kind).tobytes()


FORMS = {
    "nanogpt": lambda tokens: tokens.astype("<u2").tobytes(),
    "llmc": lambda tokens: llmc(tokens, 20240520, 1, "<u2"),
    "llmc-uint32": lambda tokens: llmc(tokens, 20240801, 7, "<u4"),
}


def some_tokens(count: int, seed: int = 0) -> np.ndarray:
    """Documents of about 50 tokens."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 4096, count)
    tokens[rng.integers(0, count, count // 50)] = EOT
    return tokens


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("last", [EOT, 7])
def test_prepare_bin(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, form: str, last: int
) -> None:
    """Every token, in its order, whatever chunk it is in; documents are told apart by their end."""
    monkeypatch.setattr(bin_file, "_CHUNK", 333)
    splits = {"train": some_tokens(2500), "validation": some_tokens(999, seed=1)}
    for name, tokens in splits.items():
        tokens[-1] = last
        (tmp_path / f"{name}.bin").write_bytes(FORMS[form](tokens))
    config = DataConfig(
        dataset="local", path=str(tmp_path / "train.bin"), val_path=str(tmp_path / "validation.bin")
    )
    data = prepare(config, tokenizer, cache_dir=tmp_path / "cache", quiet=True)
    for name, tokens in splits.items():
        stream: TokenStream = getattr(data, name)
        assert np.array_equal(stream.tokens, tokens)
        assert stream.n_documents == (tokens == EOT).sum() + (last != EOT)
        assert stream.n_bytes == tokenizer.token_bytes[tokens].sum()
    assert data.usage().startswith(f"all {data.documents:,} documents")
    with tokenized(tmp_path / "train.bin", config, tokenizer, name="--text") as stream:
        assert np.array_equal(stream.tokens, splits["train"])


def test_prepare_bin_one_document(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Without any end of text the last part is held out; no token is lost, none is added."""
    tokens = some_tokens(1000)
    tokens[tokens == EOT] = 5
    (tmp_path / "a.bin").write_bytes(FORMS["nanogpt"](tokens))
    config = DataConfig(dataset="local", path=str(tmp_path / "a.bin"), validation_fraction=0.1)
    data = prepare(config, tokenizer, cache_dir=tmp_path / "cache", quiet=True)
    assert np.array_equal(np.concatenate([data.train.tokens, data.validation.tokens]), tokens)
    assert len(data.validation) == 100 and data.usage().startswith("one document")


def test_prepare_bin_beside_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A folder may hold both; each document stays whole and ends once."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("one<|endoftext|>two")
    (tmp_path / "text" / "b.bin").write_bytes(FORMS["llmc"](np.array([9, EOT, 8, EOT])))
    (tmp_path / "v.txt").write_text("three")
    config = DataConfig(
        dataset="local", path=str(tmp_path / "text"), val_path=str(tmp_path / "v.txt")
    )
    data = prepare(config, tokenizer, cache_dir=tmp_path / "cache", quiet=True)
    texts = [*tokenizer.encode("one"), EOT, *tokenizer.encode("two"), EOT]
    assert data.train.tokens.tolist() == [*texts, 9, EOT, 8, EOT]


TEN = np.arange(1, 11)
REFUSED = {
    "odd size": (b"\1\0\2", "an even number of bytes, or llm.c's header, got 3 bytes"),
    "magic": (llmc(TEN, 20240326, 3, "<u2"), "magic number 20240520 or 20240801, got 20240326"),
    "tasks": (llmc(TEN, 20240522, 1, "<u2"), "got 20240522"),
    "version": (llmc(TEN, 20240520, 2, "<u2"), "expected version 1 in llm.c's header, got 2"),
    "version 32": (llmc(TEN, 20240801, 1, "<u4"), "expected version 7 in llm.c's header, got 1"),
    "cut": (llmc(TEN, 20240520, 1, "<u2")[:-3], "1,044 bytes for the 10 tokens of uint16"),
    "big-endian": (
        np.array([20240520, 1, 10], dtype=">i4").tobytes() + bytes(1032),
        "expected llm.c's tokens, little-endian, got big-endian",
    ),
    "longer": (llmc(TEN, 20240520, 1, "<u2", count=9), "1,042 bytes for the 9 tokens of uint16"),
    "negative": (llmc(TEN, 20240520, 1, "<u2", count=-1), "-1 tokens of uint16 in its header"),
    "header cut": (llmc(TEN, 20240520, 1, "<u2")[:100], "header of 1,024 bytes, got 100"),
    "vocabulary": (FORMS["llmc"](np.array([1, 2, 4096])), "got 4096 at token 2"),
    "vocabulary 32": (FORMS["llmc-uint32"](np.array([2**31])), "got 2147483648 at token 0"),
    "empty": (b"", "expected a document of at least one character, got none"),
}


@pytest.mark.promise("odd text")
@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED)
def test_bin_refused(tmp_path: Path, tokenizer: Tokenizer, content: bytes, message: str) -> None:
    file = tmp_path / "a.bin"
    file.write_bytes(content)
    config = DataConfig(dataset="local", path=str(file))
    with pytest.raises(DataError) as error:
        prepare(config, tokenizer, cache_dir=tmp_path / "cache", quiet=True)
    line = str(error.value)
    assert message in line and "\n" not in line and (str(file) in line or not content)


@pytest.mark.parametrize(
    ("vocab_size", "form"),
    [(4096, "nanogpt"), (4096, "llmc"), (10**5, "llmc"), (10**5, "nanogpt")],
)
def test_write_bin(
    tmp_path: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    vocab_size: int,
    form: str,
) -> None:
    """The bytes that the other trainer writes, in several files where one cannot count them."""
    monkeypatch.setattr(bin_file, "_CHUNK", 64)
    tokens = some_tokens(1000)
    with TokenFileWriter(tmp_path / "a.tokens", vocab_size) as writer:
        writer.write(tokens, 1, 1)
    stream = TokenStream(tmp_path / "a.tokens")
    [file] = write_bin(stream, tmp_path, "train", form)
    assert file.name == "train.bin"
    is_wide = form == "llmc" and vocab_size > 2**16
    assert file.read_bytes() == FORMS[form + "-uint32" * is_wide](tokens)
    assert np.array_equal(np.concatenate([part for part, _ in read_bin(file, tokenizer)]), tokens)
    monkeypatch.setattr(bin_file, "_MOST", 300)
    files = write_bin(stream, tmp_path, "train", form)
    assert [file.name for file in files] == (
        ["train.bin"] if form == "nanogpt" else [f"train_00000{i}.bin" for i in range(1, 5)]
    )
    parts = [part for file in files for part, _ in read_bin(file, tokenizer)]
    assert np.array_equal(np.concatenate(parts), tokens)


@pytest.mark.parametrize("form", ["llmc", "nanogpt"])
def test_prepare_command_writes_bin(
    tmp_path: Path,
    tokenizer: Tokenizer,
    capsys: pytest.CaptureFixture[str],
    form: str,
) -> None:
    """What the command writes is read back as the same two streams, at the first try and again."""
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(f"story number {i}" for i in range(99)))
    cache = ["--set", f"data.cache_dir={tmp_path / 'cache'}", "--set", "data.dataset=local"]
    output = tmp_path / "new" / "folder"
    command = ["prepare", *cache, "--set", f"data.path={tmp_path / 'a.txt'}", "--format", form]
    for _ in range(2):
        assert main([*command, "--output", str(output)]) == 0
        shown, *files = capsys.readouterr().out.splitlines()
        assert "all 99 documents" in shown
        assert [line.split(":")[0] for line in files] == [
            f"wrote {output / name}" for name in ("train.bin", "val.bin")
        ]
    text = DataConfig(dataset="local", path=str(tmp_path / "a.txt"))
    files = DataConfig(
        dataset="local", path=str(output / "train.bin"), val_path=str(output / "val.bin")
    )
    ours, theirs = (
        prepare(config, tokenizer, cache_dir=tmp_path / "cache", quiet=True)
        for config in (text, files)
    )
    assert ours.identity == theirs.identity and len(ours.validation)


def test_write_bin_too_large(tmp_path: Path) -> None:
    with TokenFileWriter(tmp_path / "a.tokens", 10**5) as writer:
        writer.write([70_000], 1, 1)
    with pytest.raises(DataError, match=r"--format: expected llmc, .* up to 70,000, got nanogpt"):
        write_bin(TokenStream(tmp_path / "a.tokens"), tmp_path, "train", "nanogpt")


@pytest.mark.parametrize("where", ["a file", "below a file", "full"])
def test_prepare_command_cannot_write(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    where: str,
) -> None:
    """One line that names the folder, and no half file."""
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(f"story number {i}" for i in range(99)))
    output = tmp_path / {"a file": "a.txt", "below a file": "a.txt/x", "full": "new"}[where]
    if where == "full":

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(bin_file, "write_all", full)
    settings = {"cache_dir": tmp_path / "cache", "dataset": "local", "path": tmp_path / "a.txt"}
    command = ["prepare", "--format", "llmc", "--output", str(output)]
    for name, value in settings.items():
        command += ["--set", f"data.{name}={value}"]
    assert main(command) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(
        f"error: --output: expected a folder that can be written, got {output}: "
    )
    assert not list(tmp_path.glob("new/*"))
