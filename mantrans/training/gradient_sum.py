"""The sum of a step's gradients: over micro-batches, by a fixed binary tree, and over ranks.

    sum of n = sum of the first n // 2 + sum of the others

Each micro-batch's gradient is computed in the buffer of a level of the tree, so that it depends on
nothing but the micro-batch. A rank's micro-batches are a subtree, and `Exchange` goes on where it
ends: with a power of two of ranks, which divides the number of micro-batches, the sums are the same
ones, bit for bit, at every number of ranks.

In the last micro-batch the tree's last additions and the exchange follow bucket by bucket, as soon
as the backward has completed a bucket. On a GPU with several ranks they run on a stream of their
own while the backward goes on (not run yet: no machine with two GPUs was there).

With shard `gradients` every micro-batch is exchanged, and a rank keeps the sums of what it owns.
Its micro-batches are then every W-th, so that the exchange forms the lowest levels of the tree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from mantrans.distributed.exchange import Exchange
from mantrans.distributed.world import World
from mantrans.models.transformer import CustomTransformer
from mantrans.training.batches import MicroBatch


def tree_depth(micro_batches: int) -> int:
    """How many buffers beside the gradients a tree over so many micro-batches takes."""
    return (micro_batches - 1).bit_length()


class GradientSum:
    """Computes the sum that `Optimizer.step` reads, and the loss.

    micro_batches: of this rank. method: "tree", or "running", which adds in place, micro-batch by
        micro-batch, and takes no memory for the tree's levels.
    levels: the tree's buffers, each of the elements whose sums the rank keeps: its own, after the
        gradients themselves, `tree_depth` in number. exchange.received: half the largest bucket.
    own_loss: of the rank's last micro-batches, 0-d float64; 0 with one rank.
    """

    def __init__(
        self, model: CustomTransformer, micro_batches: int, world: World, method: str = "tree"
    ) -> None:
        p = model.parameters
        self.model, self.parameters = model, p
        self.micro_batches, self.world, self.method = micro_batches, world, method
        self.each_is_exchanged = p.divided == "gradients"
        depth = tree_depth(micro_batches) if method == "tree" else 0
        self.levels = [p.owned_gradients]
        self.levels += [torch.zeros_like(p.owned_gradients) for _ in range(depth)]
        largest = max(bucket.stop - bucket.start for bucket in p.buckets.values())
        self.exchange = Exchange(world, largest, p.gradients)
        self.own_loss = p.gradients.new_zeros((), dtype=torch.float64)
        self.side: torch.cuda.Stream | None = None
        if world.size > 1 and p.gradients.is_cuda:
            self.side = torch.cuda.Stream(p.gradients.device)

    def run(self, parts: Iterator[MicroBatch]) -> Tensor:
        """Sum the gradients of all ranks' micro-batches; returns the sum of losses, 0-d float64."""
        if self.world.size > 1:
            self.own_loss.zero_()
        try:
            if self.method == "tree":
                loss = self._tree(parts, self.micro_batches, 0, True)
            else:
                loss = self._in_place(parts)
        finally:
            if not self.each_is_exchanged:
                self.parameters.write_gradients_to(self.levels[0])
        return loss if self.each_is_exchanged else self.world.sum(loss)

    def gather_weights(self) -> None:
        """Give every rank the weights that the others have updated."""
        p = self.parameters
        if p.divided != "none":
            for where in p.buckets.values():
                self.exchange.gather(p.weights[where])

    def _tree(self, parts: Iterator[MicroBatch], n: int, level: int, last: bool) -> Tensor:
        """Sum n micro-batches into the buffer of a level. last: the step's last is among them."""
        if n == 1:
            return self._one(next(parts), level, last)
        left = self._tree(parts, n // 2, level, False)
        right = self._tree(parts, n - n // 2, level + 1, last)
        if not last:  # else it was done bucket by bucket
            self.levels[level] += self.levels[level + 1]
        return left + right

    def _in_place(self, parts: Iterator[MicroBatch]) -> Tensor:
        loss = self.levels[0].new_zeros((), dtype=torch.float64)
        for i in range(self.micro_batches):
            last = i == self.micro_batches - 1
            loss = loss + self._one(next(parts), 0, last, accumulate=i > 0)
        return loss

    def _one(self, part: MicroBatch, level: int, last: bool, accumulate: bool = False) -> Tensor:
        """One micro-batch, into the buffer of a level."""
        if self.each_is_exchanged:
            loss = self._backward(part, self._owned(level, last, accumulate), False)
            return self.world.sum(loss)
        self.parameters.write_gradients_to(self.levels[level])
        finished = self._whole(level) if last else lambda bucket: None
        return self._backward(part, finished, accumulate)

    def _backward(
        self, part: MicroBatch, finished: Callable[[str], object], accumulate: bool
    ) -> Tensor:
        loss = self.model.forward_backward(*part, accumulate=accumulate, finished=finished)
        if self.side is not None:
            torch.cuda.current_stream().wait_stream(self.side)
        if self.world.size > 1:
            self.own_loss += loss
        return loss.double()

    def _whole(self, level: int) -> Callable[[str], None]:
        """What follows when a bucket is complete, where ranks have all gradients."""
        p = self.parameters

        def finished(bucket: str) -> None:
            where = p.buckets[bucket]
            with self._aside():
                self._add_up(level, where)
                gradients = self.levels[0][where]
                if p.divided == "none":
                    self.exchange.all_reduce(gradients)
                else:
                    self.exchange.reduce(gradients)

        return finished

    def _owned(self, level: int, last: bool, accumulate: bool) -> Callable[[str], None]:
        """The same where a rank keeps the gradients of what it owns."""
        p = self.parameters
        exchanged: list[torch.cuda.Event] = []

        def finished(bucket: str) -> None:
            part, place = p.shard.by_bucket[bucket], p.bucket_gradients(bucket)
            first = part.where.start - p.buckets[bucket].start
            with self._aside():
                self.exchange.reduce(place)
                mine = place[first : first + part.where.stop - part.where.start]
                kept = self.levels[level][part.kept]
                kept.add_(mine) if accumulate else kept.copy_(mine)
                if last:
                    self._add_up(level, part.kept)
            if self.side is not None:
                exchanged.append(self.side.record_event())
                if len(exchanged) > 1:  # the next block writes where the one before this was
                    torch.cuda.current_stream().wait_event(exchanged[-2])

        return finished

    def _add_up(self, level: int, where: slice) -> None:
        """The additions at the tree's right edge, the deepest first."""
        for i in range(level, 0, -1):
            self.levels[i - 1][where] += self.levels[i][where]

    def _aside(self) -> AbstractContextManager[object]:
        """On the exchange's stream, after what the backward has launched."""
        if self.side is None:
            return nullcontext()
        self.side.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self.side)
