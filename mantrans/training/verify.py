"""Recomputes a stretch of a run and compares every bit with what the run recorded.

The stretch is trained again from one of the run's checkpoints, as a resumed run is. Its records lie
in a folder that is thrown away and nothing is saved: the run's own folders are only read. Compared
are the lines of metrics.jsonl and, where a checkpoint lies in the stretch or at its end, all that
is in it: weights, moments, counters.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mantrans import terminal
from mantrans.checkpoint import plain, state_file
from mantrans.checkpoint.folder import by_step
from mantrans.config import Config, TrainingConfig
from mantrans.errors import CheckpointError, MantransError, single_line
from mantrans.records import read_records
from mantrans.training import saving
from mantrans.training.logger import versions
from mantrans.training.resume import PLACES, Checkpoint, changed_settings, own_config
from mantrans.training.share import dependence
from mantrans.training.trainer import Trainer

_TENSORS = ("parameters", "optimizer_state", "guard")
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_VERSIONS = (
    "device", "threads", "torch", "triton", "numpy", "cuda", "machine", "mantrans", "git_commit",
)  # fmt: skip


class Verdict(NamedTuple):
    """equal: whether every bit is. line: what was compared, or the first difference."""

    equal: bool
    line: str


def verify(run: str, start: int, steps: int, defaults: str) -> Verdict:
    """Compare `steps` steps after step `start` with the record of a run.

    run: its name or one of its folders. defaults: the config file that says where runs are.
    Raises MantransError (one line): no such run or checkpoint, a damaged one, nothing on record
    that could be compared; several processes now, or then, if the bits depend on their number.
    """
    ranks = os.environ.get("WORLD_SIZE", "1").strip()
    if ranks not in ("", "1"):
        raise MantransError(
            "WORLD_SIZE: expected 1, since one process computes what several have trained, got "
            f"{single_line(ranks)}; run it without torchrun"
        )
    record = Record.read(run, defaults)
    first = Checkpoint.load(record.checkpoint(start))
    later = record.stretch(start, start + steps)
    for path in later.values():
        state_file.verify(path)
    with tempfile.TemporaryDirectory() as scratch:
        again = _Again(_config(record, first, Path(scratch)), resume=str(first.path), quiet=True)
        try:
            found = _compared(again, record, start, steps, later)
        finally:
            again.logger.close()
            again.folders.close()
    if not found:
        return Verdict(True, _praise(record, start, steps, later))
    return Verdict(False, f"{found}; {_causes(record, first, later)}")


class Record(NamedTuple):
    """What a run has left: `metrics` has the lines of each step, `checkpoints` a file of each,
    `versions` what the run was computed with."""

    folder: Path
    config: Config
    checkpoints: dict[int, Path]
    metrics: dict[int, list[dict[str, Any]]]
    versions: dict[str, Any]

    @classmethod
    def read(cls, run: str, defaults: str) -> Record:
        config = own_config(run, defaults, (), name="RUN")
        training = config.training
        folder = Path(training.output_dir, training.experiment_name)
        metrics: dict[int, list[dict[str, Any]]] = {}
        for line in read_records(folder / "metrics.jsonl"):
            if type(line.get("step")) is int:
                metrics.setdefault(line["step"], []).append(line)
        try:
            found: Any = json.loads((folder / "versions.json").read_bytes())
        except (OSError, ValueError, RecursionError):
            found = None
        checkpoints = by_step(Path(training.checkpoint_dir, training.experiment_name))
        return cls(folder, config, checkpoints, metrics, found if isinstance(found, dict) else {})

    def checkpoint(self, step: int) -> Path:
        """The checkpoint of that step. CheckpointError if there is none."""
        if step not in self.checkpoints:
            training = self.config.training
            known = ", ".join(map(str, sorted(self.checkpoints))) or "none"
            raise CheckpointError(
                f"--from: expected a step with a checkpoint in {training.checkpoint_dir}/"
                f"{training.experiment_name} ({known}), got {step}"
            )
        return self.checkpoints[step]

    def stretch(self, start: int, end: int) -> dict[int, Path]:
        """The checkpoints after step `start` up to `end`. MantransError unless the record reaches
        as far and has something there."""
        steps = [step for step in {*self.metrics, *self.checkpoints} if step > start]
        last = max(steps, default=start)
        if not start < end <= last:
            raise MantransError(
                f"--steps: expected at most {last - start:,}, which are on record after step "
                f"{start:,}, got {end - start:,}"
            )
        if min(steps) > end:
            raise MantransError(
                f"--steps: expected at least {min(steps) - start:,}: nothing is on record between "
                f"the steps {start:,} and {min(steps):,}, got {end - start:,}"
            )
        return {s: path for s, path in sorted(self.checkpoints.items()) if start < s <= end}


class _Again(Trainer):
    """A run that is not saved."""

    def _save(self, *, best: bool, must_succeed: bool) -> None:
        pass

    def steps(self, count: int) -> Iterator[int]:
        """Run them; yields the number of each when it is done."""
        self._timer = time.perf_counter(), self.progress.step
        for _ in range(count):
            self._advance()
            yield self.progress.step

    def state(self) -> dict[str, Any]:
        """What a checkpoint of the last step would hold."""
        self._read()
        return saving.state(self)


def _config(record: Record, first: Checkpoint, scratch: Path) -> Config:
    """The configuration of the checkpoint's run, with its device, dtype and threads written out."""
    with state_file.understood(first.path):
        values = Config.from_dict(first.state["config"], f"{first.path}: config").to_dict()
        values["model"]["dtype"] = first.state["model_config"]["dtype"]
    training, device = values["training"], record.versions.get("device")
    if training["device"] == "auto" and device == "cpu":
        training["device"] = "cpu"
    if training["device"] != "cpu" and device != "cpu" and not torch.cuda.is_available():
        raise MantransError(
            f"device: expected {single_line(str(device or 'a GPU'))}, which the run was recorded "
            "on, got no GPU: another device computes other bits"
        )
    threads = str(record.versions.get("threads"))
    if training["threads"] is None and threads.isdecimal() and len(threads) < 10:
        training["threads"] = int(threads)
    training["tracker"] = None  # nothing is sent again
    training["output_dir"], training["checkpoint_dir"] = str(scratch / "runs"), str(scratch / "all")
    config = Config.from_dict(values, str(record.folder / "versions.json"))
    _require_one_process(record, config.training)
    return config


