"""Everything that a command shows. Output that cannot be written is lost; the run goes on.

    say        a line on standard error: progress, notes, warnings, errors
    show       a command's result, on standard output
    Progress   a bar in a terminal, now and then a plain line everywhere else

No other file writes to the console. A log's full disk, `| head`, a closed terminal or a closed
stream (`2>&-`) can fail any write at any time: on standard error such a failure is ignored. On
standard output it ends a command whose purpose is that output, and is ignored during training.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any, TextIO, TypeVar

SECONDS_BETWEEN_LINES = 5.0
Item = TypeVar("Item")


class Lossy:
    """A text stream whose writes cannot fail: what the system refuses is dropped."""

    def __init__(self, stream: Any) -> None:
        """stream: a text stream, or None for one that was closed: all is dropped."""
        self._stream: TextIO | None = stream._stream if isinstance(stream, Lossy) else stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
            if self._stream is not None:
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            if self._stream is not None:
                self._stream.flush()

    def isatty(self) -> bool:
        with contextlib.suppress(ValueError):
            return self._stream is not None and self._stream.isatty()
        return False

    def __getattr__(self, name: str) -> Any:
        """The rest of a stream, such as `fileno` and `encoding`."""
        return getattr(self._stream, name)


@contextlib.contextmanager
def lossy(*names: str) -> Iterator[None]:
    """Make sys.stdout, sys.stderr or both, by these names, `Lossy` during the `with` statement."""
    before = {name: getattr(sys, name) for name in names}
    for name, stream in before.items():
        setattr(sys, name, Lossy(stream))
    try:
        yield
    finally:
        for name, stream in before.items():
            Lossy(stream).flush()
            setattr(sys, name, stream)


def reserve_standard_streams() -> None:
    """Open the null device in place of each standard stream that is closed (`2>&-`).

    Otherwise the next file that is opened, a checkpoint for one, would have its number, and what
    a library writes to standard error would land in it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number: this one


def escape_what_encodings_lack() -> None:
    """Print a character that a stream's encoding lacks as \\u2192, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # it flushes, which can fail as any write
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")


def discard_unwritten() -> None:
    """Drop what a failed write left in the buffers, which Python would report again at its exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(text: str, stream: Any = None) -> None:
    """A line on `stream`, by default standard error."""
    out = Lossy(stream or sys.stderr)
    out.write(text + "\n")
    out.flush()


def show(text: str, end: str = "\n") -> None:
    """A command's result, at once on standard output. Raises OSError if it cannot be written."""
    print(text, end=end, flush=True)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: `0:02:05`."""
    return str(timedelta(seconds=round(seconds)))


class Progress:
    """Progress from `first` to `total` (None: not known): a bar if `stream` is a terminal.

    Elsewhere no bar: with `title`, a plain line every SECONDS_BETWEEN_LINES and, with `keep`, at
    the end. stream: by default standard error. quiet: nothing at all. keep: the bar stays.
    """

    def __init__(
        self,
        total: int | None,
        title: str = "",
        unit: str = "it",
        *,
        first: int = 0,
        keep: bool = True,
        quiet: bool = False,
        stream: TextIO | None = None,
    ) -> None:
        self.stream = Lossy(stream or sys.stderr)
        self.total, self.title, self.unit = total, title, unit
        self.first = self.done = first
        self.plain = bool(title) and not quiet and not self.stream.isatty()
        self.quiet, self.keep = quiet, keep
        self.bar: Any = None
        self._begun = self._said = time.monotonic()
        if not quiet and self.stream.isatty():
            from tqdm import tqdm

            self.bar = tqdm(
                desc=title or None, total=total, initial=first, file=self.stream, unit=unit,
                unit_scale=unit == "B", dynamic_ncols=True, leave=keep,
            )  # fmt: skip

    def update(self, n: int = 1) -> None:
        """`n` more are done."""
        self.done += n
        if self.bar is not None:
            self.bar.update(n)
        elif self.plain and time.monotonic() - self._said >= SECONDS_BETWEEN_LINES:
            self._say_line()

    def message(self, text: str) -> None:
        """A separate line, above the bar if there is one."""
        if self.quiet:
            return
        if self.bar is not None:
            self.bar.write(text, file=self.stream)
        else:
            say(text, self.stream)

    def close(self) -> None:
        """Stop the bar where it is; plain lines follow."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        elif self.plain and self.keep:
            self._say_line()
        self.plain = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *failure: object) -> None:
        self.keep = self.keep and kind is None  # after a failure its message is the last line
        self.close()

    def _say_line(self) -> None:
        from tqdm import tqdm

        self._said = time.monotonic()
        line = tqdm.format_meter(
            self.done, self.total or 0, self._said - self._begun, ncols=0, prefix=self.title,
            unit=self.unit, unit_scale=self.unit == "B", initial=self.first,
        )  # fmt: skip
        say(line, self.stream)


def watched(items: Iterable[Item], total: int, title: str, unit: str) -> Iterator[Item]:
    """The items, with a `Progress` that is gone when they end."""
    with Progress(total, title, unit, keep=False) as progress:
        for item in items:
            yield item
            progress.update()
