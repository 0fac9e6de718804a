"""Cuts a token stream into batches; a batch is a pure function of (seed, step).

A window has `length + 1` tokens: the first `length` are inputs, the last `length` are targets, so
neighboring windows share one token. An epoch has `n_windows` of them, in a new order, and no target
occurs twice in it. Epochs follow each other without a gap: a batch may hold the last windows of one
and the first of the next, so no batch is short.

An epoch's targets are fewer than the stream's, so it leaves out `slack` of the tokens 1 .. N-1 that
can be one (token 0 has none before it). Which ones depends on whether its number is even or odd, so
that **every token but the first is a target in any two successive epochs**:

    even    the windows lie side by side from a random offset: left out are the first tokens, up to
            the offset, and the last ones
    odd     the windows lie side by side from both ends: left out is the gap between two of them

Proof, with L = length, n = n_windows, s = slack = N - 1 - nL. The targets of windows that lie side
by side from a are a+1 .. a + nL. For N >= 4L, n = N // L - 1 >= 3, so s = L - 1 + N % L <= 2L - 2.
An even epoch's offset is below L, so its targets include L .. nL. An odd epoch's gap is the s
tokens after target cL, where 1 <= c <= n - 2, so these are within L+1 .. (n - 2)L + 2L - 2: all are
targets of every even epoch. For N < 4L, n = (N - 1) // L >= 1 and s < L: an even epoch begins at 0
and leaves out the last s tokens, an odd one the first s (its gap comes before all windows); these
are different ones, because nL >= s.

There is no state: a resumed run simply asks for the next step.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch

from mantrans.data.shards import TokenStream
from mantrans.errors import DataError

RULE = 2
"""How windows are laid out. Rule 1, of earlier checkpoints: every epoch like an even one, and for
N < 4L too n = N // L - 1, at least 1; up to L - 1 tokens could be targets in no epoch at all."""
_ROUNDS = 6  # of the Feistel network; 4 are enough in theory, for a perfect round function


class BatchLoader:
    """Batches of `windows_per_step` windows, or these rows of them, which one rank reads.

    `batch_size`: rows. `n_windows`: windows per epoch. `batches_per_epoch`: steps in which every
    window is seen once (rounded up). `rule`: see RULE.
    Raises DataError if the stream is shorter than `length + 1` tokens.
    """

    def __init__(
        self,
        stream: TokenStream,
        windows_per_step: int,
        length: int,
        seed: int,
        rows: Sequence[int] | None = None,
    ) -> None:
        rows = range(windows_per_step) if rows is None else rows
        self.rows = np.asarray(rows, dtype=np.int64)
        inside = (self.rows >= 0) & (self.rows < windows_per_step)
        if windows_per_step < 1 or length < 1 or not inside.all():
            raise ValueError(f"{windows_per_step} windows of {length} a step, rows {rows}")
        if len(stream) <= length:
            raise DataError(
                f"{stream.path}: expected at least {length + 1:,} tokens, which a window takes, "
                f"got {len(stream):,}; give more text or lower data.max_length"
            )
        self.stream = stream
        self.windows_per_step, self.length, self.seed = windows_per_step, length, seed
        self.batch_size = len(self.rows)
        self.follow(RULE)

    def follow(self, rule: int) -> None:
        """Lay windows out by `rule`, RULE or an earlier one, as a resumed run began with it.

        Raises ValueError for an unknown rule.
        """
        if type(rule) is not int or not 1 <= rule <= RULE:
            raise ValueError(f"batches: expected a rule from 1 to {RULE}, got {rule!r:.20}")
        n_tokens, length = len(self.stream), self.length
        # One window less than fits, to leave room for the offset.
        self.n_windows = max(1, n_tokens // length - 1)
        self._is_short = rule > 1 and n_tokens < 4 * length
        if self._is_short:
            self.n_windows = (n_tokens - 1) // length
        self.slack = n_tokens - 1 - self.n_windows * length
        self.rule = rule
        self.batches_per_epoch = -(-self.n_windows // self.windows_per_step)

    def epoch(self, step: int) -> int:
        """The epoch that the first window of the step belongs to, whoever reads it."""
        return step * self.windows_per_step // self.n_windows

    def window_starts(self, step: int) -> np.ndarray:
        """(batch_size,) int64: the first token of each row's window."""
        if step < 0:
            raise ValueError(f"step {step}")
        places = step * self.windows_per_step + self.rows
        starts = np.empty_like(places)
        epochs, windows = np.divmod(places, self.n_windows)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            order = shuffled(windows[here], self.n_windows, self.seed, int(epoch))
            offset, first_after_gap = self._layout(int(epoch))
            starts[here] = offset + order * self.length + self.slack * (order >= first_after_gap)
        return starts

    def batch(self, step: int) -> torch.Tensor:
        """(batch_size, length + 1) int64 tokens."""
        rows = np.empty((self.batch_size, self.length + 1), dtype=np.int64)
        for row, start in zip(rows, self.window_starts(step), strict=True):
            row[:] = self.stream.tokens[start : start + self.length + 1]
        return torch.from_numpy(rows)

    def _layout(self, epoch: int) -> tuple[int, int]:
        """(the first window's start, the number of the first window that a gap of `slack` tokens
        moves on): n_windows for an epoch without a gap."""
        drawn = int(_hash(np.uint64(epoch), _key(self.seed, epoch, 1)))
        if self.rule == 1 or epoch % 2 == 0:
            offset = 0 if self._is_short else drawn % min(self.slack + 1, self.length)
            return offset, self.n_windows
        return 0, 0 if self._is_short else 1 + drawn % (self.n_windows - 2)


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


@functools.lru_cache(maxsize=64)  # each step asks for the same ones
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
