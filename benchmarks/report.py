"""Writes docs/benchmarks.md: two tables and two pictures, from the newest measurements.

Every number comes from a row; nothing is typed by hand. With another folder of results than the
repository's, page and pictures go into that folder.
"""

from __future__ import annotations

import dataclasses
import os
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from benchmarks import harness
from benchmarks.harness import RESULTS, Measurement
from benchmarks.steps import JUDGE

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
BEGIN = "<!-- results: written by python -m benchmarks report, not by hand -->"
END = "<!-- end of results -->"
NOTHING = "No results: there are no rows."
NOT_MEASURED = "not measured"
ONE_BY_ONE = "launched one by one"
# Of several of ours the first is shown: it is what a user gets on that device.
OURS = ("triton captured", "triton", "native")
# The textbook and ourselves in another mode are measured too, but are no alternatives.
NO_BASELINES = (*OURS, "reference")
CASE = ["device", "operation", "direction", "size", "dtype"]
OUR_COLOR, OTHER_COLORS = "#c2410c", ("#334155", "#7c93b2", "#b7a26a", "#94a3b8")


def main(arguments: Namespace) -> int:
    """`python -m benchmarks report`."""
    rows = harness.newest(harness.load(arguments.output), arguments.quick)
    own = arguments.output.resolve() != RESULTS.resolve()
    page = arguments.output / "benchmarks.md" if own else PAGE
    write(rows, page)
    print(f"written to {page}")
    return 0


def write(rows: Sequence[Measurement], page: Path) -> None:
    """Replace the text between the marks of `page`; a missing page begins as ours."""
    text = (page if page.exists() else PAGE).read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    # GPUs before CPUs
    rows = sorted(rows, key=lambda row: (row.device.endswith("threads"), row.device))
    middle = "\n\n".join(sections(rows, page)) if rows else NOTHING
    page.write_text(f"{before}{BEGIN}\n\n{middle}\n\n{END}{after}", encoding="utf-8")


def sections(rows: Sequence[Measurement], page: Path) -> Iterator[str]:
    """The page's parts: each stage with its table and its picture, then the machines."""
    for stage, heading, table, draw in STAGES:
        yield f"## {heading}"
        data = frame(rows, stage)
        yield table(data) if len(data) else f"{NOT_MEASURED.capitalize()}."
        if len(data):
            path = page.parent / "figures" / f"{stage}.svg"
            save(draw(data), path)
            yield f"![{heading}]({os.path.relpath(path, page.parent)})"
    yield "## Machines"
    devices = dict.fromkeys(row.device for row in rows)
    yield "\n".join(
        f"- **{device}**: {provenance(those)} {peaks(those)}".rstrip()
        for device in devices
        if (those := [row for row in rows if row.device == device])
    )


def provenance(rows: Sequence[Measurement]) -> str:
    """Versions, commits and days of the rows, as a sentence; every version that occurs."""
    names = dict.fromkeys(name for row in rows for name in row.versions)
    found = {name: sorted({v for row in rows if (v := row.versions.get(name))}) for name in names}
    versions = ", ".join(f"{name} {' and '.join(v)}" for name, v in found.items() if v)
    commits = sorted({_short_commit(row.commit) for row in rows})
    days = sorted({row.date[:10] for row in rows})
    return f"measured {' and '.join(days)} at commit {', '.join(commits)}, with {versions}."


def _short_commit(commit: str | None) -> str:
    if commit is None:
        return "unknown"
    return commit[:10] + " with changes" * commit.endswith("+changes")


def peaks(rows: Sequence[Measurement]) -> str:
    """What the machine can do at most, as a sentence."""
    found = [
        f"{row.operation}{'' if row.unit == 'GB/s' else ' in ' + row.dtype} "
        f"{short(row.p50)} {row.unit}"
        for row in rows
        if row.stage == "peaks" and row.p50 is not None
    ]
    return f"Peaks: {', '.join(found)}." if found else ""


# ----------------------------------------------------------------------------------------- tables


