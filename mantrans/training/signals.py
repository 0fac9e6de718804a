"""Signals that end a run after its step, with everything saved.

SIGTERM, SIGINT (Ctrl-C), SIGHUP (the terminal was closed) and SIGUSR1 (a cluster's warning before
its time limit). One that is ignored when the run starts, as SIGHUP is under nohup, stays ignored.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class StopSignals:
    """Which signal asked to stop: `first`, None until one has come.

    The second of its kind, or Ctrl-C after any other, raises KeyboardInterrupt(number) at once. A
    second kind does not: at a logout systemd sends SIGTERM and SIGHUP together.
    """

    def __init__(self) -> None:
        self.first: int | None = None
        self._seen: set[int] = set()
        self._terminal = _has_terminal()

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Listen during the `with` statement; the earlier handlers are restored after it."""
        before = {
            number: signal.signal(number, self._note)
            for number in STOPPING
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = number in self._seen or (number == signal.SIGINT and self.first is not None)
        if again and not self._is_echo(number):
            raise KeyboardInterrupt(number)
        self._seen.add(number)
        self.first = number if self.first is None else self.first

    def _is_echo(self, number: int) -> bool:
        """A closed terminal hangs up twice: its shell does, and the system when the shell ends."""
        return number == signal.SIGHUP and self._terminal and not _has_terminal()


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True
