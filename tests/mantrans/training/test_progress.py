"""A run's counters, as a checkpoint holds them."""

from __future__ import annotations

from typing import Any

import pytest

from mantrans.training.progress import MOST_STEPS, Progress


@pytest.mark.parametrize("name", ["step", "best_step", "skipped", "not_finite_in_a_row"])
@pytest.mark.parametrize("count", [-1, True, 1.0, MOST_STEPS + 1, 2**63, 2**70 + 1])
def test_from_saved_with_an_odd_count(name: str, count: Any) -> None:
    saved = {**Progress().saved(), name: count}
    with pytest.raises(ValueError, match="progress: expected counts from 0 to"):
        Progress.from_saved(saved)


def test_from_saved_with_the_largest_count() -> None:
    progress = Progress(step=MOST_STEPS)
    assert Progress.from_saved(progress.saved()) == progress
