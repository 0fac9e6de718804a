"""How much memory a layer needs: numbers of elements, independent of the dtype."""

from __future__ import annotations

from typing import NamedTuple


class Elements(NamedTuple):
    """Elements per token: `narrow` of the model's dtype, `wide` of float32 (or float64)."""

    narrow: int
    wide: int = 0

    def __add__(self, other: tuple) -> Elements:
        return Elements(self.narrow + other[0], self.wide + other[1])

    def bytes(self, narrow: int, wide: int) -> int:
        """Bytes per token. narrow, wide: bytes of one element of each kind."""
        return self.narrow * narrow + self.wide * wide
