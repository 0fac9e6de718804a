"""Curves as inline SVG that stay sharp and legible at any width, on a screen and on paper.

The plot is as wide as its place: text, ticks and dots are placed in percent, and only lines live in
a nested viewBox of 100 × 100 that is stretched over it, with strokes that do not stretch. Colours
and sizes are the style sheet's: see `mantrans.report`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float | None]  # step, value; a value of None is a gap
Mark = tuple[float, float, str]  # of what happened after one step and until another, in words
_MOST_POINTS = 2000  # in one line: more than a screen has columns
_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"), (1.0, ""))


@dataclass(frozen=True)
class Curve:
    """A line through its points, or with `dots` the points alone."""

    name: str
    points: Sequence[Point]
    color: int = 0  # class c0, c1, … of the style sheet
    dots: bool = False

    def finite(self) -> list[float]:
        """The values that can be drawn."""
        return [y for _, y in self.points if y is not None]


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` as percent of an axis."""

    low: float
    high: float

    def __call__(self, value: float) -> float:
        return 100 * (value - self.low) / (self.high - self.low)

    @classmethod
    def around(cls, values: Iterable[float], most: int = 5) -> Scale:
        """The axis from the round number below all values to the one above them."""
        values = list(values)
        low, high = min(values), max(values)
        if high - low <= 1e-9 * max(abs(low), abs(high)):  # one value: give it room
            room = abs(low) / 10 or 1.0
            low, high = low - room, high + room
        step = round_step(low, high, most)
        return cls(math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step)


def round_step(low: float, high: float, most: int) -> float:
    """The smallest of 1, 2, 5 · 10ᵏ that divides [low, high] into at most `most` parts."""
    least = (high - low) / most
    power = 10.0 ** math.floor(math.log10(least))
    return next(f * power for f in (1, 2, 5, 10) if f * power >= least * (1 - 1e-9))