def frame(rows: Iterable[Measurement], stage: str) -> pd.DataFrame:
    """One line a candidate of a case, in the order measured: its time's columns, or its bits per
    byte's (p50 NaN where it failed), its `memory`, and `faster`: its time over ours."""
    data = pd.DataFrame(
        dataclasses.asdict(row) | {"size": row.size} for row in rows if row.stage == stage
    )
    if data.empty:
        return data
    key = [*CASE, "provider"]
    time = data[data.metric.isin(["time", "bits per byte"])].copy()
    memory = data[data.metric == "memory"].set_index(key)["p50"]
    time = time.join(memory.rename("memory"), on=key)
    rank = {name: place for place, name in enumerate(OURS)}
    ours = time[time.provider.isin(OURS) & time.p50.notna()]
    ours = ours.sort_values("provider", key=lambda names: names.map(rank), kind="stable")
    ours = ours.drop_duplicates(CASE).set_index(CASE)
    time = time.join(ours[["p50"]].rename(columns={"p50": "ours"}), on=CASE)
    time["faster"] = time.p50 / time.ours
    time["baseline"] = ~time.provider.isin(NO_BASELINES)
    return time


def short(value: float) -> str:
    """Three digits that count: 0.0123, 1.23, 12.3, 1,234."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value < 1 else f"{value:.{1 if value >= 10 else 2}f}"


def spread(row: Any) -> str:
    """Median and quantiles in ms; a dagger where calls were launched one by one."""
    mark = " †" if row.note == ONE_BY_ONE else ""
    return f"{short(row.p50)} ({short(row.p20)}–{short(row.p80)}){mark}"


def factor(value: float) -> str:
    """How many times faster ours is: bold where it is slower, to be seen."""
    return f"**{value:.2f}×**" if round(value, 2) < 1 else f"{value:.2f}×"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int]) -> str:
    """A table whose columns `numbers` are numbers, flush right."""
    rule = ["---:" if place in numbers else "---" for place in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, rule, *rows])


def table_of_steps(data: pd.DataFrame) -> str:
    """A line a case: ours beside all that were measured with it."""
    lines, before = [], None
    for (device, operation, _, size, dtype), case in data.groupby(CASE, sort=False):
        ours = case[(case.p50 == case.ours) & ~case.baseline]
        our = next(ours.itertuples(), None)
        others = case[case.baseline].sort_values("p50")
        lines.append(
            (
                device if device != before else "",
                title(operation, size, dtype),
                spread(our) if our else without_time(case[~case.baseline]),
                f"{tokens_per_second(our):,.0f}" if our else "",
                f"{our.memory:,.0f}" if our else "",
                "<br>".join(beside(other, our) for other in others.itertuples()) or NOT_MEASURED,
            )
        )
        before = device
    header = (
        "machine", "model", "ours, ms (p20–p80)", "tokens/s", "peak MiB",
        "times as fast as (their peak MiB)",
    )  # fmt: skip
    return markdown(header, lines, numbers=(2, 3, 4))


def title(operation: str, size: str, dtype: str) -> str:
    """A training step's case in words."""
    name = operation.removeprefix("training step ")
    return f"{name}, {dtype}, {size.removesuffix(' micro-batches=1')}"


def beside(other: Any, our: Any) -> str:
    """Another candidate of a step: how many times as fast ours is, and its memory, which is bold
    where ours takes more."""
    if pd.isna(other.p50):
        return f"{other.provider} not timed: {other.note}"
    memory = f"{other.memory:,.0f}"
    if our is None:
        return f"{other.provider} {spread(other)} ms ({memory})"
    bold = f"**{memory}**" if other.memory < our.memory else memory
    return f"{other.provider} {factor(other.faster)} ({bold})"


def without_time(ours: pd.DataFrame) -> str:
    """Why there is no time of ours."""
    return f"not timed: {ours.note.iloc[0]}" if len(ours) else NOT_MEASURED


def tokens_per_second(row: Any) -> float:
    """Of a training step: the tokens of all its micro-batches over its median time."""
    tokens = row.shape["B"] * row.shape["T"] * row.shape.get("micro-batches", 1)
    return tokens / row.p50 * 1e3


class Comparison(NamedTuple):
    """One case of an operation: ours, and the fastest of the others; None where none was timed."""

    device: str
    operation: str
    size: str
    ours: Any
    other: Any

    @property
    def faster(self) -> float:
        """How many times as fast ours is; NaN if one of the two is missing."""
        return self.other.faster if self.ours and self.other else float("nan")


