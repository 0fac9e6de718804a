"""Token files: whole and right, or refused by name."""

from __future__ import annotations

import hashlib
import json
import random
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mantrans.data.shards import HEADER_BYTES, MAGIC, TokenFileWriter, TokenStream, token_dtype
from mantrans.errors import DataError
from tests.support.damage import damaged


def written(path: Path, tokens: Any = range(1000), vocab_size: int = 4096) -> Path:
    with TokenFileWriter(path, vocab_size, {"note": "hello"}) as writer:
        writer.write(list(tokens), n_bytes=3 * len(tokens), n_documents=2)
    return path


def with_header(path: Path, **changes: Any) -> None:
    """Changes fields of the header and signs it anew, as an attacker would."""
    raw = path.read_bytes()
    header = json.loads(raw[len(MAGIC) + 16 : HEADER_BYTES]) | changes
    text = json.dumps(header).encode().ljust(HEADER_BYTES - len(MAGIC) - 16)
    digest = hashlib.blake2b(text, digest_size=16).digest()
    path.write_bytes(MAGIC + digest + text + raw[HEADER_BYTES:])


def test_token_file_round_trip(tmp_path: Path) -> None:
    """What was written is read."""
    stream = TokenStream(written(tmp_path / "a.tokens"))
    assert stream.tokens.tolist() == list(range(1000))
    assert (len(stream), stream.n_bytes, stream.n_documents) == (1000, 3000, 2)
    assert stream.max_token == 999
    assert stream.facts == {"note": "hello"}
    assert isinstance(stream.tokens, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        stream.tokens[0] = 1


def test_token_file_dtype(tmp_path: Path) -> None:
    """The smaller type that fits is used."""
    assert token_dtype(65_536) == np.uint16
    assert token_dtype(65_537) == np.uint32
    stream = TokenStream(written(tmp_path / "a.tokens", [0, 70_000], vocab_size=70_001))
    assert stream.tokens.tolist() == [0, 70_000]
    stream = TokenStream(written(tmp_path / "b.tokens", [0, 65_535], vocab_size=65_536))
    assert stream.tokens.tolist() == [0, 65_535]


def test_token_file_checksum(tmp_path: Path) -> None:
    """The checksum tells contents apart."""
    streams = [
        TokenStream(written(tmp_path / f"{i}.tokens", tokens))
        for i, tokens in enumerate(([1, 2, 3], [1, 2, 3], [1, 2, 4]))
    ]
    assert streams[0].checksum == streams[1].checksum != streams[2].checksum


def test_token_file_empty(tmp_path: Path) -> None:
    stream = TokenStream(written(tmp_path / "a.tokens", []))
    assert len(stream) == 0
    stream.require_vocabulary(1)


@pytest.mark.promise("damaged tokens and tokenizers")
def test_token_file_flipped_byte(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tokens", range(100))
    whole = path.read_bytes()
    rng = random.Random(0)
    places = [*range(200), *rng.sample(range(200, HEADER_BYTES), 200)]
    for place in [*places, *range(HEADER_BYTES, len(whole))]:
        path.write_bytes(damaged(whole, rng, place))
        with pytest.raises(DataError, match=r"a\.tokens is damaged: .* delete the folder"):
            TokenStream(path)


@pytest.mark.promise("damaged tokens and tokenizers")
def test_token_file_wrong_length(tmp_path: Path) -> None:
    """Every truncation and every surplus is found."""
    path = written(tmp_path / "a.tokens", range(100))
    whole = path.read_bytes()
    for size in [*range(0, HEADER_BYTES, 97), *range(HEADER_BYTES, len(whole))]:
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"a\.tokens is damaged"):
            TokenStream(path)
    for surplus in (b"\0", b"\0\0", bytes(5000)):
        path.write_bytes(whole + surplus)
        with pytest.raises(DataError, match="is damaged: expected"):
            TokenStream(path)


@pytest.mark.promise("claims of a file")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"n_tokens": 2**60}, "bytes as in its header"),
        ({"n_tokens": 10**400}, "bytes as in its header"),
        ({"n_tokens": -1}, "n_tokens is not a count"),
        ({"n_tokens": True}, "n_tokens is not a count"),
        ({"n_bytes": "many"}, "n_bytes is not a count"),
        ({"n_documents": 1.5}, "n_documents is not a count"),
        ({"dtype": "object"}, "does not name the token type"),
        ({"dtype": "uint32"}, "bytes as in its header"),
        ({"max_token": 3}, "its largest token is not"),
        ({"max_token": 2**60}, "its largest token is not"),
        ({"checksum": None}, "lacks a checksum"),
        ({"checksum": "00"}, "checksum is wrong"),
        ({"facts": []}, "lacks a checksum or facts"),
    ],
)
def test_token_file_hostile_header(tmp_path: Path, changes: dict, reason: str) -> None:
    path = written(tmp_path / "a.tokens")
    with_header(path, **changes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=reason):
        TokenStream(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


@pytest.mark.promise("wrong tokenizer")
def test_token_file_token_outside_vocabulary(tmp_path: Path) -> None:
    stream = TokenStream(written(tmp_path / "a.tokens", [1, 4095]))
    stream.require_vocabulary(4096)
    with pytest.raises(DataError, match="expected tokens 0 to 4094, got 4095"):
        stream.require_vocabulary(4095)
    for wrong in (-1, 4096, 2**40):
        with (
            TokenFileWriter(tmp_path / "b.tokens", 4096) as writer,
            pytest.raises(DataError, match="expected tokens 0 to 4095, got"),
        ):
            writer.write([5, wrong], n_bytes=1, n_documents=0)


def test_token_file_unfinished(tmp_path: Path) -> None:
    """An unfinished file is never taken for a whole one."""
    path = tmp_path / "a.tokens"
    with pytest.raises(KeyboardInterrupt), TokenFileWriter(path, 4096) as writer:
        writer.write(np.arange(100_000) % 4096, n_bytes=1, n_documents=0)
        raise KeyboardInterrupt
    with pytest.raises(DataError, match="does not start like a token file"):
        TokenStream(path)


def test_token_file_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.tokens cannot be read: No such file"):
        TokenStream(tmp_path / "a.tokens")


@pytest.mark.promise("claims of a file")
@pytest.mark.parametrize("n_tokens", [11, 2**33, 2**60, 2**80, -1])
def test_token_file_adopt_claim(tmp_path: Path, n_tokens: int) -> None:
    """What is claimed of an unfinished file beyond its end is not read, nor taken over."""
    path = tmp_path / "a.tokens"
    with pytest.raises(KeyboardInterrupt), TokenFileWriter(path, 4096) as writer:
        checksum = writer.write(range(10), n_bytes=30, n_documents=1)
        raise KeyboardInterrupt
    with TokenFileWriter(path, 4096, kept=True) as writer:
        assert not writer.adopt(n_tokens, 30, 1, checksum)
        assert writer.adopt(10, 30, 1, checksum)
    assert TokenStream(path).tokens.tolist() == list(range(10))
