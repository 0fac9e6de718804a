"""Starts real training processes in a hundredth of a second: a process that has imported everything
forks for each of them.

`python -m tests.support.nursery` is that process; `Nursery` speaks to it, one JSON line each
way (start → pid, wait → exit status). A child is a process like any other: it has its own signals,
limits, files and end, and can be killed at any moment.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NOBODY = 65534
PRELOADED = (
    "mantrans.training.trainer",
    "tests.end_to_end.sampled",
    "encodings.utf_8_sig",  # a child that is nobody may not be able to read it
    "mantrans.cli",
    "mantrans.evaluation.checkpoint",
    "tensorboard.summary.writer.event_file_writer",
    "tensorboard.compat.proto.event_pb2",
    "tensorboard.compat.proto.summary_pb2",
)


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


TRAIN, EVALUATE = "mantrans.cli:main train", "mantrans.cli:main evaluate"


class Child:
    """A process that the nursery started."""

    def __init__(self, nursery: Nursery, pid: int, output: Path) -> None:
        self.nursery, self.pid, self.output = nursery, pid, output

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal. The pid stays the child's until `wait`."""
        os.kill(self.pid, number)

    def said(self) -> str:
        """What it has printed so far."""
        return self.output.read_text(encoding="utf-8", errors="replace")

    def wait(self, timeout: float = 120.0) -> Ended:
        """Wait until it has ended; after `timeout` seconds it is killed."""
        watchdog = threading.Timer(timeout, self.kill)
        watchdog.start()
        try:
            status = self.nursery.ask({"wait": self.pid})["status"]
        finally:
            watchdog.cancel()
        return Ended(status, self.said())

    def wait_for(self, text: str, timeout: float = 60.0) -> None:
        """Return as soon as it has printed `text`."""
        deadline = time.monotonic() + timeout
        while text not in self.said():
            assert time.monotonic() < deadline, f"{text!r} was not printed"
            time.sleep(0.005)


class Nursery:
    """The forking process, from here."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, 0
        environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        command = [sys.executable, "-m", "tests.support.nursery"]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

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
        """Start `main`, module:function and its first arguments; limits: of `resource`, by name.

        streams: where standard output (1) or error (2) goes instead of the child's output: a path,
        "gone" (a pipe that nobody reads) or "closed".
        """
        self.started += 1
        output = self.folder / f"output_{self.started}.txt"
        answer = self.ask(
            {
                "arguments": [*main.split(), *arguments],
                "cwd": str(cwd),
                "environment": environment or {},
                "limits": limits or {},
                "as_nobody": as_nobody,
                "output": str(output),
                "streams": streams or {},
            }
        )
        return Child(self, answer["pid"], output)

    def run(self, *arguments: str, **keywords: Any) -> Ended:
        """Start and wait."""
        return self.start(*arguments, **keywords).wait()

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate(timeout=60)


def serve() -> None:
    """The forking process itself."""
    for module in PRELOADED:
        with contextlib.suppress(ImportError):  # tensorboard is optional
            importlib.import_module(module)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            _, status = os.waitpid(question["wait"], 0)
            answer = {"status": os.waitstatus_to_exitcode(status)}
        else:
            Path(question["output"]).touch(0o666)
            pid = os.fork()
            if pid == 0:
                _be_born(question)
            answer = {"pid": pid}
        print(json.dumps(answer), file=answers, flush=True)


def _be_born(question: dict[str, Any]) -> None:
    """In the child: put everything in place, run, and end without returning."""
    null, output = os.open(os.devnull, os.O_RDONLY), os.open(question["output"], os.O_WRONLY)
    os.dup2(null, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for number, what in question["streams"].items():
        _redirect(int(number), what)
    os.chdir(question["cwd"])
    os.environ.update(question["environment"])
    for name, value in question["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    if question["as_nobody"]:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    sys.argv = question["arguments"]
    os._exit(_status(sys.argv[0]))


def _redirect(number: int, what: str) -> None:
    """Another standard output or error: see `Nursery.start`."""
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
    """Run the function as the interpreter would run a program; its exit status."""
    module, _, function = main.partition(":")
    try:
        status = getattr(importlib.import_module(module), function)()
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


if __name__ == "__main__":
    serve()
