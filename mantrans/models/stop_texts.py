"""Reads new tokens as text, up to the first of some stop texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what bytes that are no character decode to


class Codec(Protocol):
    """The part of `mantrans.data.tokenizer.Tokenizer` that is needed here."""

    eot_id: int
    vocab_size: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class Reader:
    """The text of one row's new tokens, in pieces that no later token changes.

    The bytes of an incomplete character wait for the token that completes it; text that may become
    a stop text waits until it does or cannot. `ended`: a stop text has come.
    """

    def __init__(self, tokenizer: Codec, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.ended = False
        self._tokens: list[int] = []  # that end in an incomplete character
        self._held = ""  # the text before them that may begin a stop text

    def read(self, token: int) -> str:
        """The text that is certain with one more token, perhaps none; not called once `ended`."""
        self._tokens.append(token)
        text = self._held + self.tokenizer.decode(self._tokens)
        complete = text.rstrip(INCOMPLETE)
        end = _first(complete, self.stop)
        if end is not None:
            self.ended = True
            return complete[:end]
        if complete != text:
            return ""
        certain = len(text) - _beginning(text, self.stop)
        self._held, self._tokens = text[certain:], []
        return text[:certain]

    def rest(self) -> str:
        """What waits when no token follows."""
        text = "" if self.ended else self._held + self.tokenizer.decode(self._tokens)
        return text[: _first(text, self.stop)]


def before_stop(tokens: list[int], tokenizer: Codec, stop: Sequence[str]) -> list[int]:
    """Tokens whose text is that of `tokens` before the first stop text.

    They are the same ones, except that text which shares a token with the stop is encoded anew.
    """
    text = tokenizer.decode(tokens)
    end = _first(text, stop)
    if end is None:
        return tokens
    kept = list(tokens)
    while not text[:end].startswith(tokenizer.decode(kept)):
        kept.pop()
    return kept + tokenizer.encode(text[len(tokenizer.decode(kept)) : end])


def _first(text: str, stop: Sequence[str]) -> int | None:
    """Where the first stop text begins in `text`; None if there is none."""
    return min((i for s in stop if (i := text.find(s)) >= 0), default=None)


def _beginning(text: str, stop: Sequence[str]) -> int:
    """The length of the longest end of `text` with which a stop text begins."""
    lengths = (n for s in stop for n in range(1, len(s)) if text.endswith(s[:n]))
    return max(lengths, default=0)
