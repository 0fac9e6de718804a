"""Writes docs/benchmarks.md's tables and draws its two figures, from the newest measurements.

Every number comes from a row; nothing is typed by hand. With another folder of results than the
repository's, page and figures go into that folder.
"""

from __future__ import annotations

import dataclasses
import os
from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks import harness, steps
from benchmarks.harness import RESULTS, Measurement
from benchmarks.machine import slug

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
BEGIN = "<!-- results: written by python -m benchmarks report, not by hand -->"
END = "<!-- end of results -->"
NOTHING = "No results: there are no rows."
# Of several of ours the first one there is stands for us: it is what a user gets on that device.
OURS = ("triton captured", "triton", "native")
# The textbook and ourselves in another mode are measured too, but nobody would pick them instead.
NO_BASELINES = (*OURS, "reference")
CASE = ["operation", "direction", "size", "dtype"]
OUR_COLOR, OTHER_COLOR = "#c2410c", "#8b97a8"


def main(arguments: Namespace) -> int:
    """`python -m benchmarks report`."""
    rows = harness.newest(harness.load(arguments.output), arguments.quick)
    own = arguments.output.resolve() != RESULTS.resolve()
    page = arguments.output / "benchmarks.md" if own else PAGE
    write(rows, page)
    print(f"written to {page}")
    return 0


def write(rows: Sequence[Measurement], page: Path) -> None:
    """Replace what stands between the marks of `page`; a page that is not there begins as ours."""
    text = (page if page.exists() else PAGE).read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    devices = {row.device for row in rows}
    sections = [  # GPUs before CPUs
        section([row for row in rows if row.device == device], page)
        for device in sorted(devices, key=lambda name: (name.endswith("threads"), name))
    ]
    middle = "\n\n".join(sections) or NOTHING
    page.write_text(f"{before}{BEGIN}\n\n{middle}\n\n{END}{after}", encoding="utf-8")


def section(rows: Sequence[Measurement], page: Path) -> str:
    """All of one device."""
    device = rows[0].device
    parts = [f"## {device}", provenance(rows), peaks(rows)]
    folder = page.parent / "figures"
    for stage, heading, table, draw in STAGES:
        data = frame(rows, stage)
        if data.empty:
            continue
        parts += [f"### {heading}", table(data)]
        if draw:
            path = folder / f"{stage}-{slug(device)}.svg"
            save(draw(data), path)
            parts.append(f"![{heading}, {device}]({os.path.relpath(path, page.parent)})")
    return "\n\n".join(part for part in parts if part)


def provenance(rows: Sequence[Measurement]) -> str:
    """Versions, commits and days of the rows, as a sentence; every version that occurs."""
    names = dict.fromkeys(name for row in rows for name in row.versions)
    found = {name: sorted({v for row in rows if (v := row.versions.get(name))}) for name in names}
    versions = ", ".join(f"{name} {' and '.join(v)}" for name, v in found.items() if v)
    commits = sorted({_short_commit(row.commit) for row in rows})
    days = sorted({row.date[:10] for row in rows})
    return f"Measured {' and '.join(days)} at commit {', '.join(commits)}, with {versions}."


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
    return f"Measured peaks: {', '.join(found)}." if found else ""


# ----------------------------------------------------------------------------------------- tables


def frame(rows: Iterable[Measurement], stage: str) -> pd.DataFrame:
    """One line a candidate of a case, in the order measured: its time's columns (p50 NaN where it
    failed), `memory` and `loss_difference` beside them, and `faster`: its time over ours."""
    data = pd.DataFrame(
        dataclasses.asdict(row) | {"size": row.size} for row in rows if row.stage == stage
    )
    if data.empty:
        return data
    key = [*CASE, "provider"]
    time = data[data.metric == "time"].copy()
    for metric in ("memory", "loss difference"):
        column = metric.replace(" ", "_")
        values = data[data.metric == metric].set_index(key)[["p50", "note"]]
        values.columns = [column, f"{column}_note"]
        time = time.join(values, on=key)
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
    """Median and quantiles in ms; a dagger where launches went out one by one."""
    mark = " †" if row.note == "launched one by one" else ""
    return f"{short(row.p50)} ({short(row.p20)}–{short(row.p80)}){mark}"


def factor(value: float) -> str:
    """How many times faster ours is: bold where it is slower, so that nobody overlooks it."""
    return f"**{value:.2f}×**" if round(value, 2) < 1 else f"{value:.2f}×"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], text: int) -> str:
    """A table whose first `text` columns are text and whose others are numbers."""
    rule = ["---"] * text + ["---:"] * (len(header) - text)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, rule, *rows])


def table_of_steps(data: pd.DataFrame) -> str:
    """A block of lines a case, fastest first."""
    lines = []
    for (operation, _, size, dtype), case in data.groupby(CASE, sort=False):
        title = f"{operation.removeprefix('training step ')}, {dtype}, {size}"
        for row in case.sort_values("p50").itertuples():
            if pd.isna(row.p50):
                lines.append((title, row.provider, f"not timed: {row.note}", *[""] * 5))
            else:
                lines.append((title, *_step_cells(row)))
            title = ""
    header = (
        "model", "who", "ms, median (p20–p80)", "tokens/s", "ours is faster by", "peak MiB",
        "of the product peak", "largest loss difference",
    )  # fmt: skip
    return markdown(header, lines, text=2)


def _step_cells(row: Any) -> tuple[str, ...]:
    difference = row.loss_difference_note
    return (
        row.provider if row.baseline else f"**{row.provider}**",
        spread(row),
        f"{tokens_per_second(row):,.0f}",
        factor(row.faster) if row.baseline and row.ours else "",
        f"{row.memory:,.0f}",
        f"{row.fraction:.0%}",
        "the judge" if pd.isna(difference) else difference.rpartition(" ")[2],
    )


