"""The records of a run, in its folder `runs/<experiment>/`.

    metrics.jsonl    losses, learning rates, norms: they depend only on configuration and seed, so
                     a resumed run has the same bytes as an uninterrupted one
    timings.jsonl    tokens per second, TFLOP/s, share of the device's peak: values that vary from
                     run to run
    tensorboard/     the same as TensorBoard event files, where tensorboard is installed
    tracker.json     the run's name in training.tracker, if there is one
    config.yaml      the configuration with every default written out
    versions.json    of Python, the libraries and this project, and the machine

Call `log` before the checkpoint of the same step is saved, so that the records include its steps.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from mantrans.checkpoint.atomic import replacing, write_all
from mantrans.config import Config, strict_yaml
from mantrans.errors import MantransError
from mantrans.records import JsonLines
from mantrans.training import tracker
from mantrans.training.console import Console

_PACKAGES = ("torch", "triton", "numpy", "tokenizers", "mantrans")


class RunLogger:
    """Writes a run's records and shows its progress.

    Args:
        directory: the run's folder; created if needed.
        resume_step: the step of the checkpoint that the run resumes from: later records are
            dropped. None starts new records.
        config: written out as config.yaml, if given.
        total_steps: where the progress bar ends.
        processes: that train together, for versions.json.
        tensorboard: write event files too, if tensorboard is installed.
        quiet: show nothing.
        stream: where to show progress; standard error if None.

    Raises:
        MantransError: the folder cannot be written.
    """

    def __init__(
        self,
        directory: str | Path,
        resume_step: int | None = None,
        *,
        config: Config | None = None,
        total_steps: int | None = None,
        processes: int = 1,
        tensorboard: bool = True,
        quiet: bool = False,
        stream: TextIO | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.console = Console(total_steps, resume_step or 0, quiet=quiet, stream=stream)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if config is not None:
                with replacing(self.directory / "config.yaml") as file:
                    write_all(file, strict_yaml.dump(config.to_dict()).encode())
            with replacing(self.directory / "versions.json") as file:
                found = versions() | {"processes": str(processes)}
                write_all(file, json.dumps(found, indent=2).encode() + b"\n")
        except OSError as error:
            raise MantransError(f"{self.directory}: cannot be written ({error.strerror})") from None
        self._metrics = JsonLines(self.directory / "metrics.jsonl", resume_step)
        self._timings = JsonLines(self.directory / "timings.jsonl", resume_step)
        self._said: set[str] = set()
        self._tracker: tracker.Tracker | None = None
        if config is not None:
            self._tracker = tracker.start(
                config, self.directory, resume_step is not None, self.message
            )
        self._events: Any = None
        if tensorboard:
            self._events = _event_writer(self.directory / "tensorboard", resume_step)
            if self._events is None:
                self.say_once("tensorboard is not installed: metrics go to metrics.jsonl only")

    def log(self, step: int, **scalars: Any) -> None:
        """Record values that follow from configuration and seed: losses, rates, norms, samples."""
        self._write(self._metrics, step, scalars)

    def log_timing(self, step: int, **scalars: Any) -> None:
        """Record values that vary from run to run; None for a value that is not known."""
        self._write(self._timings, step, scalars)

    def progress(self, step: int) -> None:
        """Move the progress bar to `step`."""
        self.console.update(step)

    def show(self, step: int, **scalars: Any) -> None:
        """Show values beside the bar, or as a line without a terminal."""
        self.console.show(step, scalars)

    def message(self, text: str) -> None:
        """Show a line of text."""
        self.console.message(text)

    def say_once(self, text: str) -> None:
        """Show a line of text, the first time only."""
        if text not in self._said:
            self._said.add(text)
            self.console.message(text)

    def sync(self) -> None:
        """Flush the records to the disk; call it before a checkpoint is saved."""
        self._metrics.sync()
        self._timings.sync()
        self._to_events("flush")

    def close(self) -> None:
        """Close the files and the bar."""
        self.console.close()
        self._metrics.close()
        self._timings.close()
        self._to_events("close")
        if self._tracker is not None:
            self._tracker.close()

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _write(self, lines: JsonLines, step: int, scalars: dict[str, Any]) -> None:
        had_trouble = lines.trouble
        lines.append({"step": step, **scalars})
        if lines.trouble and not had_trouble:
            self.message(f"warning: {lines.trouble}; the records wait in memory")
        for name, value in numbers(scalars):
            self._to_events("add_scalar", name, value, step)
        if self._tracker is not None:
            self._tracker.log(step, dict(numbers(scalars)))

    def _to_events(self, method: str, *arguments: Any) -> None:
        """Call the writer; if the disk fails, the event file ends and the run continues."""
        if self._events is not None:
            try:
                getattr(self._events, method)(*arguments)
            except OSError:
                self._events = None


def numbers(scalars: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """(name, number) of all that are numbers; those of a dict under "name/key"."""
    for name, value in scalars.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{key}", number) for key, number in numbers(value))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, value


def _event_writer(directory: Path, resume_step: int | None) -> Any:
    """TensorBoard's writer, or None. It discards what earlier files say about later steps."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    try:
        return SummaryWriter(
            str(directory), purge_step=0 if resume_step is None else resume_step + 1
        )
    except OSError as error:
        raise MantransError(f"{directory}: cannot be written ({error.strerror})") from None


def versions() -> dict[str, str | None]:
    """Return what is needed to repeat a run: versions, commit, machine."""
    import torch

    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    found["torch"] = torch.__version__
    found["cuda"] = torch.version.cuda
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    found["threads"] = str(torch.get_num_threads())
    found["machine"] = f"{platform.system()} {platform.machine()}"
    found["command"] = " ".join(sys.argv)
    found["git_commit"] = git_commit()
    return found


def git_commit() -> str | None:
    """Return the commit this code is at, "+changes" if edited since; None outside a repository."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return result.stdout.strip()

    try:
        # If mantrans is installed inside another repository, that commit is not this code's.
        if Path(git("rev-parse", "--show-toplevel")) != root:
            return None
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
