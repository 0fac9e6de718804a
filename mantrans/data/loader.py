"""Cuts a token stream into batches; a batch is a pure function of (seed, step, rank).

Window w of an epoch starts at `offset + w * length` and has `length + 1` tokens: the first `length`
are inputs, the last `length` are targets, so neighboring windows share one token and no target
occurs twice in an epoch. Each epoch draws a new offset below `length` and a new order of the
windows. Epochs follow each other without a gap: a batch may hold the last windows of one and the
first of the next, so nothing is dropped and no batch is short.

There is no state: a resumed run simply asks for the next step.
"""

from __future__ import annotations

import numpy as np
import torch

from mantrans.data.shards import TokenStream
from mantrans.errors import DataError

_ROUNDS = 6  # of the Feistel network; 4 are enough in theory, for a perfect round function


class BatchLoader:
    """Batches of one rank.

    `batch_size`: windows per rank and step. `n_windows`: windows per epoch. `batches_per_epoch`:
    steps in which all ranks together see every window once (rounded up).
    Raises DataError if the stream is shorter than `length + 1` tokens.
    """

    def __init__(
        self,
        stream: TokenStream,
        batch_size: int,
        length: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1 or length < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size {batch_size}, length {length}, rank {rank} of {world_size}"
            )
        if len(stream) <= length:
            raise DataError(
                f"{stream.path}: expected at least {length + 1:,} tokens, which a window takes, "
                f"got {len(stream):,}; give more text or lower data.max_length"
            )
        self.stream = stream
        self.batch_size, self.length, self.seed = batch_size, length, seed
        self.rank, self.world_size = rank, world_size
        # One window less than fits, to leave room for the offset.
        self.n_windows = max(1, (len(stream) - length) // length)
        self.batches_per_epoch = -(-self.n_windows // (batch_size * world_size))

    def epoch(self, step: int) -> int:
        """The epoch that the first window of the step belongs to, over all ranks."""
        return step * self.batch_size * self.world_size // self.n_windows

    def window_starts(self, step: int) -> np.ndarray:
        """(batch_size,) int64: the first token of each window."""
        if step < 0:
            raise ValueError(f"step {step}")
        first = (step * self.world_size + self.rank) * self.batch_size
        places = first + np.arange(self.batch_size, dtype=np.int64)
        starts = np.empty_like(places)
        epochs, windows = np.divmod(places, self.n_windows)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            order = shuffled(windows[here], self.n_windows, self.seed, int(epoch))
            starts[here] = self._offset(int(epoch)) + order * self.length
        return starts

    def batch(self, step: int) -> torch.Tensor:
        """(batch_size, length + 1) int64 tokens."""
        rows = np.empty((self.batch_size, self.length + 1), dtype=np.int64)
        for row, start in zip(rows, self.window_starts(step), strict=True):
            row[:] = self.stream.tokens[start : start + self.length + 1]
        return torch.from_numpy(rows)

    def _offset(self, epoch: int) -> int:
        room = len(self.stream) - self.n_windows * self.length  # at least 1
        return int(_hash(np.uint64(epoch), _key(self.seed, epoch, 1)) % min(room, self.length))


def shuffled(places: np.ndarray, count: int, seed: int, epoch: int) -> np.ndarray:
    """The images of `places` under a random permutation of 0 .. count-1, fixed by (seed, epoch).

    places: int64, each in [0, count). A Feistel network over the smallest even number of bits that
    holds `count`, repeated until the result is below `count` (Black and Rogaway, "Ciphers with
    arbitrary finite domains", 2002): it needs neither memory nor a pass over the epoch.
    """
    half = np.uint64(max(1, (max(count - 1, 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    values = places.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & mask
        for turn in range(_ROUNDS):
            left, right = right, left ^ (_hash(right, _key(seed, epoch, turn + 2)) & mask)
        values[outside] = (left << half) | right
        outside = values >= count
    return values.astype(np.int64)


def _key(seed: int, epoch: int, use: int) -> np.uint64:
    """A key for each (seed, epoch, use)."""
    key = np.uint64(seed & 0xFFFF_FFFF_FFFF_FFFF)
    for part in (epoch, use):
        key = _hash(np.uint64(part), key)
    return key


def _hash(values: np.ndarray | np.uint64, key: np.uint64) -> np.ndarray | np.uint64:
    """splitmix64's finalizer (Steele, Lea and Flood, 2014) of values + key * golden ratio."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is intended
        x = np.asarray(values, dtype=np.uint64) + key * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
