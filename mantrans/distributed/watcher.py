"""Ends a run of several processes when one of them fails, dies or hangs, with one message.

A thread of each rank writes a beat to the store every second and looks at the others' beats and at
the key `failed`. Whoever is the first to write that key prints why; all others leave without a
word, even if they wait in an exchange that will never end.

    a rank fails      it writes its error: all leave within two seconds
    a rank has died   its process is gone (seen by those on its machine), or an exchange with it
                      failed and it is silent: seconds
    a rank is silent  its machine is gone, or it was stopped: `timeout` seconds
    a rank hangs      its step takes `timeout` seconds, and ten times as long as any before it

The store is reached by a connection of its own, because one that waits cannot be used.
"""

from __future__ import annotations

import contextlib
import os
import platform
import threading
import time
from collections.abc import Callable
from typing import Literal, NoReturn

import torch.distributed as dist

from mantrans import terminal

ENDED_BY_ANOTHER = 3  # the exit status of a rank that leaves because another one failed
BEAT_SECONDS = 1.0
# After an exchange failed, those who live have shown it by then.
SILENT_SECONDS, BROKEN_SECONDS = 3.5, 6.0
FIRST_SPEAKS_SECONDS = 0.5
FAILED = "failed"
Show = Literal["rank and reason", "reason", "nothing"]


class Watcher(threading.Thread):
    """Watches the other ranks from `start` to `stop`.

    store: a connection that nobody else uses. timeout: see above. last_saved: how the message ends,
    such as "the last checkpoint is …".
    """

    def __init__(self, rank: int, size: int, local_rank: int, store: dist.Store) -> None:
        super().__init__(name="watcher", daemon=True)
        self.rank, self.size, self.store = rank, size, store
        self.local_rank = local_rank
        self.timeout, self.last_saved = 120.0, "no checkpoint is saved"
        self.last_act: Callable[[], None] = lambda: None  # before the process ends
        self.step = StepClock()
        self.main_thread_fails = False
        self.silent = [0.0] * size
        self._beats: list[bytes] = [b""] * size
        self._places: list[str] = []
        self._broken: tuple[float, str] | None = None
        self._ended, self._wake = threading.Event(), threading.Event()
        self.store.set(f"place/{rank}", here())

    def stop(self) -> None:
        """No rank is missed from now on."""
        self._ended.set()
        self._wake.set()
        self.join(5 * BEAT_SECONDS)

    def run(self) -> None:
        number, before = 0, time.monotonic()
        while not self._ended.is_set() and not self.main_thread_fails:
            try:
                self.store.set(f"beat/{self.rank}", str(number))
                now = time.monotonic()
                # If this process was stopped, it has not watched in that time.
                self._look(min(now - before, 2 * BEAT_SECONDS))
            except RuntimeError:
                self._store_is_gone()
            number, before = number + 1, now
            self._wake.wait(0.25 if self._broken else BEAT_SECONDS)

    def exchange_failed(self, reason: str) -> NoReturn:
        """Called by the main thread; the watcher finds out who is missing, and ends the process."""
        self._broken = time.monotonic(), reason
        self._wake.set()
        time.sleep(10 * BROKEN_SECONDS)
        leave(ENDED_BY_ANOTHER)

    def _look(self, passed: float) -> None:
        """One look at the others, `passed` seconds after the last."""
        if self.store.check([FAILED]):
            self._leave()
        if not self._places and not self._all_have_come():
            return  # in the first moment
        beats = self.store.multi_get([f"beat/{rank}" for rank in range(self.size)])
        for rank, (old, new) in enumerate(zip(self._beats, beats, strict=True)):
            self.silent[rank] = (
                0.0 if new != old or rank == self.rank else self.silent[rank] + passed
            )
        self._beats = beats
        for rank in range(self.size):
            if rank != self.rank and not self._is_done(rank) and (why := self._missing(rank)):
                self._report(rank, why)
        if self._broken and time.monotonic() - self._broken[0] > BROKEN_SECONDS:
            self._report(self.rank, f"lost a connection ({self._broken[1]})")
        if seconds := self.step.hangs(self.timeout):
            self._report(self.rank, f"hangs in {self.step.name} since {seconds:.0f} s")

    def _all_have_come(self) -> bool:
        keys = [f"{kind}/{rank}" for rank in range(self.size) for kind in ("beat", "place")]
        if self.store.check(keys):
            places = self.store.multi_get([f"place/{rank}" for rank in range(self.size)])
            self._places = [place.decode() for place in places]
        return bool(self._places)

    def _missing(self, rank: int) -> str:
        """Why a rank counts as missing; "" if it does not."""
        ours, theirs = here().rpartition(" ")[0], (self._places or [""])[rank].rpartition(" ")
        if theirs[0] == ours and not lives(int(theirs[2])):
            return "has died: its process is gone"
        if self._broken and self.silent[rank] > SILENT_SECONDS:
            return "has died: its connection is closed, and it is silent"
        if self.silent[rank] > self.timeout:
            return (
                f"does not answer since {self.silent[rank]:.0f} s "
                f"(training.distributed_timeout: {self.timeout:g})"
            )
        return ""

    def _is_done(self, rank: int) -> bool:
        """Whether it has come to its end (`Ranks.close`), and may be gone."""
        return self.store.check([f"done/1/{rank}"])

    def _report(self, rank: int, why: str) -> NoReturn:
        line = f"rank {rank} {why}; {self.last_saved}"
        mine = f"{self.rank} {line}"
        if self.store.compare_set(FAILED, "", mine).decode() == mine:
            terminal.say(f"error: {line}")
        self._leave()

    def _store_is_gone(self) -> NoReturn:
        if self._ended.is_set():
            raise SystemExit
        # One rank of each machine says so: where rank 0 was, the next.
        if self.local_rank == (0 if self._missing(0) == "" or self.rank != self.local_rank else 1):
            terminal.say(
                "error: rank 0 has died, or torchrun on its machine: its store does not answer; "
                f"{self.last_saved}"
            )
        self._leave()

    def _leave(self) -> NoReturn:
        if self.main_thread_fails:  # which says so, and ends the process with a status of its own
            raise SystemExit
        with contextlib.suppress(Exception):
            self.last_act()
        leave(ENDED_BY_ANOTHER)


