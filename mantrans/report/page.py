"""A run's curves and samples as one self-contained HTML page.

    python -m mantrans.report runs/NAME [--output FILE.html] [--compare runs/OTHER ...]

The page shows what train.py left in the run's folder; what a run has not, its page has not. It
needs no network and no script, and what comes from a file passes through `text` on its way in.
"""

from __future__ import annotations

import argparse
import html
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mantrans import strict_yaml
from mantrans.checkpoint.atomic import replacing, write_all
from mantrans.errors import MantransError
from mantrans.evaluation.evaluator import printable
from mantrans.report.svg import Curve, Mark, Point, figure, short
from mantrans.training.metrics import read_records

PAGE = "report.html"
MOST_COMPARED = 4  # as many as there are colours to tell them apart
_MEASURES = {  # name in report.json: form, what is measured
    "loss": (".4f", "nats per token"),
    "perplexity": (".2f", "as unsure as between so many equally likely tokens"),
    "bits_per_byte": (".4f", "of text, whatever the tokenizer"),
    "tokens": (",.0f", "of validation text measured"),
    "bytes": (",.0f", "in these tokens"),
    "distinct_1": (".3f", "different words, of all words in the samples"),
    "distinct_2": (".3f", "different pairs of neighbouring words, of all pairs"),
    "vocabulary_diversity": (".3f", "different words, of those in one sample; mean"),
    "repetition_rate": (".3f", "phrases of four words that a sample had said before"),
    "grammar": (".2f", "of 5, a Claude model's mark"),
    "coherence": (".2f", "of 5"),
    "plot": (".2f", "of 5"),
}


@dataclass(frozen=True)
class Run:
    """What is on record about a run. What there is no record of is empty."""

    name: str
    metrics: list[dict[str, Any]]
    timings: list[dict[str, Any]]
    config: dict[str, Any]
    versions: dict[str, Any]
    report: dict[str, Any]  # the final evaluation

    @classmethod
    def load(cls, folder: Path) -> Run:
        """MantransError for a folder that is no run, or a file in it that cannot be understood."""
        shown = strict_yaml.single_line(str(folder))
        try:
            if not (folder / "metrics.jsonl").is_file():
                found = "no metrics.jsonl in it" if folder.is_dir() else "no such folder"
                raise MantransError(f"{shown}: {found}; accepted: a folder that train.py wrote")
            metrics, config = _records(folder / "metrics.jsonl"), folder / "config.yaml"
            last = metrics[-1]["step"] if metrics else 0
            report = _json(folder / "report.json")
            # One of another step is of an earlier run in this folder, or from before a resume.
            is_current = _within(report, "run").get("step", last) == last
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
        """(step, value) of a field of the metrics or timings; None for a value not finite."""
        records = self.timings if field == "tokens_per_second" else self.metrics
        return [(r["step"], number(r[field])) for r in records if field in r]

    @property
    def steps(self) -> int:
        """The last step on record."""
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def tokens_per_step(self) -> float | None:
        """As the last record that counts tokens has it; None where none does."""
        counted = [r for r in self.metrics if r["step"] and number(r.get("tokens"))]
        return counted[-1]["tokens"] / counted[-1]["step"] if counted else None

    @property
    def best(self) -> tuple[float, float] | None:
        """The lowest validation loss and its step."""
        measured = [(y, step) for step, y in self.curve("validation_loss") if y is not None]
        return min(measured, default=None)

    def skipped(self) -> list[Mark]:
        """The stretches of the log in which steps were skipped."""
        marks: list[Mark] = []
        before = seen = 0.0
        for step, count in self.curve("skipped"):
            if count is not None and count > seen:
                words = f"{count - seen:,.0f} skipped after step {before:,.0f} until {step:,.0f}"
                marks.append((before, step, words))
            before, seen = step, seen if count is None else count
        return marks


