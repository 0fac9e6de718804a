"""Writes docs/reliability.md: every promise, the tests that prove it, and what they counted.

    python -m tests.end_to_end.report            run all of it, then write (make test-reliability)
    python -m tests.end_to_end.report a.xml b.xml  write from runs that are over

The results are pytest's own JUnit XML; a test adds a figure with `record_property(name, value)`.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import torch

from tests.end_to_end.promises import PROMISES, Promise

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
INTRODUCTION = """\
# What is promised when things go wrong, and the proof

Training takes days; in that time processes are killed, disks fill up, files rot, and people
mistype. This page says what then happens. It was written by the run of the suite that proves it:
`make test-reliability` runs every test named here in its long form and writes the page anew; `make
test` runs the short form. A figure is what the tests counted in that run, cases and figures of all
forms of a test together.

"""


@dataclass
class Result:
    """What the cases of one test function came to."""

    cases: int = 0
    failed: int = 0
    skipped: list[str] = field(default_factory=list)
    figures: dict[str, str] = field(default_factory=dict)

    def add(self, case: ElementTree.Element) -> None:
        self.cases += 1
        self.failed += case.find("failure") is not None or case.find("error") is not None
        skipped = case.find("skipped")
        if skipped is not None:
            self.skipped.append(skipped.get("message", ""))
        for item in case.iter("property"):
            name, value = item.get("name", ""), item.get("value", "")
            if value.isdigit():  # counts add up; of anything else the last stands
                value = str(int(value) + int(self.figures.get(name, "0")))
            self.figures[name] = value


def read_results(*files: Path) -> dict[str, Result]:
    """Results by test, as promises name them: file::function."""
    results: dict[str, Result] = {}
    for case in (case for file in files for case in ElementTree.parse(file).iter("testcase")):
        path = case.get("classname", "").replace(".", "/") + ".py"
        function = case.get("name", "").partition("[")[0]
        results.setdefault(f"{path}::{function}", Result()).add(case)
    return results


def page(results: dict[str, Result]) -> str:
    """The whole of docs/reliability.md."""
    found = [results.get(test, Result()) for promise in PROMISES for test in promise.tests]
    summary = (
        f"{len(PROMISES)} promises, {len(found)} tests, {sum(r.cases for r in found):,} cases: "
        f"{sum(r.failed for r in found)} failed, {sum(len(r.skipped) for r in found)} skipped. "
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, "
        f"PyTorch {torch.__version__}.\n"
    )
    parts = [INTRODUCTION, summary]
    for topic, promises in groupby(PROMISES, key=lambda promise: promise.topic):
        parts += [f"\n## {topic}\n\n", "| promise | test | cases | failed | figures |\n"]
        parts += ["|---|---|---|---|---|\n", *(row for p in promises for row in rows(p, results))]
    return "".join(parts)


def rows(promise: Promise, results: dict[str, Result]) -> list[str]:
    """One row a test; the promise stands in the first."""
    lines = []
    for number, test in enumerate(promise.tests):
        result = results.get(test, Result())
        file, _, function = test.partition("::")
        figures = [f"{name}: {number_text(value)}" for name, value in result.figures.items()]
        if len(result.skipped) == result.cases:
            figures = [f"not run here: {result.skipped[0]}" if result.skipped else "not run"]
        cells = [
            promise.text if number == 0 else "",
            f"[{function.removeprefix('test_').replace('_', ' ')}](../{file})",
            f"{result.cases - len(result.skipped):,}",
            str(result.failed),
            "; ".join(figures),
        ]
        lines.append(f"| {' | '.join(cells)} |\n")
    return lines


def number_text(value: str) -> str:
    return f"{int(value):,}" if value.isdigit() else value


def run(results: Path, *, compiled: bool) -> int:
    """Run every test that a promise names, short and long; pytest's exit status."""
    named = dict.fromkeys(test for promise in PROMISES for test in promise.tests)
    tests = [test for test in named if test.startswith("tests/gpu/") == compiled]
    command = [sys.executable, "-m", "pytest", "-m", "", "-o", "junit_family=xunit1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += [f"--junitxml={results}", *tests]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def main() -> int:
    status = 0
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(argument) for argument in sys.argv[1:]]
        if not files:
            files = [Path(folder) / "interpreted.xml", Path(folder) / "compiled.xml"]
            status = max(run(files[0], compiled=False), run(files[1], compiled=True))
        PAGE.write_text(page(read_results(*files)), encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
