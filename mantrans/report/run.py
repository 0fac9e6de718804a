"""The records of a run, read from its folder for the page."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mantrans.checkpoint.atomic import open_regular
from mantrans.config import strict_yaml
from mantrans.errors import MantransError, single_line
from mantrans.records import read_records
from mantrans.report.svg import Mark, Point
from mantrans.terminal import duration

_MOST_CURVES = 256  # of one field
_TIMINGS = ("tokens_per_second", "share_of_peak")


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
            is_current = mapping(report.get("run")).get("step", last) == last
            return cls(
                name=folder.resolve().name,
                metrics=metrics,
                timings=_records(folder / "timings.jsonl"),
                config=mapping(strict_yaml.read(config)) if config.exists() else {},
                versions=_json(folder / "versions.json"),
                report=report if is_current else {},
            )
        except OSError as error:
            raise MantransError(f"{shown}: cannot be read ({error.strerror})") from None

    def curve(self, field: str) -> list[Point]:
        """(step, value) of a field of the metrics or timings; None if it is not finite."""
        records = self.timings if field in _TIMINGS else self.metrics
        return [(r["step"], number(r[field])) for r in records if field in r]

    def curves(self, field: str) -> dict[str, list[Point]]:
        """{name: its curve} of a field whose values are numbers by name."""
        found: dict[str, list[Point]] = {}
        for record in self.metrics:
            for name, value in mapping(record.get(field)).items():
                if name in found or len(found) < _MOST_CURVES:
                    found.setdefault(name, []).append((record["step"], number(value)))
        return found

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
        return self.least("validation_loss")

    def least(self, field: str) -> tuple[float, float] | None:
        """The lowest finite value of a field, and its step."""
        measured = [(y, step) for step, y in self.curve(field) if y is not None]
        return min(measured, default=None)

    def setting(self, name: str) -> Any:
        """A field of the config, such as data.dataset; None if it is not there."""
        section, _, field = name.partition(".")
        return mapping(self.config.get(section)).get(field)

    @property
    def dataset(self) -> str | None:
        """The data set; of one's own text also its file's name."""
        name, path = self.setting("data.dataset"), self.setting("data.path")
        is_own = name == "local" and isinstance(path, str)
        return f"{name} {Path(path).name}" if is_own else name

    @property
    def batch(self) -> str | None:
        """The sequences of a step and their length."""
        length = self.setting("data.max_length") or self.setting("model.max_seq_len")
        count = self.setting("training.batch_size")
        parts = self.setting("training.gradient_accumulation_steps")
        if any(type(n) is not int for n in (length, count, parts)):
            return None
        return f"{count * parts:,} sequences of {length:,} tokens a step"

    @property
    def time(self) -> str | None:
        """How long it trained, without validation and saving; None if its speed is not known."""
        seconds, before = 0.0, 0
        for step, speed in self.curve("tokens_per_second"):
            if speed and speed > 0 and self.tokens_per_step:
                seconds += (step - before) * self.tokens_per_step / speed
            before = int(step)
        return f"{duration(seconds)} of training" if 0 < seconds < 1e9 else None

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


def mapping(value: Any) -> dict[str, Any]:
    """A section of a file; {} if it is absent or not a section."""
    return value if isinstance(value, dict) else {}