def comparisons(data: pd.DataFrame) -> list[Comparison]:
    """Every case of the operations."""
    found = []
    for (device, operation, direction, size, dtype), case in data.groupby(CASE, sort=False):
        ours = case[(case.p50 == case.ours) & ~case.baseline]
        others = case[case.baseline & case.p50.notna()].sort_values("p50")
        pair = (next(rows.itertuples(), None) for rows in (ours, others))
        found.append(Comparison(device, f"{operation} {direction}", f"{size} {dtype}", *pair))
    return found


def by_operation(data: pd.DataFrame) -> dict[tuple[str, str], list[Comparison]]:
    """The cases of each machine and operation, in the order measured."""
    groups: dict[tuple[str, str], list[Comparison]] = {}
    for case in comparisons(data):
        groups.setdefault((case.device, case.operation), []).append(case)
    return groups


def table_of_operations(data: pd.DataFrame) -> str:
    """A line an operation: the sizes at which ours does worst and best beside the fastest other."""
    lines, before = [], None
    for (device, operation), cases in by_operation(data).items():
        shares = [case.ours.fraction for case in cases if case.ours]
        timed = sorted((c for c in cases if c.faster == c.faster), key=lambda case: case.faster)
        ends = [timed[0], *timed[1:][-1:]] if timed else []
        cells = [f"{factor(c.faster)} {_who(c.other)}: {c.size}" for c in ends]
        lines.append(
            (
                device if device != before else "",
                operation,
                f"{len(timed)} of {len(cases)}",
                " to ".join(dict.fromkeys(f"{end(shares):.0%}" for end in (min, max) if shares))
                or NOT_MEASURED,
                *(cells or [NOT_MEASURED]),
                *[""] * (2 - max(1, len(cells))),
            )
        )
        before = device
    header = (
        "machine",
        "operation",
        "compared",
        "of the roofline",
        "ours at its worst",
        "at its best",
    )
    return markdown(header, lines, numbers=(2, 3))


def table_of_race(data: pd.DataFrame) -> str:
    """A line a recipe, text and time: means over seeds, and from which to which."""
    lines, before = [], None
    key = ["device", "operation", "provider", "dtype"]
    data = data.assign(seconds=[shape["seconds"] for shape in data["shape"]])
    for (device, text, recipe, dtype, seconds), runs in data.groupby([*key, "seconds"], sort=False):
        cpu, tokens = (sum(c[-1][i] for c in runs.curve) / len(runs) for i in (1, 2))
        ends = f" ({runs.p50.min():.3f}–{runs.p50.max():.3f})" if len(runs) > 1 else ""
        lines.append(
            (
                device if device != before else "", f"{text.removeprefix('race ')}, {dtype}",
                recipe, f"{seconds:,}", f"{cpu:,.0f}", f"{tokens / 1e6:.2f}", str(len(runs)),
                f"{runs.p50.mean():.3f}{ends}",
            )
        )  # fmt: skip
        before = device
    header = (
        "machine", "text", "recipe", "seconds", "CPU seconds", "million tokens", "seeds",
        "bits per byte",
    )  # fmt: skip
    return markdown(header, lines, numbers=(3, 4, 5, 6, 7))


def _who(other: Any) -> str:
    return other.provider + (" †" if other.note == ONE_BY_ONE else "")


# --------------------------------------------------------------------------------------- pictures


def save(figure: Any, path: Path) -> None:
    """As SVG that is the same for the same rows."""
    import matplotlib
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "mantrans"}):
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)


