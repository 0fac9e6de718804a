"""The Python blocks of the pages in docs/ run, and what the pages assert is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if "```python" in path.read_text())
FUNCTION = re.compile(r"^def (\w+)", re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_runs(page: Path) -> None:
    """Blocks of a page share their variables. Blank lines stand in for the prose, so that the
    line number of a failure is that of the page."""
    code, inside = [], False
    for line in page.read_text().splitlines():
        fence = line.startswith("```")
        code.append(line if inside and not fence else "")
        inside = line == "```python" if fence else inside
    exec(compile("\n".join(code), str(page), "exec"), {})


def test_the_index_names_functions_that_exist() -> None:
    defined = set(FUNCTION.findall((ROOT / "kernels" / "reference.py").read_text()))
    rows = [line for line in (ROOT / "docs/gradients/index.md").read_text().splitlines() if "](" in line]
    named = {name for row in rows if row.startswith("| [") for name in re.findall(r"`(\w+)`", row)}
    assert named, "the table of docs/gradients/index.md has no functions"
    assert named <= defined
