"""Runs the tests of all promises in their long form, and counts: `make test-reliability`.

A promise stands in docs/reliability.md, `- **name**: what is promised`, and a test that would fail
if it were broken has the mark `promise("name")`. A test adds a figure with
`record_property(name, value)`. The counts become the table tests/reliability.md, and their sums a
line of the page.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
TABLE = ROOT / "tests" / "reliability.md"
SUMMARY = re.compile(r"^The last whole run: .*$", re.M)
# A process interprets kernels or compiles them: tests/conftest.py.
RUNS = ((), ("tests/gpu",))
HEAD = """\
# Counts of the promises' tests

Written by `make test-reliability`. Figures are what the tests counted, cases and figures of all
forms of a test together.

| promise | test | cases | failed | figures |
|---|---|---|---|---|
"""


@dataclass
class Count:
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
        for name, value in properties(case):
            if value.isdigit():  # counts add up; of anything else the last stands
                value = str(int(value) + int(self.figures.get(name, "0")))
            if name != "promise":
                self.figures[name] = value


def attach(item: pytest.Item) -> None:
    """Put the promises of a test into its report."""
    item.user_properties += [("promise", mark.args[0]) for mark in item.iter_markers("promise")]


def promises() -> list[str]:
    """The names on the page, in its order."""
    return re.findall(r"^- \*\*(.+?)\*\*:", PAGE.read_text(encoding="utf-8"), re.M)


def properties(case: ElementTree.Element) -> list[tuple[str, str]]:
    return [(item.get("name", ""), item.get("value", "")) for item in case.iter("property")]


def read(*files: Path) -> dict[str, dict[str, Count]]:
    """Counts by promise and test (file::function), from JUnit files of pytest."""
    counts: dict[str, dict[str, Count]] = defaultdict(lambda: defaultdict(Count))
    for case in (case for file in files for case in ElementTree.parse(file).iter("testcase")):
        path = case.get("classname", "").replace(".", "/") + ".py"
        function = case.get("name", "").partition("[")[0]
        for promise in (value for name, value in properties(case) if name == "promise"):
            counts[promise][f"{path}::{function}"].add(case)
    return counts


def table(counts: dict[str, dict[str, Count]]) -> str:
    """One row a test; a promise without a test that ran says so."""
    rows = []
    for promise in promises():
        for test, count in counts.get(promise, {"": Count()}).items():
            file, _, function = test.partition("::")
            figures = [f"{name}: {thousands(value)}" for name, value in count.figures.items()]
            if len(count.skipped) == count.cases:
                figures = [f"not run here: {count.skipped[0]}" if count.skipped else "not run"]
            shown = f"[{function.removeprefix('test_').replace('_', ' ')}](../{file})"
            ran = f"{count.cases - len(count.skipped):,}"
            cells = [promise, shown if test else "", ran, str(count.failed), "; ".join(figures)]
            rows.append(f"| {' | '.join(cells)} |\n")
    return HEAD + "".join(rows)


def thousands(value: str) -> str:
    return f"{int(value):,}" if value.isdigit() else value


def summary(counts: dict[str, dict[str, Count]]) -> str:
    found = [count for tests in counts.values() for count in tests.values()]
    return (
        f"The last whole run: {len(counts)} promises, {len(found)} tests, "
        f"{sum(c.cases for c in found):,} cases, {sum(c.failed for c in found)} failed, "
        f"{sum(len(c.skipped) for c in found)} skipped ({platform.system()} {platform.machine()}, "
        f"Python {platform.python_version()}, PyTorch {torch.__version__})."
    )


def run(results: Path, *where: str) -> int:
    """Run every test that proves a promise; pytest's exit status."""
    command = [sys.executable, "-m", "pytest", "-m", "promise", "-o", "junit_family=xunit1"]
    command += [f"--junitxml={results}", *where]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number}.xml" for number in range(len(RUNS))]
        status = max(run(file, *where) for file, where in zip(files, RUNS, strict=True))
        counts = read(*files)
    TABLE.write_text(table(counts), encoding="utf-8")
    PAGE.write_text(SUMMARY.sub(summary(counts), PAGE.read_text(encoding="utf-8")))
    return status


if __name__ == "__main__":
    sys.exit(main())