def _require_one_process(record: Record, training: TrainingConfig) -> None:
    """MantransError if the run had so many processes that one would compute other bits."""
    found = str(record.versions.get("processes"))
    ranks = int(found) if found.isdecimal() and len(found) < 7 else 1
    if reason := dependence(training, max(ranks, 1)):
        raise MantransError(
            f"{record.folder / 'versions.json'}: processes: expected a run that one process can "
            f"compute again, got {ranks}: {reason}"
        )


def _compared(
    again: _Again, record: Record, start: int, steps: int, later: dict[int, Path]
) -> str | None:
    """The first difference; None if every bit is equal."""
    if start + steps > again.total_steps:
        raise MantransError(
            f"--steps: expected at most {again.total_steps - start:,}, since the configuration of "
            f"the checkpoint ends at step {again.total_steps:,}, got {steps:,}"
        )
    with (
        open(again.directory / "metrics.jsonl", "rb") as lines,
        terminal.Progress(steps, "verifying", "step", keep=False) as bar,
    ):
        for step in again.steps(steps):
            ours = [json.loads(line) for line in lines.readlines()]
            difference = _of_metrics(record.metrics.get(step, []), ours)
            if not difference and step in later:
                difference = _of_checkpoint(later[step], again.state())
            if difference:
                return f"step {step}: {difference}"
            bar.update()
    return None


