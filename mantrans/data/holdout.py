"""Which part of a text is held out: the same for training and for the tokenizer's commands.

Of many documents some are, chosen by their number. Where that leaves one side without a document,
as with a text that is one, it is the last part of the text: by tokens in training (`dataset`), by
characters here, where there may be no tokenizer yet.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator

from mantrans.data.text import Piece


def held_out(index: int, fraction: float) -> bool:
    """Whether document number `index` is held out for validation, in a set without that split.

    The answer is a hash of the number: it depends on neither the seed nor the set's size.
    """
    digest = hashlib.blake2b(index.to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def part_of(
    read: Callable[[], Iterable[Piece]],
    fraction: float,
    held: bool,
    say: Callable[[str], None] = lambda note: None,
) -> Iterator[Piece]:
    """The documents that `fraction` holds out, or the others.

    If these would be none, the last or first part of the text, by characters; `say` is called with
    a note on that. read: starts reading; called twice if fraction is not 0.
    """
    length = _length_of_one_side(read(), fraction) if fraction else None
    if length is not None:
        say(
            f"one side would have no document: the last {fraction:.3g} of the text is held out, "
            "by characters"
        )
        yield from _part_of_text(read(), length - max(1, round(length * fraction)), held)
        return
    index = 0
    for piece in read():
        if held_out(index, fraction) == held:
            yield piece
        index += piece.is_last


def _length_of_one_side(pieces: Iterable[Piece], fraction: float) -> int | None:
    """The text's characters if all its documents are held out, or none is; else None."""
    index, length, sides = 0, 0, set()
    for piece in pieces:
        sides.add(held_out(index, fraction))
        if len(sides) > 1:
            return None
        length += len(piece.text)
        index += piece.is_last
    return length


def _part_of_text(pieces: Iterable[Piece], cut: int, held: bool) -> Iterator[Piece]:
    """What comes after the first `cut` characters, or before."""
    for text, ends, _ in pieces:
        part = text[max(cut, 0) :] if held else text[: max(cut, 0)]
        if part:
            yield Piece(part, ends and (held or len(text) <= cut))
        cut -= len(text)