def tokens_per_second(row: Any) -> float:
    """Of a training step: the tokens of all its micro-batches over its median time."""
    tokens = row.shape["B"] * row.shape["T"] * row.shape.get("micro-batches", 1)
    return tokens / row.p50 * 1e3


def table_of_operations(data: pd.DataFrame) -> str:
    """A line a case: ours beside the fastest of the others."""
    lines = []
    for (operation, direction, size, dtype), case in data.groupby(CASE, sort=False):
        ours = case[case.p50 == case.ours]
        others = case[case.baseline & case.p50.notna()].sort_values("p50")
        if ours.empty or others.empty:
            continue
        our, other = next(ours.itertuples()), next(others.itertuples())
        lines.append(
            (
                f"{operation} {direction}", size, dtype, spread(our), f"{our.fraction:.0%}",
                f"{other.provider} {spread(other)}", factor(other.faster),
            )
        )  # fmt: skip
    header = (
        "operation", "shape", "dtype", "ours, ms (p20–p80)", "of the roofline",
        "fastest other, ms (p20–p80)", "ours is faster by",
    )  # fmt: skip
    return markdown(header, lines, text=3)


def table_of_scaling(data: pd.DataFrame) -> str:
    """The fitted exponents of time and memory beside the expected ones."""
    lines = []
    for (operation, _), those in data.groupby(["operation", "provider"], sort=False):
        dimension = operation.rpartition(" ")[2]
        those = those.assign(n=those["shape"].map(lambda shape, d=dimension: shape[d]))
        those = those.sort_values("n")
        if len(those) < 2:
            continue
        kind = "cpu" if those.device.iloc[0].endswith("threads") else "cuda"
        expected = [steps.expected_cost(s, d, kind) for s, d in zip(those["shape"], those.dtype)]  # noqa: B905
        work, peak = zip(*expected, strict=True)
        cells = [
            f"{steps.exponent(list(those.n), list(costs)):.2f}"
            for costs in (those.p50, work, those.memory, peak)
        ]
        first, last = those.iloc[0], those.iloc[-1]
        lines.append(
            (
                dimension, f"{first.n:,}–{last.n:,}", first.provider,
                f"{short(first.p50)} → {short(last.p50)}", *cells[:2],
                f"{short(first.memory)} → {short(last.memory)}", *cells[2:],
            )
        )  # fmt: skip
    header = (
        "grows", "sizes", "who", "ms", "exponent", "of the arithmetic", "peak MiB", "exponent",
        "of the prediction for ours",
    )  # fmt: skip
    return markdown(header, lines, text=3)


# ---------------------------------------------------------------------------------------- figures


def save(figure: Any, path: Path) -> None:
    """As SVG that is the same for the same rows."""
    import matplotlib
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "mantrans"}):
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)


def _axes(rows: int, columns: int, height: float, **more: Any) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(
        rows, columns, figsize=(11, height), squeeze=False, layout="constrained", **more
    )


def picture_of_steps(data: pd.DataFrame) -> Any:
    """Each case: bars of tokens per second and of peak memory, fastest first."""
    cases = [
        (key, c.sort_values("p50"))
        for key, c in data.dropna(subset="p50").groupby(CASE, sort=False)
    ]
    heights = [len(case) + 1 for _, case in cases]
    figure, grid = _axes(len(cases), 2, 0.27 * sum(heights) + 0.4, height_ratios=heights)
    for (left, right), ((operation, _, size, dtype), case) in zip(grid, cases, strict=True):
        colors = [OTHER_COLOR if other else OUR_COLOR for other in case.baseline]
        speeds = [tokens_per_second(row) for row in case.itertuples()]
        for axes, values in ((left, speeds), (right, list(case.memory))):
            bars = axes.barh(case.provider, values, color=colors)
            axes.bar_label(bars, [f"{value:,.0f}" for value in values], padding=3, fontsize=7)
            axes.invert_yaxis()
            axes.set_xlim(0, 1.18 * max(values))
            axes.set_xticks([])
            axes.spines[["top", "right", "bottom"]].set_visible(False)
        right.set_yticks([])
        title = f"{operation.removeprefix('training step ')}, {dtype}, {size}"
        left.set_title(
            f"{title.removesuffix(' micro-batches=1')}: tokens/s", loc="left", fontsize=9
        )
        right.set_title("peak memory, MiB", loc="left", fontsize=9)
    return figure


def picture_of_operations(data: pd.DataFrame) -> Any:
    """The share of the roofline that each candidate reaches, a line a case."""
    data = data[data.fraction.notna()]
    cases = list(data.groupby(CASE, sort=False))
    figure, ((axes,),) = _axes(1, 1, max(3.5, 0.24 * len(cases) + 1))
    for place, (_, case) in enumerate(cases):
        others, ours = case[case.p50 != case.ours], case[case.p50 == case.ours]
        axes.scatter(others.fraction, [place] * len(others), color=OTHER_COLOR, s=20, zorder=2)
        axes.scatter(ours.fraction, [place] * len(ours), color=OUR_COLOR, s=40, zorder=3)
    labels = [f"{key[0]} {key[1]}  {key[2]} {key[3]}" for key, _ in cases]
    axes.set_yticks(range(len(cases)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xlabel="share of the roofline (orange: ours; gray: the others)", xlim=(0, None))
    axes.grid(axis="y", linewidth=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


STAGES: list[tuple[str, str, Any, Any]] = [
    ("steps", "Training steps", table_of_steps, picture_of_steps),
    ("operations", "Operations", table_of_operations, picture_of_operations),
    ("scaling", "How a step's cost grows", table_of_scaling, None),
]
