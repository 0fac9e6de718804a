"""Starts real training processes in a hundredth of a second: multiprocessing's fork server has
imported everything, and forks for each of them.

A child is a process like any other: it has its own signals, limits, files and end, and can be
killed at any moment.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import resource
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

ROOT = Path(__file__).parents[2]
NOBODY = 65534
PRELOADED = [
    "__main__",  # else every child runs the script `pytest`, if it was that
    "mantrans.training.trainer",
    "tests.end_to_end.sampled",
    "tests.support.broken_rank",
    "encodings.utf_8_sig",  # a child that is nobody may not be able to read it
    "mantrans.cli",
    "tests.support.warm",
    "torch.utils.tensorboard",
]
TRAIN, EVALUATE = "mantrans.cli:main train", "mantrans.cli:main evaluate"


@dataclass(frozen=True)
class Ended:
    """How a process ended: its status (negative: the signal) and all that it printed."""

    status: int
    text: str

    @property
    def is_one_line_error(self) -> bool:
        """Refused as a user's mistake is: status 2, and one line at the end that says why."""
        last = self.text.splitlines()[-1:]
        return self.status == 2 and "Traceback" not in self.text and last[0].startswith("error: ")


class Patience:
    """Ends when a process has used so many seconds of CPU, or for a minute none: a machine that is
    busy with other work makes nothing fail."""

    IDLE = 60.0

    def __init__(self, pid: int, cpu_seconds: float) -> None:
        self.pid, self.cpu_seconds = pid, cpu_seconds
        self.used, self.since = -1.0, time.monotonic()

    def is_over(self) -> bool:
        try:
            times = psutil.Process(self.pid).cpu_times()
        except psutil.NoSuchProcess:
            times = None  # it has ended, or is about to be waited for
        used = times.user + times.system if times else self.used
        if used > self.used:
            self.used, self.since = used, time.monotonic()
        return used > self.cpu_seconds or time.monotonic() - self.since > self.IDLE


class Child:
    """A process, and the file that holds its output."""

    def __init__(self, process: BaseProcess, output: Path) -> None:
        self.process, self.output = process, output
        process.start()
        assert process.pid is not None
        self.pid = process.pid

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal, unless it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def said(self) -> str:
        """What it has printed so far."""
        return self.output.read_text(encoding="utf-8", errors="replace")

    def wait(self, cpu_seconds: float = 60.0) -> Ended:
        """Wait until it has ended; it is killed if it hangs or uses more seconds of CPU."""
        patience = Patience(self.pid, cpu_seconds)
        while self.process.exitcode is None:
            self.process.join(0.5)
            if patience.is_over():
                self.process.kill()
        return Ended(self.process.exitcode, self.said())

    def wait_for(self, *texts: str) -> None:
        """Return as soon as it has printed one of the texts."""
        self.wait_until(lambda: any(text in self.said() for text in texts))

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Return as soon as the condition holds."""
        patience = Patience(self.pid, 60.0)
        while not condition():
            assert not patience.is_over(), self.said()
            time.sleep(0.005)


def start_fork_server() -> None:
    """Start it, unless it runs."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    environment = {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    with mock.patch.dict(os.environ, environment):
        forkserver.ensure_running()


class Processes:
    """Starts them; the fork server is started with the first."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, 0
        self.children: list[Child] = []
        self.context = multiprocessing.get_context("forkserver")
        start_fork_server()

    def start(
        self,
        *arguments: str,
        cwd: Path,
        main: str = TRAIN,
        environment: dict[str, str] | None = None,
        limits: dict[str, int] | None = None,
        as_nobody: bool = False,
        streams: dict[int, str] | None = None,
    ) -> Child:
        """Start `main`, module:function or a script, and its first arguments; limits: of
        `resource`, by name.

        streams: where standard output (1) or error (2) goes instead of the child's output: a path,
        "gone" (a pipe that nobody reads) or "closed".
        """
        self.started += 1
        output = self.folder / f"output_{self.started}.txt"
        output.touch(0o666)
        process = self.context.Process(
            target=_run,
            args=(
                [*main.split(), *arguments], str(cwd), environment or {}, limits or {}, as_nobody,
                str(output), streams or {},
            ),
        )  # fmt: skip
        self.children.append(Child(process, output))
        return self.children[-1]

    def close(self) -> None:
        """Kill those that a failed test left: pytest would wait for them."""
        for child in self.children:
            child.process.kill()

    def run(self, *arguments: str, **keywords: Any) -> Ended:
        """Start and wait."""
        return self.start(*arguments, **keywords).wait()


def _run(
    arguments: list[str],
    cwd: str,
    environment: dict[str, str],
    limits: dict[str, int],
    as_nobody: bool,
    output: str,
    streams: dict[int, str],
) -> None:
    """In the child: put everything in place, run, and end without returning."""
    writing = os.open(output, os.O_WRONLY)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(writing, 1)
    os.dup2(writing, 2)
    for number, what in streams.items():
        _redirect(number, what)
    os.chdir(cwd)
    os.environ.update(environment)
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))
    if as_nobody:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    sys.argv = arguments
    os._exit(_status(arguments[0]))


def _redirect(number: int, what: str) -> None:
    """Another standard output or error: see `Processes.start`."""
    if what == "closed":  # and Python, started so, has no stream
        os.close(number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)
    elif what == "gone":
        reading, writing = os.pipe()
        os.dup2(writing, number)
        os.close(reading)
        os.close(writing)
    else:
        os.dup2(os.open(what, os.O_WRONLY | os.O_NOCTTY), number)


def _status(main: str) -> int:
    """Run the function or script as the interpreter would run a program; its exit status."""
    module, _, function = main.partition(":")
    try:
        if function:
            status = getattr(importlib.import_module(module), function)()
        else:
            runpy.run_path(main, run_name="__main__")
            status = 0
    except SystemExit as wanted:
        status = wanted.code
    except BaseException:
        traceback.print_exc()
        status = 1
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            status = 120  # the interpreter's, for output that it could not write at its exit
    return status if isinstance(status, int) else 0