def ticks(low: float, high: float, most: int) -> list[float]:
    """The multiples of a round step from `low` to `high`, both included where they are round."""
    step = round_step(low, high, most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """Neighbouring ticks in one notation, with the digits that tell them apart: 0.5, 1.0, 1.5."""
    largest = max(abs(v) for v in values)
    if largest and not 1e-3 <= largest < 1e15:
        power = math.floor(math.log10(largest) + 1e-9)
        return [f"{v / 10.0**power:.3g}e{power}" if v else "0" for v in values]
    unit, suffix = next((u, s) for u, s in _UNITS if largest >= 10 * u or u == 1)
    step = values[1] - values[0] if len(values) > 1 else largest or 1.0
    digits = max(0, math.ceil(-math.log10(step / unit) - 1e-9))
    return [f"{v / unit:.{digits}f}{suffix}" if v else "0" for v in values]


def short(value: float) -> str:
    """Three digits of a count: 288k, 1.71M."""
    value = float(f"{value:.3g}")
    unit, suffix = next((u, s) for u, s in _UNITS if abs(value) >= u or u == 1)
    return f"{value / unit:.3g}{suffix}"


def segments(points: Sequence[Point]) -> list[list[tuple[float, float]]]:
    """The stretches between gaps, each thinned to what a screen can show."""
    found: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is not None:
            found[-1].append((x, y))
        elif found[-1]:
            found.append([])
    return [thinned(segment) for segment in found if segment]


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The lowest and the highest of every few points of a long line: no spike is lost."""
    if len(points) <= _MOST_POINTS:
        return points
    size = math.ceil(2 * len(points) / _MOST_POINTS)
    kept = []
    for first in range(0, len(points), size):
        few = points[first : first + size]
        kept += sorted({min(few, key=lambda p: p[1]), max(few, key=lambda p: p[1])})
    return kept


def figure(
    title: str,
    unit: str,
    curves: Sequence[Curve],
    *,
    from_zero: bool = False,
    tokens_per_step: float | None = None,
    marks: Sequence[Mark] = (),
    most_ticks: int = 6,
) -> str:
    """A <figure> of curves over steps from 0; "" where no curve has a finite value.

    from_zero: the y axis begins at 0, for quantities of which the ratio matters. tokens_per_step:
    label the x axis in tokens too. The legend is left out where there is one curve and no mark.
    """
    values = [y for curve in curves for y in curve.finite()]
    if not values:
        return ""
    x = Scale(0, max([1.0, *(step for curve in curves for step, _ in curve.points)]))
    y = Scale.around([0.0, *values] if from_zero else values)
    drawn = _axes(x, y, tokens_per_step, most_ticks)
    drawn += [_line(c, x, y) for c in curves if not c.dots]
    drawn += [_dots(c, x, y) for c in curves]
    drawn += [_mark(mark, x) for mark in marks]
    keys: dict[tuple[str, int], str] = {}  # one for the line and the dots of one name
    for c in curves:
        if c.finite():
            keys.setdefault((c.name, c.color), f"c{c.color} {'dot' if c.dots else 'line'}")
    if marks:
        keys["skipped steps", -1] = "mark"
    legend = "".join(
        f'<li><i class="{key}"></i>{escape(name)}</li>' for (name, _), key in keys.items()
    )
    return (
        f"<figure><figcaption>{escape(title)} <small>{escape(unit)}</small></figcaption>"
        + (f'<ul class="legend">{legend}</ul>' if len(keys) > 1 else "")
        + f'<svg class="plot" role="img" aria-label="{escape(title)} over steps">'
        + "".join(drawn)
        + "</svg></figure>"
    )


def _axes(x: Scale, y: Scale, tokens_per_step: float | None, most: int) -> list[str]:
    """Grid lines with their values, and one or two rows of numbers below."""
    heights, steps = ticks(y.low, y.high, 5), ticks(x.low, x.high, most)
    drawn = []
    for value, label in zip(heights, tick_labels(heights), strict=True):
        at = f"{100 - y(value):.3f}%"
        drawn.append(f'<line class="grid" x2="100%" y1="{at}" y2="{at}"/>')
        drawn.append(f'<text class="left" x="-8" y="{at}" dy=".32em">{label}</text>')
    rows = [("step", tick_labels(steps))]
    if tokens_per_step is not None:
        rows.append(("tokens", [short(step * tokens_per_step) for step in steps]))
    for row, (name, labels) in enumerate(rows):
        dy = f'dy="{1.7 + 1.35 * row:.2f}em"'
        drawn.append(f'<text class="left" x="-14" y="100%" {dy}>{name}</text>')
        for step, label in zip(steps, labels, strict=True):
            drawn.append(f'<text x="{x(step):.3f}%" y="100%" {dy}>{label}</text>')
    return drawn


def _line(curve: Curve, x: Scale, y: Scale) -> str:
    path = "".join(
        "M" + " ".join(f"{x(step):.3f},{100 - y(value):.3f}" for step, value in segment)
        for segment in segments(curve.points)
        if len(segment) > 1
    )
    if not path:
        return ""
    return (
        '<svg viewBox="0 0 100 100" preserveAspectRatio="none">'
        f'<path class="c{curve.color}" d="{path}"/></svg>'
    )


def _dots(curve: Curve, x: Scale, y: Scale) -> str:
    """A validation's points; of a line those that stand alone and would not be seen otherwise."""
    shown = [s for s in segments(curve.points) if curve.dots or len(s) == 1]
    return "".join(
        f'<circle class="c{curve.color}" cx="{x(step):.3f}%" cy="{100 - y(value):.3f}%" '
        f'r="{3.5 if curve.dots else 2}">'
        f"<title>{escape(curve.name)}, step {step:,.0f}: {value:.4f}</title></circle>"
        for segment in shown
        for step, value in segment
    )


def _mark(mark: Mark, x: Scale) -> str:
    first, last, words = mark
    return (
        f'<line class="mark" x1="{x(first):.3f}%" x2="{x(last):.3f}%" y1="100%" y2="100%">'
        f"<title>{escape(words)}</title></line>"
    )
