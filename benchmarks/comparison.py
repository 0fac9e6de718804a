"""Rows side by side: which of them are one case, who of them is ours, who was fastest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from benchmarks.records import Row

# Of several of ours the first one there is stands for us: it is what a user gets on that device.
OURS = ("triton captured", "triton", "native")
# The textbook and ourselves in another mode are measured too, but nobody would pick them instead.
NO_RIVALS = (*OURS, "reference")


class Comparison(NamedTuple):
    """One case: its rows by metric and provider. `time` holds only those that were measured."""

    example: Row
    time: dict[str, Row]
    memory: dict[str, Row]
    loss_difference: dict[str, Row]
    failures: dict[str, Row]

    @property
    def ours(self) -> Row | None:
        """The time of ours."""
        return next((self.time[name] for name in OURS if name in self.time), None)

    @property
    def rivals(self) -> list[Row]:
        """The times of those that a user would pick instead, fastest first."""
        return sorted((r for n, r in self.time.items() if n not in NO_RIVALS), key=milliseconds)

    def times_faster(self, rival: Row) -> float | None:
        """How many times faster ours is than a rival; below 1 ours is the slower one."""
        return milliseconds(rival) / milliseconds(self.ours) if self.ours else None


def comparisons(rows: Iterable[Row], stage: str) -> list[Comparison]:
    """A stage's cases in the order in which they were measured."""
    cases: dict[tuple, Comparison] = {}
    for row in rows:
        if row.stage != stage:
            continue
        case = cases.setdefault(row.case, Comparison(row, {}, {}, {}, {}))
        if row.p50 is None:
            case.failures[row.provider] = row
        else:
            by_metric = {"time": case.time, "memory": case.memory}
            by_metric.get(row.metric, case.loss_difference)[row.provider] = row
    return list(cases.values())


def milliseconds(row: Row) -> float:
    """The median of a measured row."""
    assert row.p50 is not None
    return row.p50


def tokens_per_second(row: Row) -> float:
    """Of a training step: the tokens of all its micro-batches over its median time."""
    shape = row.shape
    tokens = shape["B"] * shape["T"] * shape.get("micro-batches", 1)
    return tokens / milliseconds(row) * 1e3
