"""The prediction of docs/scaling.md: it fits one GPU's measured steps, and the page has it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from tools.scaling_timeline import (
    FIGURE,
    LARGE,
    LATENCY,
    SHARDS,
    SMALL,
    Link,
    Model,
    end,
    picture,
    sent,
    table,
    timeline,
)

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"


@pytest.mark.parametrize(
    ("model", "micro_batches", "measured"),
    [(SMALL, 1, 31.9), (SMALL, 8, 245.0), (LARGE, 1, 8192 / 45.6), (LARGE, 4, 32768 / 49.3)],
)
def test_step_one_gpu(model: Model, micro_batches: int, measured: float) -> None:
    assert model.step(micro_batches) == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_timeline_bars(shard: str, micro_batches: int) -> None:
    """A lane does one thing at a time, and the slower the link, the longer the step."""
    steps = []
    for speed in (1e15, 370e9, 50e9, 1e9):
        bars = timeline(SMALL, shard, Link("", speed), micro_batches)
        steps.append(end(bars))
        for lane in ("computes", "sends"):
            own = [bar for bar in bars if bar.lane == lane]
            assert all(a.stop <= b.start + 1e-9 for a, b in pairwise(own))
    assert steps == sorted(steps) and steps[-1] > 1.5 * steps[0]


def test_timeline_slow_link() -> None:
    """Where sending takes longer than all else, it is all that follows the first block."""
    link = Link("", 1e8)
    seconds = sent(SMALL, "none") / 1e8
    begins = SMALL.forward + SMALL.block_backward
    latencies = (SMALL.blocks + 1) * 6 * LATENCY
    expected = begins + 1e3 * seconds + SMALL.update + latencies
    assert end(timeline(SMALL, "none", link)) == pytest.approx(expected, rel=1e-3)


def test_scaling_page() -> None:
    assert table() in PAGE.read_text(encoding="utf-8")
    assert FIGURE.read_text(encoding="utf-8") == picture()