class StepClock:
    """How long the main thread has been at a step without a word from it.

    Steps are limited, and of them not the first, which compiles.
    """

    def __init__(self) -> None:
        self.name = ""
        self.longest = 0.0
        self._begun: float | None = None
        self._moved = 0.0

    def begin(self, name: str) -> None:
        self.name = name
        self._begun = self._moved = time.monotonic()

    def move(self, waits: bool = False) -> None:
        """An exchange ends, or with `waits` begins: a rank that waits for others does not hang."""
        self._moved = float("inf") if waits else time.monotonic()

    def end(self) -> None:
        """The step is over; what follows may take its time."""
        if self._begun is not None:
            self.longest = max(self.longest, time.monotonic() - self._begun)
        self._begun = None

    def hangs(self, timeout: float) -> float:
        """Seconds without a move, if these are too many, else 0."""
        if self._begun is None or not self.longest:
            return 0.0
        still = time.monotonic() - self._moved
        return still if still > max(timeout, 10 * self.longest) else 0.0


def fail(
    rank: int, store: dist.Store, reason: str, status: int, show: Show = "rank and reason"
) -> NoReturn:
    """End this rank with `status` because of an error of its own, and with it all others.

    An error that all have in common is told once, by rank 0: the others give it a moment. show:
    "nothing" if it is on the screen already.
    """
    first, mine = "", f"{rank} {reason}"
    with contextlib.suppress(RuntimeError):  # the store is gone
        deadline = time.monotonic() + (FIRST_SPEAKS_SECONDS if rank else 0)
        while time.monotonic() < deadline and not store.check([FAILED]):
            time.sleep(0.02)
        first = store.compare_set(FAILED, "", mine).decode()
    if show != "nothing" and (first == mine or first.partition(" ")[2] != reason):
        terminal.say(f"error: rank {rank}: {reason}" if show != "reason" else f"error: {reason}")
    leave(status)


def leave(status: int) -> NoReturn:
    """End the process at once, whatever its main thread waits for."""
    os._exit(status)


def here() -> str:
    """This process: its machine, the process numbers' namespace, and its number."""
    namespace = ""
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{platform.node()} {namespace} {os.getpid()}"


def lives(process: int) -> bool:
    """Whether a process of this machine exists and has not ended."""
    try:
        os.kill(process, 0)
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except ProcessLookupError:
        return False
    except OSError:  # another user's, or a system without /proc
        return True
