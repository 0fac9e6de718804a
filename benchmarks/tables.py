"""Results as Markdown tables. Every number in them comes from a row; nothing is typed by hand."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from benchmarks import scaling
from benchmarks.comparison import Comparison, comparisons, milliseconds, tokens_per_second
from benchmarks.records import Row


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], text: int = 1) -> str:
    """A table whose first `text` columns are text and whose others are numbers."""
    rule = ["---"] * text + ["---:"] * (len(header) - text)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, rule, *rows])


def short(value: float) -> str:
    """Three digits that count: 0.0123, 1.23, 12.3, 1,234."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value < 1 else f"{value:.{1 if value >= 10 else 2}f}"


def factor(value: float | None) -> str:
    """How many times faster ours is: bold where it is slower, so that nobody overlooks it."""
    if value is None:
        return "–"
    return f"**{value:.2f}×**" if round(value, 2) < 1 else f"{value:.2f}×"


def spread(row: Row) -> str:
    """Median and quantiles; a dagger where a row has a note: launched one by one, not replayed."""
    assert row.p20 is not None and row.p80 is not None
    mark = " †" if row.stage == "kernels" and row.note else ""
    return f"{short(milliseconds(row))} ({short(row.p20)}–{short(row.p80)}){mark}"


def provenance(rows: Sequence[Row]) -> str:
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


def ceilings(rows: Sequence[Row]) -> str:
    """What the machine can do at most."""
    found = [row for row in rows if row.stage == "ceilings" and row.p50 is not None]
    return markdown(
        ("ceiling", "size", "median", "p20–p80"),
        [
            (
                row.operation + (f" {row.dtype}" if row.unit != "GB/s" else ""), row.size,
                f"{short(milliseconds(row))} {row.unit}",
                f"{short(row.p20 or 0)}–{short(row.p80 or 0)}",
            )
            for row in found
        ],
        text=2,
    )  # fmt: skip


def steps(rows: Sequence[Row]) -> str:
    """Training steps, one block of lines per model and shape."""
    lines = []
    for case in comparisons(rows, "steps"):
        name = f"{case.example.operation.removeprefix('training step ')}, {case.example.dtype}, "
        name += case.example.size
        for provider, row in sorted(case.time.items(), key=lambda item: milliseconds(item[1])):
            lines.append((name, *_step_cells(case, provider, row)))
            name = ""
        for provider, row in case.failures.items():
            lines.append((name, provider, f"not timed: {row.note}", *[""] * 5))
            name = ""
    header = (
        "model", "who", "ms, median (p20–p80)", "tokens/s", "ours is faster by", "peak MiB",
        "of the product ceiling", "largest loss difference",
    )  # fmt: skip
    return markdown(header, lines, text=2)


def _step_cells(case: Comparison, provider: str, row: Row) -> tuple[str, ...]:
    difference, memory = case.loss_difference.get(provider), case.memory.get(provider)
    rival = row in case.rivals
    return (
        provider if rival else f"**{provider}**",
        spread(row),
        f"{tokens_per_second(row):,.0f}",
        factor(case.times_faster(row)) if rival else "",
        f"{milliseconds(memory):,.0f}" if memory else "",
        f"{row.fraction:.0%}" if row.fraction is not None else "",
        (difference.note or "").rpartition(" ")[2] if difference else "the judge",
    )


def kernels(rows: Sequence[Row]) -> str:
    """Each operation: ours beside the fastest of the others."""
    lines = []
    for case in comparisons(rows, "kernels"):
        if case.ours is None or not case.rivals:
            continue
        ours, rival = case.ours, case.rivals[0]
        lines.append(
            (
                f"{ours.operation} {ours.direction}", ours.size, ours.dtype, spread(ours),
                f"{ours.fraction or 0:.0%}", f"{rival.provider} {spread(rival)}",
                factor(case.times_faster(rival)),
            )
        )  # fmt: skip
    header = (
        "operation", "shape", "dtype", "ours, ms (p20–p80)", "of the roofline",
        "fastest other, ms (p20–p80)", "ours is faster by",
    )  # fmt: skip
    return markdown(header, lines, text=3)


