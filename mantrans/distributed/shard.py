"""Which elements of the flat buffers a rank owns: the same range of pieces of every bucket.

A buffer of owned elements alone has them bucket by bucket, in the order of the whole buffer. With a
power of two of ranks the range is what `Exchange.reduce` leaves to the rank: the bits of its
number, the lowest first, say which half it keeps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mantrans.distributed.world import World
from mantrans.errors import ConfigError

PIECES = 64  # of a bucket: the most ranks that can own a part of it


class Part(NamedTuple):
    """Owned elements that lie side by side: of one bucket, or of blocks that are owned whole."""

    kind: str  # "tables", "blocks" or "vectors"
    buckets: slice  # their numbers
    where: slice  # in a buffer of all elements
    kept: slice  # in a buffer of the owned elements
    pieces: int


class Shard:
    """What the rank `world.rank` owns of buckets, each a range of PIECES equal pieces.

    buckets: their ranges in a buffer of all elements, in ascending order; some may be left out.
    places: their ranges in a buffer of these buckets alone, all ranks' elements.
    """

    def __init__(self, buckets: dict[str, slice], world: World) -> None:
        self.world, self.buckets = world, buckets
        self.pieces = owned_pieces(world.rank, world.size)
        self.parts: list[Part] = []
        self.places: dict[str, slice] = {}
        self.elements = end = 0
        for name, bucket in buckets.items():
            self.places[name] = slice(end, end + bucket.stop - bucket.start)
            end = self.places[name].stop
        for number, (name, bucket) in enumerate(buckets.items()):
            where = owned_range(bucket, self.pieces)
            end = self.elements + where.stop - where.start
            n = self.pieces.stop - self.pieces.start
            kept, numbers = slice(self.elements, end), slice(number, number + 1)
            self.parts.append(Part(name.partition(".")[0], numbers, where, kept, n))
            self.elements = end
        self.by_bucket = dict(zip(buckets, self.parts, strict=True))
        self.parts = joined(self.parts)

    def store(self, owned: Tensor, offset: int, values: Tensor) -> None:
        """Copy those of `values` (n,) to `owned`, a buffer of owned elements, that are the rank's.

        offset: of the first value in a buffer of all elements.
        """
        for part in self.parts:
            start = max(part.where.start, offset)
            stop = min(part.where.stop, offset + len(values))
            if start < stop:
                first = part.kept.start + start - part.where.start
                owned[first : first + stop - start].copy_(values[start - offset : stop - offset])

    def whole(self, owned: Tensor) -> Tensor | None:
        """All elements of the buckets (see `places`) on the CPU of rank 0, None on the others; each
        rank gives its own."""
        own = owned.to("cpu", copy=False)
        end = max(place.stop for place in self.places.values())
        whole = torch.zeros(end, dtype=owned.dtype) if self.world.is_first else None
        for name, place in self.places.items():
            mine = own[self.by_bucket[name].kept]
            for rank in range(self.world.size):
                theirs = owned_range(place, owned_pieces(rank, self.world.size))
                if whole is not None and rank == 0:
                    whole[theirs] = mine
                elif whole is not None:
                    self.world.receive(whole[theirs], rank)
                elif rank == self.world.rank:
                    self.world.send(mine, 0)
        return whole


def joined(parts: list[Part]) -> list[Part]:
    """Blocks whose owned elements lie side by side in both buffers are one part."""
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else part
        size = last.buckets.stop - last.buckets.start
        if (
            part is not last
            and part.kind == last.kind
            and (part.where.start, part.kept.start) == (last.where.stop, last.kept.stop)
            and part.pieces * size == last.pieces
        ):
            joined[-1] = Part(
                part.kind,
                slice(last.buckets.start, part.buckets.stop),
                slice(last.where.start, part.where.stop),
                slice(last.kept.start, part.kept.stop),
                last.pieces + part.pieces,
            )
        else:
            joined.append(part)
    return joined


def owned_pieces(rank: int, size: int) -> slice:
    """The numbers of the pieces that a rank of `size` owns. ConfigError for too many ranks."""
    if size > PIECES:
        raise ConfigError(
            f"training.shard: expected none with more than {PIECES} processes, got {size} processes"
        )
    if size & (size - 1):
        return slice(PIECES * rank // size, PIECES * (rank + 1) // size)
    place = 0  # the bits of `rank` in reverse
    for bit in powers_of_two(size):
        place = 2 * place + (rank // bit & 1)
    return slice(PIECES * place // size, PIECES * (place + 1) // size)


def owned_range(bucket: slice, pieces: slice) -> slice:
    """The elements of these pieces of a bucket."""
    piece = (bucket.stop - bucket.start) // PIECES
    return slice(bucket.start + pieces.start * piece, bucket.start + pieces.stop * piece)


def powers_of_two(size: int) -> list[int]:
    """1, 2, 4, … below `size`."""
    return [1 << level for level in range((size - 1).bit_length())]
