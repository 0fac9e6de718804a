"""Sums a bucket of gradients over the ranks, and gives the ranks what each of them owns.

With a power of two of ranks by vector halving: at level j = 0, 1, … a rank and the rank ^ 2ʲ have
the same range; one keeps its lower half, the other its upper, and each adds what the other sends.
So element by element the sums form a binary tree over the ranks, whose lower levels are those of
the lower bits, with the same bits as one process that adds its micro-batches in that order. A rank
sends (1 - 1/W) of a bucket, as in a ring. (Rabenseifner, "Optimization of collective reduction
operations", 2004: reduce-scatter by recursive halving, all-gather by recursive doubling.)

With any other number of ranks: all_reduce, in PyTorch's order.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from mantrans.distributed.shard import owned_pieces, owned_range, powers_of_two
from mantrans.distributed.world import World


class Exchange:
    """The ranks' exchange of buckets, each called by every rank in the same order.

    largest: elements of the largest bucket, of which `received` takes half; like: a tensor of the
    gradients' dtype and device.
    """

    def __init__(self, world: World, largest: int, like: Tensor) -> None:
        self.world = world
        halves = world.size > 1 and world.is_power_of_two
        self.received = like.new_empty(largest // 2 if halves else 0)

    def reduce(self, bucket: Tensor) -> None:
        """Sum a bucket over the ranks in place. A rank has the sum of what it owns; the rest of the
        bucket means nothing then."""
        if not self.world.is_power_of_two:
            self.world.all_reduce(bucket)
            return
        for kept, given, partner in self._halves(bucket):
            received = self.received[: len(kept)]
            self.world.swap(given, received, partner)
            kept += received

    def all_reduce(self, bucket: Tensor) -> None:
        """Sum a bucket over the ranks in place; every rank has all of the sum."""
        self.reduce(bucket)
        if self.world.is_power_of_two:
            self.gather(bucket)

    def gather(self, bucket: Tensor) -> None:
        """Fill a bucket with what each rank owns of it."""
        if self.world.is_power_of_two:
            for kept, missing, partner in reversed(list(self._halves(bucket))):
                self.world.swap(kept, missing, partner)
            return
        for rank in range(self.world.size):
            pieces = owned_pieces(rank, self.world.size)
            self.world.broadcast(bucket[owned_range(slice(0, len(bucket)), pieces)], rank)

    def _halves(self, bucket: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
        """(the half that stays with the rank, its partner's, the partner) of each level."""
        for bit in powers_of_two(self.world.size):
            lower, upper = bucket.chunk(2)
            upper_is_mine = bool(self.world.rank & bit)
            bucket, other = (upper, lower) if upper_is_mine else (lower, upper)
            yield bucket, other, self.world.rank ^ bit
