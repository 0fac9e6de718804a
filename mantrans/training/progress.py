"""A run's counters."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from mantrans.training.step import StepRecord

MOST_STEPS = 10**12  # that a config accepts; files of events and records count in 64 bits


@dataclass
class Progress:
    """The run's counters, saved with every checkpoint."""

    step: int = 0
    best_loss: float = math.inf
    best_step: int = 0
    skipped: int = 0  # steps refused so far
    not_finite_in_a_row: int = 0
    pending: list[StepRecord] = field(default_factory=list)  # read, but not yet logged

    @classmethod
    def from_saved(cls, saved: dict[str, Any]) -> Progress:
        """Undo `saved`. TypeError or ValueError for malformed values."""
        progress = cls(**{**saved, "pending": [StepRecord(*record) for record in saved["pending"]]})
        counts = (
            progress.step, progress.best_step, progress.skipped, progress.not_finite_in_a_row
        )  # fmt: skip
        if any(type(count) is not int or not 0 <= count <= MOST_STEPS for count in counts):
            raise ValueError(f"progress: expected counts from 0 to {MOST_STEPS}, got {counts}")
        if not all(
            isinstance(number, int | float)
            for number in [progress.best_loss, *(n for record in progress.pending for n in record)]
        ):
            raise ValueError("progress: expected numbers as losses and norms")
        return progress

    def saved(self) -> dict[str, Any]:
        """The counters as plain data."""
        return {**vars(self), "pending": [tuple(record) for record in self.pending]}
