"""Promises name tests that exist, and every test of some files proves one."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.end_to_end.promises import PROMISES
from tests.end_to_end.report import page, read_results

WHOLLY = (
    *("broken_input", "corruption", "crashes", "disk", "hostile", "load", "numerics"),
    *("output", "planted", "reproducibility", "resume"),
)
ROOT = Path(__file__).parents[2]
RESULTS = """<testsuites><testsuite>
<testcase classname="tests.end_to_end.test_crashes" name="test_killed_at_random_moments[8]">
  <properties><property name="kills" value="8"/><property name="x" value="1.5"/></properties>
</testcase>
<testcase classname="tests.end_to_end.test_crashes" name="test_killed_at_random_moments[1000]">
  <properties><property name="kills" value="1000"/></properties><failure message="no"/>
</testcase>
<testcase classname="tests.end_to_end.test_load" name="test_two_processes_on_one_run">
  <skipped message="no GPU"/>
</testcase>
</testsuite></testsuites>"""


def functions(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_promises_and_tests_belong_together() -> None:
    named = {test for promise in PROMISES for test in promise.tests}
    for test in named:
        file, _, function = test.partition("::")
        assert function in functions(ROOT / file), test
    for file in (Path(__file__).with_name(f"test_{name}.py") for name in WHOLLY):
        tests = {name for name in functions(file) if name.startswith("test_")}
        unclaimed = {t for t in tests if f"tests/end_to_end/{file.name}::{t}" not in named}
        assert not unclaimed, file.name


def test_the_page_shows_cases_failures_figures_and_what_was_not_run(tmp_path: Path) -> None:
    (tmp_path / "results.xml").write_text(RESULTS)
    lines = page(read_results(tmp_path / "results.xml")).splitlines()
    (kills,) = (line for line in lines if "killed at random moments" in line)
    assert kills.endswith("| 2 | 1 | kills: 1,008; x: 1.5 |")
    (gpu,) = (line for line in lines if "two processes on one run" in line)
    assert gpu.endswith("| 0 | 0 | not run here: no GPU |")
    (other,) = (line for line in lines if "latest is never absent" in line)
    assert other.endswith("| 0 | 0 | not run |")
