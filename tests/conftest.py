"""Interprets Triton's kernels or compiles them, and shows how long each folder of tests took.

A process does one or the other. A run interprets, on the CPU, unless every path it is given lies in
a folder of COMPILED. Those folders are left out of an interpreted run: `make test` starts a second
process for them.
"""

from __future__ import annotations

import gc
import os
import signal
from collections import Counter
from pathlib import Path

import pytest

from tests.support import interpreter, promises

ROOT = Path(__file__).parents[1]
COMPILED = [ROOT / "tests" / name for name in ("gate", "gpu")]
INTERPRETED = pytest.StashKey[bool]()


def is_compiled(path: Path) -> bool:
    return any(folder == path or folder in path.parents for folder in COMPILED)


def hear_signals() -> None:
    """A run that a shell started in the background, or under nohup, has its signals ignored, and
    so would have the runs that tests start and signal."""
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    for number, handler in defaults.items():
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


def pytest_configure(config: pytest.Config) -> None:
    gc.disable()  # until all is collected: it would search six thousand cases again and again
    hear_signals()
    paths = [config.invocation_params.dir / name.partition("::")[0] for name in config.args]
    compiled = [is_compiled(path.resolve()) for path in paths]
    if all(compiled):
        return
    if any(compiled):
        raise pytest.UsageError("tests/gate and tests/gpu compile, the rest interprets: run twice")
    config.stash[INTERPRETED] = True
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU beside interpreted kernels proves neither
    try:
        interpreter.start()
    except RuntimeError as too_late:
        raise pytest.UsageError(str(too_late)) from None


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if INTERPRETED in config.stash and is_compiled(collection_path) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        promises.attach(item)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    gc.enable()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


def pytest_report_header(config: pytest.Config) -> str:
    if INTERPRETED in config.stash:
        return "triton: interpreted; what compiles is run by `pytest tests/gate tests/gpu`"
    return "triton: compiled"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Seconds of all cases and fixtures of a folder. An issue may add 40 to `make test`."""
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in (r for r in reports if isinstance(r, pytest.TestReport)):
            seconds[str(Path(report.nodeid.partition("::")[0]).parent)] += report.duration
    if len(seconds) > 1:
        terminalreporter.section("seconds a folder")
        for folder in sorted(seconds):
            terminalreporter.write_line(f"{seconds[folder]:8.1f}  {folder}")
        terminalreporter.write_line(f"{seconds.total():8.1f}  together")
