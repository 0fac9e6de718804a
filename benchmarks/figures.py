"""Results as pictures: rooflines of the kernels, training steps, and growth. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import scaling, tables
from benchmarks.comparison import OURS, Comparison, comparisons, milliseconds, tokens_per_second
from benchmarks.machine import slug
from benchmarks.records import Row

OUR_COLOR = "#c2410c"
COLORS = {
    "triton": "#f0a07c",
    "reference": "#d4d4d4",
    "PyTorch eager": "#8b97a8",
    "PyTorch fused": "#8b97a8",
    "torch.compile": "#3b6ea5",
    "torch.compile reduce-overhead": "#7fb0de",
    "transformers": "#b8a04a",
    "SDPA flash": "#6b5b95",
    "SDPA cuDNN": "#3f7f6f",
    "SDPA efficient": "#9fc5b8",
    "SDPA math": "#e3cfe8",
    "Liger": "#5a9e4b",
}


def draw(rows: Sequence[Row], device: str, folder: Path) -> dict[str, Path]:
    """Draw what the rows of one device allow; returns title -> file. {} without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return {}
    matplotlib.use("Agg")
    matplotlib.rcParams |= {
        "svg.hashsalt": "mantrans", "axes.spines.top": False, "axes.spines.right": False,
        "font.size": 9,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for title, name, figure in _figures(rows):
        path = folder / f"{name}-{slug(device)}.svg"
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
        files[title] = path
    import matplotlib.pyplot as plt

    plt.close("all")
    return files


def _figures(rows: Sequence[Row]) -> list[tuple[str, str, Any]]:
    """(title, file's name, figure) of all that there is data for."""
    found: list[tuple[str, str, Any]] = []
    cases = [c for c in comparisons(rows, "kernels") if c.time]
    for dtype in dict.fromkeys(case.example.dtype for case in cases):
        those = [case for case in cases if case.example.dtype == dtype]
        if len(those) < 2:
            continue  # a table says it better than a picture of one line
        figure = rooflines(those, rows, dtype)
        found.append((f"Operations under the roofline, {dtype}", f"roofline-{dtype}", figure))
    if cases := [c for c in comparisons(rows, "steps") if c.time]:
        found.append(("Training steps", "steps", steps(cases)))
    if tables.sweeps(rows):
        found.append(("How a step's cost grows", "scaling", growth(rows)))
    return found


def _color(provider: str, case: Comparison) -> str:
    ours = case.ours is not None and case.ours.provider == provider
    return OUR_COLOR if ours else COLORS.get(provider, "#555555")


def rooflines(cases: Sequence[Comparison], rows: Sequence[Row], dtype: str) -> Any:
    """Left: rate over arithmetic intensity, under the two ceilings. Right: the share reached."""
    import matplotlib.pyplot as plt

    height = max(3.5, 0.3 * len(cases) + 1)
    figure, (roof, share) = plt.subplots(
        1, 2, figsize=(13, height), width_ratios=(1, 1), layout="constrained"
    )
    named: dict[str, Any] = {}
    for place, case in enumerate(cases):
        for provider, row in case.time.items():
            if not row.tflops or not row.gbytes_per_s or row.fraction is None:
                continue
            style = {"color": _color(provider, case), "s": 42 if provider in OURS else 22}
            intensity = row.tflops * 1e3 / row.gbytes_per_s
            roof.scatter(intensity, row.tflops, zorder=3 if provider in OURS else 2, **style)
            named[provider] = share.scatter(row.fraction, place, zorder=3, **style)
    _draw_ceilings(roof, rows, dtype)
    labels = [f"{c.example.operation} {c.example.direction}  {c.example.size}" for c in cases]
    share.set_yticks(range(len(cases)), labels)
    share.invert_yaxis()
    share.set(xlabel="share of the roofline", xlim=(0, None))
    share.axvline(1, color="black", linewidth=0.8)
    share.grid(axis="y", linewidth=0.3)
    figure.legend(named.values(), named.keys(), fontsize=8, loc="outside lower center", ncols=8)
    return figure


def _draw_ceilings(axes: Any, rows: Sequence[Row], dtype: str) -> None:
    """min(bandwidth · intensity, product rate), both as measured."""
    rates = {row.dtype: milliseconds(row) for row in rows if row.stage == "ceilings"}
    if "uint8" in rates and dtype in rates:
        bandwidth, product = rates["uint8"] / 1e3, rates[dtype]
        low, high = axes.get_xlim()
        x = [max(min(low, 0.1), 1e-2), product / bandwidth, max(high, 10 * product / bandwidth)]
        axes.plot(x, [bandwidth * x[0], product, product], color="black", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="TFLOP/s")
    axes.grid(which="major", linewidth=0.3)


def steps(cases: Sequence[Comparison]) -> Any:
    """Each case: bars of tokens per second and of peak memory, one a provider."""
    import matplotlib.pyplot as plt

    heights = [len(case.time) + 1 for case in cases]
    figure, grid = plt.subplots(
        len(cases), 2, figsize=(11, 0.27 * sum(heights) + 0.4), height_ratios=heights,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for (speed, memory), case in zip(grid, cases, strict=True):
        names = [row.provider for row in sorted(case.time.values(), key=milliseconds)]
        colors = [_color(name, case) for name in names]
        speeds = [tokens_per_second(case.time[name]) for name in names]
        peaks = [milliseconds(case.memory[n]) if n in case.memory else 0.0 for n in names]
        for axes, values in ((speed, speeds), (memory, peaks)):
            bars = axes.barh(names, values, color=colors)
            axes.bar_label(bars, [f"{value:,.0f}" for value in values], padding=3, fontsize=7)
            axes.invert_yaxis()
            axes.set_xlim(0, 1.18 * max(values) or 1)
            axes.set_xticks([])
            axes.spines["bottom"].set_visible(False)
        memory.set_yticks([])
        title = case.example.operation.removeprefix("training step ")
        size = case.example.size.removesuffix(" micro-batches=1")
        speed.set_title(f"{title}, {case.example.dtype}, {size}: tokens/s", loc="left", fontsize=9)
        memory.set_title("peak memory, MiB", loc="left", fontsize=9)
    return figure


def growth(rows: Sequence[Row]) -> Any:
    """Time (above) and peak memory (below) against each dimension, with fitted exponents."""
    import matplotlib.pyplot as plt

    sweeps = tables.sweeps(rows)
    figure, grid = plt.subplots(
        2, len(sweeps), figsize=(3.1 * len(sweeps), 5.2), squeeze=False, layout="constrained"
    )
    for column, (dimension, cases) in enumerate(sweeps.items()):
        sizes = [case.example.shape[dimension] for case in cases]
        for provider in tables.first_providers(cases):
            for line, metric in enumerate(("time", "memory")):
                values = [milliseconds(getattr(case, metric)[provider]) for case in cases]
                label = f"{provider}: {scaling.exponent(sizes, values):.2f}"
                color = _color(provider, cases[0])
                grid[line, column].plot(sizes, values, "o-", color=color, label=label, markersize=4)
        for axes, unit in zip(grid[:, column], ("ms a step", "peak MiB"), strict=True):
            axes.set(xscale="log", yscale="log", xlabel=dimension, ylabel=unit)
            axes.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=7)
            axes.minorticks_off()
            axes.grid(linewidth=0.3)
            axes.legend(title="exponent", fontsize=7, title_fontsize=7)
    return figure
