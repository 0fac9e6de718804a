"""A run's curves and samples as one self-contained HTML page.

    mantrans report runs/NAME [--output FILE.html] [--compare runs/OTHER ...]

The page shows the files that train.py wrote to the run's folder; sections without data are left
out. It needs no network and no script. This file reads and selects the data; page.html, figure.html
and page.css define the page, and jinja2 escapes everything that comes from a file.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from mantrans.checkpoint.atomic import open_regular, replacing, write_all
from mantrans.config import strict_yaml
from mantrans.errors import MantransError, printable, single_line
from mantrans.records import read_records
from mantrans.report.svg import Curve, Figure, Mark, Point, short

PAGE = "report.html"
MOST_COMPARED = 4  # the number of distinct colors


@dataclass(frozen=True)
class Run:
    """The records of a run; a missing one is empty."""

    name: str
    metrics: list[dict[str, Any]]
    timings: list[dict[str, Any]]
    config: dict[str, Any]
    versions: dict[str, Any]
    report: dict[str, Any]  # the final evaluation

    @classmethod
    def load(cls, folder: Path) -> Run:
        """MantransError for a folder without a run, or a file in it that cannot be parsed."""
        shown = single_line(str(folder))
        try:
            if not (folder / "metrics.jsonl").is_file():
                found = "one without metrics.jsonl" if folder.is_dir() else "no such folder"
                raise MantransError(f"{shown}: expected a folder that train.py wrote, got {found}")
            metrics, config = _records(folder / "metrics.jsonl"), folder / "config.yaml"
            last = metrics[-1]["step"] if metrics else 0
            report = _json(folder / "report.json")
            # A report of another step is from an earlier run in this folder, or before a resume.
            is_current = _mapping(report.get("run")).get("step", last) == last
            return cls(
                name=folder.resolve().name,
                metrics=metrics,
                timings=_records(folder / "timings.jsonl"),
                config=_mapping(strict_yaml.read(config)) if config.exists() else {},
                versions=_json(folder / "versions.json"),
                report=report if is_current else {},
            )
        except OSError as error:
            raise MantransError(f"{shown}: cannot be read ({error.strerror})") from None

    def curve(self, field: str) -> list[Point]:
        """(step, value) of a field of the metrics or timings; None if it is not finite."""
        records = self.timings if field == "tokens_per_second" else self.metrics
        return [(r["step"], number(r[field])) for r in records if field in r]

    @property
    def steps(self) -> int:
        """The last recorded step."""
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def tokens_per_step(self) -> float | None:
        """From the last record that counts tokens; None without one."""
        counted = [r for r in self.metrics if r["step"] and number(r.get("tokens"))]
        return counted[-1]["tokens"] / counted[-1]["step"] if counted else None

    @property
    def tokens(self) -> float | None:
        """Tokens trained on until the last recorded step; None if they are not counted."""
        return self.steps * self.tokens_per_step if self.tokens_per_step else None

    @property
    def last_loss(self) -> float | None:
        """The last training loss that is finite."""
        return next((y for _, y in reversed(self.curve("loss")) if y is not None), None)

    @property
    def best(self) -> tuple[float, float] | None:
        """The lowest validation loss and its step."""
        measured = [(y, step) for step, y in self.curve("validation_loss") if y is not None]
        return min(measured, default=None)

    def skipped(self) -> list[Mark]:
        """The ranges of the log in which steps were skipped."""
        marks: list[Mark] = []
        before = seen = 0.0
        for step, count in self.curve("skipped"):
            if count is not None and count > seen:
                words = f"{count - seen:,.0f} skipped after step {before:,.0f} until {step:,.0f}"
                marks.append((before, step, words))
            before, seen = step, seen if count is None else count
        return marks


def number(value: Any) -> float | None:
    """`value` as a float whose axis can be drawn: nearly 0 is 0. None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e100:
        return None
    return float(value) if abs(value) > 1e-100 else 0.0


