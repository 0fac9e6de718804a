"""What happens to files: a bit that is not the one that was written."""

from __future__ import annotations

import random


def damaged(whole: bytes, rng: random.Random, place: int | None = None) -> bytes:
    """`whole` with one bit flipped, of the byte at `place` or of any."""
    broken = bytearray(whole)
    broken[rng.randrange(len(whole)) if place is None else place] ^= 1 << rng.randrange(8)
    return bytes(broken)
