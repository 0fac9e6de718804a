"""A run's numbers in trackio or Weights & Biases too: all that RunLogger records.

The library works in a process of its own: whatever it does, and however long it takes, training
does not wait for it. If it fails, one line says so and training goes on. What it cannot take in
time is lost there, never in metrics.jsonl.

A resumed run continues the run in the tracker, whose number is in the run's folder. Steps that it
repeats are sent again, with the same numbers.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any, cast

from mantrans.checkpoint.atomic import open_regular, replacing, write_all
from mantrans.config import Config
from mantrans.errors import single_line

MOST_WAITING = 10_000  # records
SECONDS_TO_CLOSE = 30.0  # at the end of a run, for what still waits


class Tracker:
    """Passes numbers on to `tracker_process`, which a thread feeds.

    about: the keywords of `tracker_process.begin`. say: shows the user a line; it is called by
    whoever calls `log`.
    """

    def __init__(self, about: dict[str, Any], say: Callable[[str], None]) -> None:
        self.name, self._say = about["library"], say
        self._records: queue.Queue[Any] = queue.Queue(MOST_WAITING)
        self._failure = ""
        self._is_dead = False
        self._records.put(about)
        path = os.pathsep.join(entry for entry in sys.path if entry)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mantrans.training.tracker_process"],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for the run
        )
        self._thread = threading.Thread(target=self._feed, name="tracker", daemon=True)
        self._thread.start()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Send the numbers of a step, soon."""
        if self._lives():
            try:
                self._records.put_nowait([step, values])
            except queue.Full:
                self._end(f"{MOST_WAITING:,} records wait for it")

    def close(self) -> None:
        """Send what waits, and end the run there, within SECONDS_TO_CLOSE."""
        if self._lives():
            with contextlib.suppress(queue.Full):
                self._records.put_nowait(None)
            self._thread.join(SECONDS_TO_CLOSE)
            if self._lives() and self._thread.is_alive():
                self._end(f"it did not end within {SECONDS_TO_CLOSE:g} s")

    def _lives(self) -> bool:
        if self._failure:
            self._end(self._failure)
        return not self._is_dead

    def _end(self, reason: str) -> None:
        """Say once why nothing more is sent; end the process, and what the library has started."""
        if not self._is_dead:
            self._is_dead = True
            self._say(
                f"warning: {self.name}: {reason}; what is measured goes to metrics.jsonl only"
            )
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _feed(self) -> None:
        """Write what is logged to the process, until None; then see how it ends."""
        process = self._process
        assert process.stdin and process.stdout
        stdin = cast(FileIO, process.stdin)  # bufsize=0
        with contextlib.suppress(OSError):  # it has ended, and says why
            while (record := self._records.get()) is not None:
                write_all(stdin, json.dumps(record).encode() + b"\n")
            stdin.close()
        if why := process.stdout.read():
            self._failure = single_line(why.decode(errors="replace"))
        if status := process.wait():
            self._failure = self._failure or f"its process has ended with status {status}"


def start(
    config: Config, folder: Path, resumes: bool, say: Callable[[str], None]
) -> Tracker | None:
    """The tracker of training.tracker; None for none, or after a line if it cannot be started.

    folder: the run's, with the number that the run has in the tracker. resumes: take it from there.
    """
    library, training = config.training.tracker, config.training
    if library is None:
        return None
    found = importlib.util.find_spec(library)
    if found is None or found.origin is None:  # a folder of that name is no library
        say(
            f"training.tracker: {library} is not installed (pip install {library}): nothing is sent"
        )
        return None
    about = {
        "library": library,
        "folder": str(folder.resolve()),
        "name": training.experiment_name,
        "number": _number_of(folder / "tracker.json", resumes),
        "project": training.tracker_project or "mantrans",
        "config": config.to_dict(),
    }
    try:
        return Tracker(about, say)
    except OSError as error:
        say(f"warning: {library}: no process can be started ({error.strerror}): nothing is sent")
        return None


def _number_of(path: Path, resumes: bool) -> str:
    """What tells the run from others of its name: of a resumed one the same, from the file."""
    if resumes:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            with open_regular(path) as file:
                number = json.loads(file.read())["number"]
            if isinstance(number, str) and number.isalnum() and len(number) <= 32:
                return number
    number = secrets.token_hex(6)
    with contextlib.suppress(OSError), replacing(path) as file:
        write_all(file, json.dumps({"number": number}).encode() + b"\n")
    return number
