"""The axes and segments of a figure's curves; figure.html draws them as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

Point = tuple[float, float | None]  # step, value; a value of None is a gap
Mark = tuple[float, float, str]  # a range of steps, and a text about it
_MOST_POINTS = 2000  # in one line: about as many as a screen has columns
_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"), (1.0, ""))
_MOST_NAMES = 16  # in a legend; hovering over a line tells its name anyway
_SHADES = 16  # page.css has the classes r0 to r16
_MANTISSAS = ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1,))  # of logarithmic ticks


@dataclass(frozen=True)
class Curve:
    """A line through its points, or with `dots` only the points.

    place: of many curves that have an order, from 0, the first, to 1; they are colored by it.
    """

    name: str
    points: Sequence[Point]
    color: int = 0  # class c0, c1, … of the style sheet
    dots: bool = False
    place: float | None = None

    @property
    def css(self) -> str:
        """The class with its color."""
        return f"c{self.color}" if self.place is None else f"r{round(_SHADES * self.place)}"

    @property
    def last(self) -> str:
        """Its last value that can be drawn, and the step."""
        found = [(step, y) for step, y in self.points if y is not None][-1:]
        return "".join(f"{y:.4g} at step {step:,.0f}" for step, y in found)

    def finite(self) -> list[float]:
        """The values that can be drawn."""
        return [y for _, y in self.points if y is not None]

    @property
    def segments(self) -> list[list[tuple[float, float]]]:
        """The segments between gaps, each thinned to what a screen can show."""
        found: list[list[tuple[float, float]]] = [[]]
        for x, y in self.points:
            if y is not None:
                found[-1].append((x, y))
            elif found[-1]:
                found.append([])
        return [thinned(segment) for segment in found if segment]


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` as percent of an axis; ticks with their labels."""

    low: float
    high: float
    ticks: Sequence[tuple[float, str]] = ()
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            return 100 * math.log(value / self.low) / math.log(self.high / self.low)
        return 100 * (value - self.low) / (self.high - self.low)

    @classmethod
    def around(cls, values: Sequence[float], most: int = 5, log: bool = False) -> Scale:
        """The axis from the round number below all values to the one above them.

        log: a logarithmic axis, if all values are positive.
        """
        low, high = min(values), max(values)
        log = log and low > 1e-100
        if high - low <= 1e-9 * max(abs(low), abs(high)):  # one value: give it room
            room = abs(low) / 10 or 1.0
            low, high = low - room, high + room
        if log and high > 3 * low:
            ends = log_ticks(low, high, most + 2)
            labels = [short(value) for value in ends]
        else:
            step = round_step(low, high, most)
            first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
            ends = [i * step for i in range(first, last + 1)]
            labels = tick_labels(ends)
        return cls(ends[0], ends[-1], list(zip(ends, labels, strict=True)), log)


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` round numbers from one at or below `low` to one at or above `high`."""
    first = math.floor(math.log10(low * (1 - 1e-9)))  # log10 rounds 999,999.9999999999 to 6
    last = math.floor(math.log10(high)) + 1
    for mantissas in _MANTISSAS:
        found = [float(f"{m}e{power}") for power in range(first, last + 1) for m in mantissas]
        below = sum(value <= low for value in found) - 1
        found = found[below : sum(value < high for value in found) + 1]
        if len(found) <= most:
            return found
    every = math.ceil((last - first) / (most - 1))
    return [float(f"1e{first + every * i}") for i in range(most)]


def round_step(low: float, high: float, most: int) -> float:
    """The smallest of 1, 2, 5 · 10ᵏ that divides [low, high] into at most `most` parts."""
    least = (high - low) / most
    power = 10.0 ** math.floor(math.log10(least))
    return next(f * power for f in (1, 2, 5, 10) if f * power >= least * (1 - 1e-9))


def ticks(low: float, high: float, most: int) -> list[float]:
    """The multiples of a round step from `low` to `high`, both included if they are round."""
    step = round_step(low, high, most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """The ticks in one notation, with enough digits to distinguish them: 0.5, 1.0, 1.5."""
    largest = max(abs(v) for v in values)
    if largest and not 1e-3 <= largest < 1e15:
        power = math.floor(math.log10(largest) + 1e-9)
        return [f"{v / 10.0**power:.3g}e{power}" if v else "0" for v in values]
    unit, suffix = next((u, s) for u, s in _UNITS if largest >= 10 * u or u == 1)
    step = values[1] - values[0] if len(values) > 1 else largest or 1.0
    digits = max(0, math.ceil(-math.log10(step / unit) - 1e-9))
    return [f"{v / unit:.{digits}f}{suffix}" if v else "0" for v in values]


def short(value: float) -> str:
    """A count with three digits: 288k, 1.71M."""
    value = float(f"{value:.3g}")
    unit, suffix = next((u, s) for u, s in _UNITS if abs(value) >= u or u == 1)
    return f"{value / unit:.3g}{suffix}"


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The lowest and the highest of every few points of a long line, which keeps spikes."""
    if len(points) <= _MOST_POINTS:
        return points
    size = math.ceil(2 * len(points) / _MOST_POINTS)
    kept = []
    for first in range(0, len(points), size):
        few = points[first : first + size]
        kept += sorted({min(few, key=lambda p: p[1]), max(few, key=lambda p: p[1])})
    return kept


@dataclass(frozen=True)
class Figure:
    """What figure.html draws: curves over steps from 0.

    from_zero: the y axis starts at 0, for quantities compared by their ratio. log: it is
    logarithmic, if all values are positive. tokens_per_step: label the x axis in tokens too.
    """

    title: str
    unit: str
    curves: Sequence[Curve]
    from_zero: bool = False
    log: bool = False
    tokens_per_step: float | None = None
    marks: Sequence[Mark] = ()
    most_ticks: int = 6

    @property
    def x(self) -> Scale:
        """The axis of steps: round ones and, as its end, the last one."""
        last = max([1.0, *(step for curve in self.curves for step, _ in curve.points)])
        steps = [step for step in ticks(0, last, self.most_ticks) if step.is_integer()]
        labels = list(zip(steps, tick_labels(steps), strict=True))
        if steps[-1] < last:
            room = 0.7 * (steps[1] - steps[0])
            labels = [(step, label) for step, label in labels if last - step >= room]
            labels.append((last, short(last)))
        return Scale(0, last, labels)

    @property
    def y(self) -> Scale | None:
        """The axis of values; None if no value is finite."""
        values = [y for curve in self.curves for y in curve.finite()]
        return Scale.around([0.0] * self.from_zero + values, log=self.log) if values else None

    @cached_property
    def legend(self) -> list[tuple[str, str, str]]:
        """(name, color's class, mark's class) of each name that is shown: of few names all, of
        many some between the first and the last. One name's line and dots have one entry."""
        drawn: dict[tuple[str, str], str] = {}
        for c in self.curves:
            if c.finite():
                drawn.setdefault((c.name, c.css), "dot" if c.dots else "line")
        entries = [(name, css, mark) for (name, css), mark in drawn.items()]
        if len(entries) > _MOST_NAMES:
            last = len(entries) - 1
            shown = {round(last * i / (_MOST_NAMES - 1)) for i in range(_MOST_NAMES)}
            entries = [entries[i] for i in sorted(shown)]
        return entries + ([("skipped steps", "", "mark")] if self.marks else [])

    def number(self, curve: Curve) -> int:
        """The place of a curve's name in the legend; -1 without one."""
        names = [(name, css) for name, css, _ in self.legend]
        return names.index((curve.name, curve.css)) if (curve.name, curve.css) in names else -1
