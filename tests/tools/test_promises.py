"""Promises and their tests know each other, and what the tests counted is shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.promises import ROOT, promises, read, table

RESULTS = """<testsuites><testsuite>
<testcase classname="tests.end_to_end.test_crashes" name="test_resume_after_random_kills[8]">
  <properties><property name="promise" value="killed at random"/>
  <property name="kills" value="8"/><property name="x" value="1.5"/></properties>
</testcase>
<testcase classname="tests.end_to_end.test_crashes" name="test_resume_after_random_kills[1000]">
  <properties><property name="promise" value="killed at random"/>
  <property name="kills" value="1000"/></properties><failure message="no"/>
</testcase>
<testcase classname="tests.end_to_end.test_load" name="test_train_two_processes_one_run">
  <properties><property name="promise" value="two processes"/></properties>
  <skipped message="no GPU"/>
</testcase>
</testsuite></testsuites>"""


def test_promises_have_tests() -> None:
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)]
    marks = [re.findall(r'^@pytest\.mark\.promise\("(.*)"\)$', f.read_text(), re.M) for f in files]
    assert {name for names in marks for name in names} == set(promises())
    assert len(promises()) == len(set(promises())) >= 54


@pytest.mark.promise("killed at random")
def test_record_promise(request: pytest.FixtureRequest) -> None:
    """A report holds the promise."""
    assert ("promise", "killed at random") in request.node.user_properties


def test_table_contents(tmp_path: Path) -> None:
    """Cases, failures, figures, and what was not run."""
    (tmp_path / "results.xml").write_text(RESULTS)
    lines = table(read(tmp_path / "results.xml")).splitlines()
    (kills,) = (line for line in lines if "resume after random kills" in line)
    assert kills.endswith("| 2 | 1 | kills: 1,008; x: 1.5 |")
    (gpu,) = (line for line in lines if "train two processes one run" in line)
    assert gpu.endswith("| 0 | 0 | not run here: no GPU |")
    assert "| latest.pt |  | 0 | 0 | not run |" in lines
