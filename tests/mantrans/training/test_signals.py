"""Signals that stop a run: which are caught, and what a second one means."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mantrans.training.signals import STOPPING, StopSignals

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("number", STOPPING)
def test_signal_second_same(number: int) -> None:
    """It ends at once."""
    before = signal.getsignal(number)
    signals = StopSignals()
    with pytest.raises(KeyboardInterrupt) as stop, signals.caught():
        os.kill(os.getpid(), number)
        assert signals.first == number
        os.kill(os.getpid(), number)
    assert stop.value.args == (number,)
    assert signal.getsignal(number) is before


def test_signal_second_other() -> None:
    """It does not end at once, but Ctrl-C does."""
    signals = StopSignals()
    with pytest.raises(KeyboardInterrupt), signals.caught():
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        assert signals.first == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.promise("signals")
@pytest.mark.parametrize("number", STOPPING)
def test_signal_ignored(number: int) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        signals = StopSignals()
        with signals.caught():
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
        assert signals.first is None
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


@pytest.mark.promise("signals")
def test_signal_terminal_closed(tmp_path: Path) -> None:
    """A process in a terminal of its own: the system sends one SIGHUP when the terminal is closed,
    the test the other, as a shell does. The work after the first goes on."""
    program = f"""
import os, pty, signal, time
pid, terminal = pty.fork()
if pid == 0:
    from mantrans.training.signals import StopSignals
    signals = StopSignals()
    with signals.caught():
        os.write(1, b"ready")
        while signals.first is None:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.02)
        open({str(tmp_path / "saved")!r}, "w").close()
    os._exit(0)
while b"ready" not in os.read(terminal, 1000):
    pass
os.close(terminal)
os.waitpid(pid, 0)
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
    assert (tmp_path / "saved").exists()