def kernel_details(rows: Sequence[Row]) -> str:
    """Every provider of every operation."""
    lines = []
    for case in comparisons(rows, "kernels"):
        example = case.example
        where = (f"{example.operation} {example.direction}", f"{example.size} {example.dtype}")
        for provider, row in sorted(case.time.items(), key=lambda item: milliseconds(item[1])):
            memory = case.memory.get(provider)
            peak = f"{milliseconds(memory):,.1f}" if memory else ""
            rates = (
                short(row.tflops or 0),
                short(row.gbytes_per_s or 0),
                f"{row.fraction or 0:.0%}",
            )
            lines.append((*where, provider, spread(row), *rates, peak))
        for provider, row in case.failures.items():
            lines.append((*where, provider, f"not timed: {row.note}", "", "", "", ""))
    header = (
        "operation", "shape", "who", "ms, median (p20–p80)", "TFLOP/s", "GB/s", "of the roofline",
        "allocates, MiB",
    )  # fmt: skip
    return markdown(header, lines, text=3)


def exponents(rows: Sequence[Row]) -> str:
    """The fitted exponents of time and memory beside the expected ones."""
    lines = []
    for dimension, cases in sweeps(rows).items():
        first = cases[0].example
        sizes = [case.example.shape[dimension] for case in cases]
        work, peak = zip(
            *(
                scaling.expected(c.example.shape, first.dtype, _device_type(first.device))
                for c in cases
            ),
            strict=True,
        )
        for provider in first_providers(cases):
            time = [milliseconds(case.time[provider]) for case in cases]
            memory = [milliseconds(case.memory[provider]) for case in cases]
            lines.append(
                (
                    dimension, f"{sizes[0]:,}–{sizes[-1]:,}", provider,
                    f"{short(time[0])} → {short(time[-1])}",
                    f"{scaling.exponent(sizes, time):.2f}", f"{scaling.exponent(sizes, work):.2f}",
                    f"{short(memory[0])} → {short(memory[-1])}",
                    f"{scaling.exponent(sizes, memory):.2f}",
                    f"{scaling.exponent(sizes, peak):.2f}",
                )
            )  # fmt: skip
    header = (
        "grows", "sizes", "who", "ms", "exponent", "of the arithmetic", "peak MiB", "exponent",
        "of the prediction for ours",
    )  # fmt: skip
    return markdown(header, lines, text=3)


def sweeps(rows: Sequence[Row]) -> dict[str, list[Comparison]]:
    """dimension -> its cases by size; only dimensions measured at two sizes or more."""
    found: dict[str, list[Comparison]] = defaultdict(list)
    for case in comparisons(rows, "scaling"):
        found[case.example.operation.rpartition(" ")[2]].append(case)
    return {
        dimension: sorted(cases, key=lambda case: case.example.shape[dimension])
        for dimension, cases in found.items()
        if len(cases) > 1
    }


def first_providers(cases: Sequence[Comparison]) -> list[str]:
    """Those that were measured at every size."""
    return [name for name in cases[0].time if all(name in case.time for case in cases)]


def bench(rows: Sequence[Row]) -> str:
    """The small set of `make bench`: one line a case, one column a provider."""
    cases = comparisons(rows, "bench")
    names = list(dict.fromkeys(name for case in cases for name in case.time))
    lines = []
    for case in cases:
        ratio = case.times_faster(case.rivals[0]) if case.rivals else None
        cells = [spread(case.time[name]) if name in case.time else "" for name in names]
        title = f"{case.example.operation} {case.example.direction}, {case.example.size}, "
        lines.append((title + case.example.dtype, *cells, factor(ratio)))
    return markdown(("ms, median (p20–p80)", *names, "ours over the fastest other"), lines)


def _device_type(device: str) -> str:
    return "cpu" if device.endswith("threads") else "cuda"