def _records(path: Path) -> list[dict[str, Any]]:
    """The records of a file in the order of their steps; none without a file."""
    records = read_records(path) if path.exists() else []
    records = [r for r in records if type(r.get("step")) is int and 0 <= r["step"] <= 10**12]
    return sorted(records, key=lambda r: r["step"])


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} without a file."""
    if not path.exists():
        return {}
    try:
        with open_regular(path) as file:
            value = json.load(file)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        shown = single_line(str(path))
        raise MantransError(
            f"{shown}: expected the JSON object that train.py wrote, got other JSON"
        )
    return value


def _mapping(value: Any) -> dict[str, Any]:
    """A section of a file; {} if it is absent or not a section."""
    return value if isinstance(value, dict) else {}


# -------------------------------------------------------------------------------------- the page

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.ChainableUndefined,  # fields of a missing record are missing too
    finalize=lambda value: value if isinstance(value, Markup) else printable(str(value)),
)
TEMPLATES.filters |= {"short": short, "number": number, "place": "{:.3f}".format}


def page(run: Run, others: Sequence[Run] = ()) -> str:
    """The page about `run`, with the losses of `others` in the same figure."""
    report, samples = run.report, run.report.get("samples")
    return TEMPLATES.get_template("page.html").render(
        run=run,
        runs=[run, *others],
        losses=_losses([run, *others]),
        curves=_curves(run),
        values=report | _mapping(report.get("diversity")) | _mapping(report.get("coherence")),
        samples=samples if isinstance(samples, list) else [],
        config=strict_yaml.dump(run.config) if run.config else "",
    )


def _losses(runs: Sequence[Run]) -> Figure:
    """Training and validation loss of all runs in one figure."""
    curves, unit = [], "nats per token"
    for color, run in enumerate(runs):
        names = ("training", "validation") if len(runs) == 1 else (run.name,) * 2
        curves.append(Curve(names[0], run.curve("loss"), color))
        curves.append(Curve(names[1], run.curve("validation_loss"), color, dots=True))
    if len(runs) > 1:
        unit += "; lines: training, dots: validation"
    per_step = {run.tokens_per_step for run in runs}
    tokens = per_step.pop() if len(per_step) == 1 else None  # else tokens per step differ
    marks = runs[0].skipped()
    return Figure("Loss", unit, curves, log=True, tokens_per_step=tokens, marks=marks)


def _curves(run: Run) -> list[Figure]:
    """The other logged values, as small figures."""
    figures = []
    for title, field, note, of in (
        ("Learning rate", "learning_rate", "highest", max),
        ("Gradient norm", "grad_norm", "before clipping, median", statistics.median),
        ("Tokens per second", "tokens_per_second", "median", statistics.median),
    ):
        curve = Curve(title, run.curve(field))
        if values := curve.finite():
            unit = f"{note} {short(of(values))}"
            figures.append(Figure(title, unit, [curve], from_zero=True, most_ticks=3))
    return figures


def write_page(folder: Path, output: Path | None = None, compare: Sequence[Path] = ()) -> Path:
    """Write the page about the run in `folder` to `output`, by default its report.html; return it.

    Raises MantransError (one line) for a folder without a run, or a page that cannot be written.
    """
    path = folder / PAGE if output is None else output
    shown = single_line(str(path))
    if len(compare) > MOST_COMPARED:
        raise MantransError(f"--compare: expected at most {MOST_COMPARED} runs, got {len(compare)}")
    runs = [Run.load(f) for f in (folder, *compare)]
    if len({run.name for run in runs}) < len(runs):
        runs = [replace(r, name=str(f)) for r, f in zip(runs, (folder, *compare), strict=True)]
    content = page(runs[0], runs[1:])
    try:
        if path.exists() and not path.is_file():
            raise MantransError(f"{path}: expected the name of an HTML file, got no regular file")
        with replacing(path) as file:
            write_all(file, content.encode())
    except OSError as error:
        raise MantransError(f"{shown}: cannot be written ({error.strerror})") from None
    return path