def number(value: Any) -> float | None:
    """`value` as a finite float that can be drawn; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e100:
        return None
    return float(value)


def text(value: Any) -> str:
    """`value` as HTML that is text and nothing else, without control characters."""
    return html.escape(printable(str(value)))


def _records(path: Path) -> list[dict[str, Any]]:
    """The records of a file in the order of their steps; none where there is no file."""
    records = read_records(path) if path.exists() else []
    records = [r for r in records if type(r.get("step")) is int and 0 <= r["step"] <= 10**12]
    return sorted(records, key=lambda r: r["step"])


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is no file."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        shown = strict_yaml.single_line(str(path))
        raise MantransError(f"{shown}: not understood; accepted: the JSON object train.py wrote")
    return value


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _within(values: dict[str, Any], name: str) -> dict[str, Any]:
    """A section of a file, {} if it is absent or no section."""
    return _mapping(values.get(name))


# -------------------------------------------------------------------------------- what is written


def page(run: Run, others: Sequence[Run] = ()) -> str:
    """The whole page about `run`, with the losses of `others` beside its own."""
    parts = [_header(run), _losses([run, *others]), _comparison([run, *others]), _curves(run)]
    parts += [_evaluation(run), _samples(run), _configuration(run)]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(run.name)} · mantrans</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def _header(run: Run) -> str:
    """The name; size, length and success; where it ran, with what."""
    model, info = _within(run.config, "model"), _within(run.report, "run")
    wanted = _within(run.config, "training").get("max_steps")
    facts, origin = [], _origin(run)
    if size := number(info.get("parameters")):
        facts.append(f"{short(size)} parameters")
    if "n_blocks" in model and "d_model" in model:
        facts.append(f"{model['n_blocks']} blocks of width {model['d_model']}")
    if run.steps:
        of = f" of {wanted:,}" if isinstance(wanted, int) and wanted > run.steps else ""
        facts.append(f"{run.steps:,}{of} step{'s' * (run.steps > 1)}")
        if run.tokens_per_step:
            facts.append(f"{short(run.steps * run.tokens_per_step)} tokens")
    if run.best:
        facts.append(f"best validation loss {run.best[0]:.4f} at step {run.best[1]:,.0f}")
    lines = (" · ".join(f"<span>{text(fact)}</span>" for fact in part) for part in (facts, origin))
    shown = "".join(f"<p>{line}</p>" for line in lines if line)
    return f"<header><h1>{text(run.name)}</h1>{shown}</header>"


def _origin(run: Run) -> list[str]:
    """Device, number format and versions, as far as they are on record."""
    info, versions = _within(run.report, "run"), run.versions
    asked = info.get("device") or _within(run.config, "training").get("device")
    facts = ["CPU" if "cpu" in (asked, versions.get("device")) else versions.get("device")]
    dtype = info.get("dtype") or _within(run.config, "model").get("dtype")
    facts.append(None if dtype == "auto" else dtype)
    names = ("torch", "triton", "python", "mantrans")
    facts += [f"{name} {versions[name]}" for name in names if versions.get(name)]
    if commit := versions.get("git_commit"):
        sha, plus, changes = str(commit).partition("+")
        facts.append(f"commit {sha[:10]}{plus}{changes}")
    return [str(fact) for fact in facts if fact]


def _losses(runs: Sequence[Run]) -> str:
    """Training and validation loss of all runs in one figure."""
    curves, unit = [], "nats per token"
    for color, run in enumerate(runs):
        names = ("training", "validation") if len(runs) == 1 else (printable(run.name),) * 2
        curves.append(Curve(names[0], run.curve("loss"), color))
        curves.append(Curve(names[1], run.curve("validation_loss"), color, dots=True))
    if len(runs) > 1:
        unit += "; lines: training, dots: validation"
    per_step = {run.tokens_per_step for run in runs}
    tokens = per_step.pop() if len(per_step) == 1 else None  # else a step is not one count of them
    return figure("Loss", unit, curves, tokens_per_step=tokens, marks=runs[0].skipped())


def _comparison(runs: Sequence[Run]) -> str:
    if len(runs) < 2:
        return ""
    rows = ""
    for color, run in enumerate(runs):
        losses = [loss for _, loss in run.curve("loss") if loss is not None]
        tokens = run.steps * (run.tokens_per_step or 0)
        cells = [f"{run.best[0]:.4f}", f"{run.best[1]:,.0f}"] if run.best else ["–", "–"]
        cells += [f"{losses[-1]:.4f}" if losses else "–", short(tokens) if tokens else "–"]
        rows += f'<tr><th><i class="c{color} line"></i>{text(run.name)}</th>'
        rows += "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    heads = ("best validation", "at step", "last training", "tokens")
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f'<table class="wide"><tr><th></th>{head}</tr>{rows}</table>'


def _curves(run: Run) -> str:
    """What else is logged, as small figures side by side."""
    figures = ""
    for title, field, note, of in (
        ("Learning rate", "learning_rate", "highest", max),
        ("Gradient norm", "grad_norm", "before clipping, median", statistics.median),
        ("Tokens per second", "tokens_per_second", "median", statistics.median),
    ):
        curve = Curve(title, run.curve(field))
        if values := curve.finite():
            unit = f"{note} {short(of(values))}"
            figures += figure(title, unit, [curve], from_zero=True, most_ticks=3)
    return f'<div class="small">{figures}</div>' if figures else ""


def _evaluation(run: Run) -> str:
    """The numbers of report.json, each with what it counts."""
    values = {**run.report, **_within(run.report, "diversity"), **_within(run.report, "coherence")}
    rows = "".join(
        f"<tr><th>{text(name.replace('_', ' '))}</th><td>{value:{form}}</td>"
        f"<td>{text(meaning)}</td></tr>"
        for name, (form, meaning) in _MEASURES.items()
        if (value := number(values.get(name))) is not None
    )
    return f"<section><h2>Final evaluation</h2><table>{rows}</table></section>" if rows else ""


def _samples(run: Run) -> str:
    samples = run.report.get("samples")
    shown = "".join(
        f"<blockquote><b>{text(sample.get('prompt', ''))}</b>"
        f"{text(sample.get('continuation', ''))}</blockquote>"
        for sample in (samples if isinstance(samples, list) else [])
        if isinstance(sample, dict)
    )
    return f"<section><h2>Samples</h2>{shown}</section>" if shown else ""


def _configuration(run: Run) -> str:
    if not run.config:
        return ""
    return (
        "<details><summary>Configuration</summary>"
        f"<pre>{text(strict_yaml.dump(run.config))}</pre></details>"
    )


STYLE = """
:root { color-scheme: light dark; --ink: #1d2327; --soft: #6a737b; --rule: #e4e7ea; --paper: #fff;
  --c0: #0f766e; --c1: #c2620c; --c2: #6d4fc4; --c3: #b83280; --c4: #64748b; --mark: #d4380d; }
@media screen and (prefers-color-scheme: dark) { :root { --ink: #dfe3e6; --soft: #929ba3;
  --rule: #2b3136; --paper: #15191c; --c0: #4fc9b9; --c1: #f0a356; --c2: #ab97f0; --c3: #ee85bd;
  --c4: #a3b0c0; --mark: #ff7a59; } }
body { max-width: 46rem; margin: 0 auto; padding: 4rem 1.5rem 5rem; color: var(--ink);
  background: var(--paper); font: 16px/1.6 system-ui, sans-serif;
  font-variant-numeric: tabular-nums; -webkit-text-size-adjust: 100%; }
h1 { margin: 0 0 .6rem; font-size: 2.1rem; font-weight: 600; line-height: 1.2;
  letter-spacing: -.02em; overflow-wrap: anywhere; }
h2, figcaption { margin: 0 0 .8rem; font-size: 1rem; font-weight: 600; }
p { margin: 0 0 .2rem; }
p span { display: inline-block; }
small, p + p, td:last-child { color: var(--soft); font-size: .875rem; font-weight: 400; }
section, figure, details, .small { margin: 3.5rem 0 0; }
figure { padding-bottom: 2.8rem; }
.plot { display: block; width: calc(100% - 4.5rem); height: 19rem;
  margin: 1rem 1.2rem 0 3.3rem; }
svg { overflow: visible; }
svg text { fill: var(--soft); font-size: 12px; text-anchor: middle; }
svg .left { text-anchor: end; }
.grid { stroke: var(--rule); }
path { fill: none; stroke: currentColor; stroke-width: 1.6; stroke-linejoin: round;
  stroke-opacity: .6; vector-effect: non-scaling-stroke; }
circle { fill: currentColor; stroke: var(--paper); stroke-width: 1; }
.mark { stroke: var(--mark); stroke-width: 5; stroke-linecap: square; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); }
.c3 { color: var(--c3); } .c4 { color: var(--c4); }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1.4rem; margin: 0; padding: 0;
  list-style: none; color: var(--soft); font-size: .875rem; }
i { display: inline-block; margin-right: .5rem; vertical-align: middle; }
i.line { width: 1.1rem; border-top: 2px solid; }
i.dot { border: 3.5px solid; border-radius: 50%; }
i.mark { width: 1rem; border-top: 5px solid var(--mark); }
.small { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: 2rem;
  margin-top: 2rem; }
.small figure { margin: 0; padding-bottom: 1.5rem; }
.small figcaption { margin: 0; font-size: .875rem; }
.small small { display: block; }
.small path { stroke-width: 1.2; stroke-opacity: 1; }
.small .plot { height: 7.5rem; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: .35rem 0; border-bottom: 1px solid var(--rule); text-align: left;
  font-weight: 400; }
td { text-align: right; }
td:last-child { padding-left: 1.5rem; text-align: left; width: 60%; }
.wide { margin: .8rem 0 4rem; }
.wide td, .wide th { width: auto; padding-left: .8rem; font-size: .875rem; text-align: right; }
.wide td:last-child { color: inherit; }
.wide th:first-child { padding-left: 0; text-align: left; overflow-wrap: anywhere; }
blockquote { margin: 0 0 1.8rem; padding-left: 1.2rem; border-left: 2px solid var(--rule);
  font: 1.05rem/1.7 ui-serif, Georgia, serif; white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; font-weight: 600; }
pre { font: .8125rem/1.6 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 34rem) { body { padding: 2rem 1rem 3rem; } .plot { height: 14rem; }
  .wide tr { display: grid; grid-template-columns: 1.4fr 1fr 1.2fr 1fr; }
  .wide th:first-child { grid-column: 1 / -1; border: 0; padding-bottom: 0; } }
@media print { body { padding: 0; font-size: 11pt; } h2 { break-after: avoid; }
  figure, tr, blockquote { break-inside: avoid; } details:not([open]) { display: none; } }
"""


# ------------------------------------------------------------------------------------ command line


def write_page(folder: Path, output: Path | None = None, compare: Sequence[Path] = ()) -> Path:
    """Write the page about the run in `folder`, there as report.html or to `output`; return where.

    Raises MantransError (one line) for a folder that is no run, or a page that cannot be written.
    """
    path = folder / PAGE if output is None else output
    shown = strict_yaml.single_line(str(path))
    if len(compare) > MOST_COMPARED:
        raise MantransError(
            f"--compare: found {len(compare)} runs; accepted: at most {MOST_COMPARED}"
        )
    runs = [Run.load(f) for f in (folder, *compare)]
    if len({run.name for run in runs}) < len(runs):
        runs = [replace(r, name=str(f)) for r, f in zip(runs, (folder, *compare), strict=True)]
    content = page(runs[0], runs[1:])
    try:
        if path.exists() and not path.is_file():
            raise MantransError(
                f"{path}: found no regular file; accepted: the name of an HTML file"
            )
        with replacing(path) as file:
            write_all(file, content.encode())
    except OSError as error:
        raise MantransError(f"{shown}: cannot be written ({error.strerror})") from None
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="mantrans.report", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("run", type=Path, help="a run's folder, such as runs/quickstart")
    add("--output", type=Path, metavar="FILE", help=f"where to write; without it RUN/{PAGE}")
    add("--compare", type=Path, nargs="+", default=[], metavar="RUN", help="show their losses too")
    options = parser.parse_args(arguments)
    try:
        print(write_page(options.run, options.output, options.compare))
    except MantransError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