def _of_metrics(recorded: list[dict[str, Any]], ours: list[dict[str, Any]]) -> str | None:
    """The first value of a step's lines that differs."""
    if len(recorded) != len(ours):
        return f"metrics: {len(recorded)} lines recorded, {len(ours)} recomputed"
    for before, now in zip(recorded, ours, strict=True):
        for name in {**now, **before}:
            texts = [
                json.dumps(line[name]) if name in line else "nothing" for line in (before, now)
            ]
            if texts[0] != texts[1]:
                return f"{name}: recorded {single_line(texts[0])}, recomputed {texts[1]}"
    return None


def _of_checkpoint(path: Path, ours: dict[str, Any]) -> str | None:
    """The first element of a tensor, or else the first counter, that differs."""
    with state_file.understood(path):
        theirs = state_file.load(path)
        before, now = (
            plain.flatten({part: state.get(part, {}) for part in _TENSORS})[1]
            for state in (theirs, ours)
        )
        for name in {**now, **before}:
            found = _of_tensor(before.get(name), now.get(name))
            if found:
                return f"{name.removeprefix('parameters.')}{found} ({path.name})"
        counts = [{"optimizer_updates": s["optimizer_updates"]} | s["progress"]
                  for s in (theirs, ours)]  # fmt: skip
        for name, value in counts[1].items():
            was = counts[0].get(name)
            if plain.flatten({name: was}) != plain.flatten({name: value}):
                return f"{name}: recorded {was!r:.60}, recomputed {value!r:.60} ({path.name})"
    return None


def _of_tensor(before: Tensor | None, now: Tensor | None) -> str | None:
    """Where a tensor's bits differ first, and the two values there."""
    if before is None or now is None or (before.dtype, before.shape) != (now.dtype, now.shape):
        kinds = ["nothing" if t is None else f"{t.dtype} {list(t.shape)}" for t in (before, now)]
        return f": recorded {kinds[0]}, recomputed {kinds[1]}"
    values = [tensor.cpu().contiguous().flatten() for tensor in (before, now)]
    bits = [value.view(_BITS[value.element_size()]) for value in values]
    if torch.equal(*bits):
        return None
    place = int((bits[0] != bits[1]).nonzero()[0])
    index = [int(i) for i in torch.unravel_index(torch.tensor(place), before.shape)]
    width = 8 * before.element_size()
    shown = [
        f"{value[place].item()!r} ({int(raw[place]) % 2**width:#0{width // 4 + 2}x})"
        for value, raw in zip(values, bits, strict=True)
    ]
    return f"{index}: recorded {shown[0]}, recomputed {shown[1]}"


def _praise(record: Record, start: int, steps: int, later: dict[int, Path]) -> str:
    """What was compared."""
    lines = sum(len(found) for step, found in record.metrics.items() if 0 < step - start <= steps)
    parts = [f"{lines} line{'s' * (lines != 1)} of metrics"] if lines else []
    parts += [f"all of {', '.join(path.name for path in later.values())}"] if later else []
    without = "" if later else " (no checkpoint lies there: weights were not compared)"
    return f"{steps:,} steps, every bit equal: {' and '.join(parts)}{without}"


def _causes(record: Record, first: Checkpoint, later: dict[int, Path]) -> str:
    """What is not as it was when the run was recorded, and may be why its bits differ."""
    here = versions()
    found = [
        f"{name} {single_line(str(record.versions.get(name)))} on record, {here[name]} here"
        for name in _VERSIONS
        if name in record.versions and record.versions[name] != here[name]
    ]
    now = record.config.to_dict()
    with state_file.understood(first.path):
        changed = [
            change
            for section in ("model", "data", "training")
            for change in changed_settings(first.state["config"], now, section)
            if not change.startswith(PLACES)
        ]
    found += [f"the run was resumed with {', '.join(changed)}"] if changed else []
    if found:
        return f"likely cause: {'; '.join(found)}"
    return (
        "versions, device and threads are those on record: a file was changed, or a processor "
        "computed wrongly"
    )
