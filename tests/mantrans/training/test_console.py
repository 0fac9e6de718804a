"""The console: one place writes to it, plain lines where there is no terminal, pipes that end."""

from __future__ import annotations

import ast
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mantrans import terminal
from mantrans.terminal import Lossy, Progress, watched

ROOT = Path(__file__).parents[3]


class Broken(io.StringIO):
    """A stream on which every use fails."""

    def __init__(self, failure: Exception) -> None:
        super().__init__()
        self.failure = failure

    def write(self, text: str) -> int:
        raise self.failure

    def flush(self) -> None:
        raise self.failure


@pytest.mark.parametrize(
    "failure", [OSError(28, "full"), BrokenPipeError(), BlockingIOError(), ValueError("closed")]
)
def test_say_failing_stream(failure: Exception) -> None:
    """Nobody fails with it."""
    stream = Broken(failure)
    terminal.say("text", stream)
    with Progress(3, "counting", stream=stream) as progress:
        progress.update()
        progress.message("text")
    terminal.say("text", Lossy(Lossy(stream)))
    with terminal.lossy("stderr"):
        sys.stderr.write("text")


def test_say_room_again(tmp_path: Path) -> None:
    """What could not be written is lost or comes later; what can be is not."""
    stream = io.StringIO()
    lossy = Lossy(stream)
    real = stream.write
    stream.write = Broken(OSError(28, "full")).write  # type: ignore[method-assign]
    terminal.say("lost", lossy)
    stream.write = real  # type: ignore[method-assign]
    terminal.say("seen", lossy)
    assert stream.getvalue() == "seen\n"


def test_progress_without_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are plain lines."""
    now = 100.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    stream = io.StringIO()
    with Progress(1000, "tokenizing text", "B", stream=stream) as progress:
        for _ in range(10):
            now += 1.0
            progress.update(100)
    lines = stream.getvalue().split("\n")
    assert len(lines) == 4 and "\r" not in stream.getvalue()
    assert lines[0].startswith("tokenizing text:  50% 500/1.00k [00:05<00:05")
    assert lines[1].startswith("tokenizing text: 100% 1.00k/1.00k [00:10<00:00")
    assert lines[2] == lines[1] and lines[3] == ""


def test_progress_quick_or_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    """It says nothing."""
    assert list(watched("abc", 3, "reading", "letter")) == ["a", "b", "c"]
    with Progress(None, "counting", quiet=True) as progress:
        progress.message("text")
    assert capfd.readouterr() == ("", "")


def test_console_one_file() -> None:
    """Use `say`, `show` and `Progress` of mantrans.terminal: they survive output that is lost."""
    found = []
    for path in (ROOT / "mantrans").rglob("*.py"):
        if path.name == "terminal.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "tqdm"):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
            if isinstance(node, ast.Attribute) and ast.unparse(node) in (
                "sys.stdout.write", "sys.stderr.write",
            ):  # fmt: skip
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == [], "these write to the console past mantrans.terminal"


@pytest.mark.promise("lost output")
def test_streams_closed(tmp_path: Path) -> None:
    """Files do not take their numbers."""
    program = (
        "import os; from mantrans import terminal\n"
        "terminal.reserve_standard_streams(); terminal.say('lost'); terminal.show('lost')\n"
        f"number = os.open({str(tmp_path / 'file')!r}, os.O_WRONLY | os.O_CREAT)\n"
        "assert number > 2, number\n"
        "os.write(2, b'lost'); os.write(1, b'lost')"
    )
    command = [sys.executable, "-c", program]
    closed = 'exec "$@" <&- >&- 2>&-'
    done = subprocess.run(["sh", "-c", closed, "sh", *command], cwd=ROOT, check=False)
    assert done.returncode == 0
    assert (tmp_path / "file").read_bytes() == b""


@pytest.mark.promise("lost output")
@pytest.mark.parametrize(
    "arguments",
    ["summary configs/quickstart.yaml", "--help", "train --help"],
)
def test_command_reader_gone(arguments: str) -> None:
    """As a real process: Python itself writes what is left when it ends, and complains."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "mantrans", *arguments.split()],
        cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(writing)
    assert done.stderr == "" and done.returncode in (0, 141)
