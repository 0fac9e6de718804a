"""A run's curves and samples as one self-contained HTML page.

    mantrans report runs/NAME [--output FILE.html] [--compare runs/OTHER ...]

The page shows the files that train.py wrote to the run's folder; sections without data are left
out. It needs no network and no script. This file selects the data that `run` reads; page.html,
figure.html and page.css define the page, and jinja2 escapes everything that comes from a file.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jinja2
from markupsafe import Markup

from mantrans.checkpoint.atomic import replacing, write_all
from mantrans.config import strict_yaml
from mantrans.errors import MantransError, printable, single_line
from mantrans.report import comparison
from mantrans.report.run import Run, mapping, number
from mantrans.report.svg import Curve, Figure, short

PAGE = "report.html"
MOST_COMPARED = 4  # the number of distinct colors


def environment(folder: Path) -> jinja2.Environment:
    """Templates of a folder, in which everything that is not markup is escaped."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,  # fields of a missing record are missing too
        finalize=lambda value: value if isinstance(value, Markup) else printable(str(value)),
    )


TEMPLATES = environment(Path(__file__).parent)
TEMPLATES.filters |= {"short": short, "number": number, "place": "{:.3f}".format}


def page(run: Run, others: Sequence[Run] = ()) -> str:
    """The page about `run`, compared with `others`."""
    runs = [run, *others]
    report, samples = run.report, run.report.get("samples")
    return TEMPLATES.get_template("page.html").render(
        run=run,
        runs=runs,
        compared=comparison.bits_per_byte(runs) if others else None,
        losses=_losses(runs) if comparison.have_one_tokenizer(runs) else None,
        table=comparison.table(runs) if others else [],
        curves=_curves(run),
        norms=_norms(run),
        values=report | mapping(report.get("diversity")) | mapping(report.get("coherence")),
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
        ("Share of the peak", "share_of_peak", "of products alone, median", statistics.median),
    ):
        curve = Curve(title, run.curve(field))
        if values := curve.finite():
            unit = f"{note} {short(of(values))}"
            figures.append(Figure(title, unit, [curve], from_zero=True, most_ticks=3))
    return figures


def _norms(run: Run) -> list[Figure]:
    """The gradient's norm over steps, layer by layer and kind by kind, colored from the first to
    the last in the forward's order. Runs of earlier versions have none."""
    figures = []
    for title, field in (
        ("Gradient norm by layer", "grad_norm_by_layer"),
        ("Gradient norm by kind of parameter", "grad_norm_by_kind"),
    ):
        found = run.curves(field)
        curves = [
            Curve(name, points, place=i / max(1, len(found) - 1))
            for i, (name, points) in enumerate(found.items())
        ]
        if any(curve.finite() for curve in curves):
            figures.append(Figure(title, "before clipping, of the logged step", curves, log=True))
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
