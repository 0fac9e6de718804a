"""How much memory a layer asks for: numbers of elements, whatever their dtype will be."""

from __future__ import annotations

from typing import NamedTuple


class Elements(NamedTuple):
    """Elements a token: `narrow` of the model's dtype, `wide` of float32 (or float64)."""

    narrow: int
    wide: int = 0

    def __add__(self, other: tuple) -> Elements:
        return Elements(self.narrow + other[0], self.wide + other[1])

    def bytes(self, narrow: int, wide: int) -> int:
        """Bytes a token, for elements of so many bytes each."""
        return self.narrow * narrow + self.wide * wide