def _axes(heights: Sequence[float], columns: int) -> tuple[Any, Any]:
    """A grid of axes, a row a machine; heights in lines of text."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(
        len(heights), columns, figsize=(11, 0.27 * sum(heights) + 0.3), squeeze=False,
        layout="constrained", height_ratios=heights,
    )  # fmt: skip


def _lines(axes: Any, labels: Sequence[str], heading: str) -> None:
    """Name the lines of a picture, the first at the top, and draw 1 as a vertical line."""
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.axvline(1, color="black", linewidth=0.8, zorder=1)
    axes.set_title(heading, loc="left", fontsize=9)
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(axis="y", linewidth=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def picture_of_steps(data: pd.DataFrame) -> Any:
    """Speed and peak memory of every candidate, in multiples of eager PyTorch's."""
    judge = data[(data.provider == JUDGE) & data.p50.notna()].set_index(CASE)
    columns = {"p50": "judge_time", "memory": "judge_memory"}
    data = data.join(judge[list(columns)].rename(columns=columns), on=CASE)
    data = data.assign(speed=data.judge_time / data.p50, space=data.memory / data.judge_memory)
    ours = data.p50 == data.ours
    data = data[data.speed.notna() & (data.provider != JUDGE) & (data.baseline | ours)]
    data = data.assign(who=data.provider.where(data.baseline, "ours"))
    names = list(dict.fromkeys(["ours", *data.who]))
    colors = dict(zip(names, (OUR_COLOR, *OTHER_COLORS), strict=False))
    devices = {
        d: list(those.groupby(CASE, sort=False)) for d, those in data.groupby("device", sort=False)
    }
    figure, grid = _axes([len(cases) + 2 for cases in devices.values()] or [2], 2)
    for pair, (device, cases) in zip(grid, devices.items(), strict=False):
        labels = [title(key[1], key[3], key[4]) for key, _ in cases]
        headings = (f"{device}: speed", "peak memory")
        for axes, column, heading in zip(pair, ("speed", "space"), headings, strict=True):
            _lines(axes, labels if column == "speed" else [""] * len(labels), heading)
            for place, (_, case) in enumerate(cases):
                shades = [colors[who] for who in case.who]
                axes.scatter(case[column], [place] * len(case), color=shades, s=34, zorder=3)
            axes.set_xlim(0, None)
    marks = [grid[0, 0].scatter([], [], color=colors[name], s=34) for name in names]
    figure.legend(
        marks, names, loc="outside lower center", ncols=len(names), fontsize=8, frameon=False,
        title=f"in multiples of {JUDGE} (the line at 1)", title_fontsize=8,
    )  # fmt: skip
    return figure


def picture_of_operations(data: pd.DataFrame) -> Any:
    """How many times as fast as the fastest other ours is: a point a case."""
    groups = by_operation(data)
    devices: dict[str, list[tuple[str, list[float]]]] = {}
    for (device, operation), cases in groups.items():
        times = [case.faster for case in cases if case.faster == case.faster]
        if times:
            devices.setdefault(device, []).append((operation, times))
    figure, grid = _axes([len(those) + 2 for those in devices.values()] or [2], 1)
    for (axes,), (device, those) in zip(grid, devices.items(), strict=False):
        _lines(axes, [operation for operation, _ in those], device)
        for place, (_, times) in enumerate(those):
            colors = [OUR_COLOR if time >= 1 else OTHER_COLORS[0] for time in times]
            axes.scatter(times, [place] * len(times), color=colors, s=30, zorder=3)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    figure.supxlabel(
        "times as fast as the fastest other (left of the line ours is slower)", fontsize=8
    )
    return figure


def picture_of_race(data: pd.DataFrame) -> Any:
    """Bits per byte over seconds of training, on the first seed; axes a machine and text."""
    cases = list(data.groupby(["device", "operation"], sort=False))
    names = list(dict.fromkeys(data.sort_values("p50").provider))  # the best first
    colors = dict(zip(names, (OUR_COLOR, *OTHER_COLORS), strict=False))
    figure, grid = _axes([16] * len(cases), 1)
    for (axes,), ((device, text), runs) in zip(grid, cases, strict=True):
        first = runs[[shape["seed"] == runs.iloc[0]["shape"]["seed"] for shape in runs["shape"]]]
        for run in first.itertuples():
            wall, _, _, bits = zip(*run.curve, strict=True)
            axes.plot(wall, bits, color=colors[run.provider], marker="o", markersize=3)
        axes.set_title(f"{device}: {text.removeprefix('race ')}", loc="left", fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(linewidth=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylabel("bits per byte, held-out text", fontsize=8)
    grid[-1, 0].set_xlabel("seconds of training", fontsize=8)
    lines = [grid[0, 0].plot([], [], color=colors[name], marker="o")[0] for name in names]
    figure.legend(lines, names, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


STAGES: list[tuple[str, str, Any, Any]] = [
    ("steps", "Training steps", table_of_steps, picture_of_steps),
    ("operations", "Operations", table_of_operations, picture_of_operations),
    ("race", "Loss over time", table_of_race, picture_of_race),
]
