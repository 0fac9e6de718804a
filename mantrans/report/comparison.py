"""What the page shows of several runs: bits per byte, and what is different about them.

Nats per token depend on the tokenizer, so they are shown only of runs that share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mantrans.report.run import Run, mapping
from mantrans.report.svg import Curve, Figure, short

# These names and folders say nothing about the model.
_FOLDERS = {"training.experiment_name", "training.output_dir", "training.checkpoint_dir"}
_FOLDERS |= {"data.cache_dir"}
_TEXT = "dataset path val_path text_field document_separator validation_fraction val_subset_size"


def have_one_tokenizer(runs: Sequence[Run]) -> bool:
    """Whether losses per token can be compared."""
    return not _differ(runs, "data.tokenizer")


def bits_per_byte(runs: Sequence[Run]) -> Figure:
    """The validations of all runs, in the one unit that every tokenizer shares."""
    curves = []
    for color, run in enumerate(runs):
        points = run.curve("bits_per_byte")
        curves += [Curve(run.name, points, color), Curve(run.name, points, color, dots=True)]
    unit = "of validation text"
    if any(_differ(runs, f"data.{field}") for field in _TEXT.split()):
        unit += ", which is not the same for all"
    return Figure("Bits per byte", unit, curves, log=True)


def table(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(name, a value for each run): results, then what was trained on, then other settings."""
    rows = [
        *_results(runs),
        ("steps", [f"{run.steps:,}" for run in runs]),
        ("tokens", [short(run.tokens) if run.tokens else None for run in runs]),
        ("time", [run.time for run in runs]),
        ("dataset", [run.dataset for run in runs]),
        ("tokenizer", [run.setting("data.tokenizer") for run in runs]),
        ("batch", [run.batch for run in runs]),
    ]
    rows += [(name, [run.setting(name) for run in runs]) for name in _differences(runs)]
    return [(name, ["–" if v is None else str(v) for v in values]) for name, values in rows]


def _results(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    fields = [("bits per byte", "bits_per_byte")]
    if have_one_tokenizer(runs):
        fields.append(("validation loss", "validation_loss"))
    rows: list[tuple[str, list[Any]]] = []
    for name, field in fields:
        best = [run.least(field) for run in runs]
        rows.append((f"best {name}", [f"{b[0]:.4f}" if b else None for b in best]))
        rows.append(("at step", [f"{b[1]:,.0f}" if b else None for b in best]))
    if have_one_tokenizer(runs):
        losses = [run.last_loss for run in runs]
        rows.append(("last training loss", [None if y is None else f"{y:.4f}" for y in losses]))
    return rows


def _differences(runs: Sequence[Run]) -> list[str]:
    """The settings that are not the same in all runs, without names, in the order of the files."""
    names: dict[str, None] = {}
    for run in runs:
        for section, fields in run.config.items():
            names |= dict.fromkeys(f"{section}.{field}" for field in mapping(fields))
    shown = {"data.dataset", "data.tokenizer", *_FOLDERS}
    return [name for name in names if name not in shown and _differ(runs, name)]


def _differ(runs: Sequence[Run], name: str) -> bool:
    return any(run.setting(name) != runs[0].setting(name) for run in runs)
