"""Stop texts: in one token, over several, inside characters; what is held back; every door."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mantrans import CustomTransformerWrapper
from mantrans.data.tokenizer import load_tokenizer
from mantrans.models import generation
from mantrans.models.stop_texts import Reader, before_stop
from tests.support.runs import GOLDEN

BYTES = load_tokenizer(GOLDEN / "tokenizer")  # a token is a byte
WORDS = load_tokenizer("tinystories_bpe_4096")


def pieces_of(ids: list[int], stop: list[str], tokenizer: Any = BYTES) -> list[str]:
    """What is read of these tokens, up to a stop text."""
    reader, pieces = Reader(tokenizer, stop), []
    for token in ids:
        pieces.append(reader.read(token))
        if reader.ended:
            break
    return [*pieces, reader.rest()]


@given(st.lists(st.integers(0, 255), max_size=40))
def test_reader_any_bytes(ids: list[int]) -> None:
    """Pieces of any bytes add up to their text."""
    assert "".join(pieces_of(ids, [])) == BYTES.decode(ids)


@given(st.text(max_size=20))
def test_reader_characters(text: str) -> None:
    """The tokens are single bytes: a piece is one character, or empty."""
    whole = text.replace("\N{REPLACEMENT CHARACTER}", "")
    assert [piece for piece in pieces_of(BYTES.encode(whole), []) if piece] == list(whole)


@given(st.text("abé", max_size=30), st.lists(st.text("abé", min_size=1, max_size=4), max_size=3))
def test_reader_stop(text: str, stop: list[str]) -> None:
    """The text before the stop that is complete first, and nothing that later becomes a stop."""
    pieces = pieces_of(BYTES.encode(text), stop)
    ends = [i for i in range(len(text) + 1) if any(text[:i].endswith(s) for s in stop)]
    expected = text
    if ends:
        begun = text[: ends[0]]
        expected = min((begun.removesuffix(s) for s in stop if begun.endswith(s)), key=len)
    assert "".join(pieces) == expected


def test_reader_holds_back() -> None:
    """Only what may still become a stop text, and only as long as it may."""
    ids = BYTES.encode("x--y---z")
    assert pieces_of(ids, ["---"]) == ["x", "", "", "--y", "", "", "", ""]
    assert pieces_of(BYTES.encode("ab-"), ["---", "-="]) == ["a", "b", "", "-"]


@pytest.mark.parametrize("stop", [" the", "the end", "e\n\nT", "\n\nThe"])
def test_reader_stop_over_tokens(stop: str) -> None:
    """Also where it begins and ends inside tokens of several characters."""
    text = "Once upon a time was the end.\n\nThe other"
    ids = WORDS.encode(text)
    assert "".join(pieces_of(ids, [stop], WORDS)) == text.partition(stop)[0]


@given(st.text("ab \né漢", max_size=30), st.text("ab \né漢", min_size=1, max_size=3))
def test_before_stop(text: str, stop: str) -> None:
    """The text before it exactly; tokens that end before it stay as they are."""
    for tokenizer in (BYTES, WORDS):
        ids = tokenizer.encode(text)
        kept = before_stop(ids, tokenizer, [stop])
        assert tokenizer.decode(kept) == text.partition(stop)[0]
    if stop not in text:
        assert kept == ids
    if text.isascii():
        same = before_stop(BYTES.encode(text), BYTES, [stop])
        assert same == BYTES.encode(text)[: len(same)]


def saying(monkeypatch: pytest.MonkeyPatch, *texts: str) -> CustomTransformerWrapper:
    """A model whose rows say these texts, whatever they are asked."""
    spoken = [BYTES.encode(text) for text in texts]

    class Said:
        def __init__(self, model: object, sequences: list[list[int]], *_: object) -> None:
            self.sequences, self.first = sequences, [len(s) for s in sequences]

        def next_logits(self) -> torch.Tensor:
            logits = torch.zeros(len(spoken), BYTES.vocab_size)
            for row, (s, n, said) in enumerate(
                zip(self.sequences, self.first, spoken, strict=True)
            ):
                logits[row, said[(len(s) - n) % len(said)]] = 1.0
            return logits

    monkeypatch.setattr(generation, "Decoder", Said)
    return CustomTransformerWrapper(
        vocab_size=BYTES.vocab_size, d_model=8, n_blocks=1, n_heads=1, max_seq_len=64, device="cpu",
        dtype=torch.float32,
    )  # fmt: skip


def test_generate_stop(monkeypatch) -> None:
    """Each row ends before its own stop text; the prompt's text does not count."""
    model = saying(monkeypatch, "one STOP two", "never the word", "é.STOP")
    prompts = [BYTES.encode("a STOP"), BYTES.encode("b"), BYTES.encode("ccc")]
    options: dict[str, Any] = {"temperature": 0, "stop": ["STOP", "ver"], "tokenizer": BYTES}
    rows = model.generate(prompts, max_length=40, **options)
    assert [BYTES.decode(row.tolist()) for row in rows] == ["a STOPone ", "bne", "cccé."]
    table = model.generate(torch.tensor([[1], [2], [3]]), max_length=40, **options)
    assert table.shape == (3, 5) and table[1, 3:].tolist() == [BYTES.eot_id] * 2
    steps: Iterator[list[int | None]] = model.stream(prompts, max_length=40, **options)
    by_row = zip(*steps, strict=True)
    said = [BYTES.decode([t for t in row if t is not None]) for row in by_row]
    assert said == ["one STOP", "never", "é.STOP"]


def test_generate_stop_and_end(monkeypatch) -> None:
    """The end of text comes first, and stays; a stop text that is cut off by max_length stays."""
    model = saying(monkeypatch, "ab", "xxSTO")
    end = BYTES.encode("b")[0]
    options: dict[str, Any] = {"temperature": 0, "tokenizer": BYTES, "eos_token_id": end}
    rows = model.generate([[1], [1]], max_length=6, stop=["STOP", "ab"], **options)
    assert BYTES.decode(rows[0].tolist()[1:]) == "ab" and len(rows[1]) == 6
    assert BYTES.decode(rows[1].tolist()[1:]) == "xxSTO"
