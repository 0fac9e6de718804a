"""The Python blocks of README and docs/ run, what they assert is so, and links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [path for path in TEXTS if "```python" in path.read_text(encoding="utf-8")]
FUNCTION = re.compile(r"^def (\w+)", re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_code(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a page share their variables. Blank lines stand in for the prose, so that the
    line number of a failure is that of the page."""
    monkeypatch.chdir(tmp_path)
    code, inside = [], False
    for line in page.read_text().splitlines():
        fence = line.startswith("```")
        code.append(line if inside and not fence else "")
        inside = line == "```python" if fence else inside
    exec(compile("\n".join(code), str(page), "exec"), {})


def test_index_functions() -> None:
    """The index names functions that exist."""
    defined = set(FUNCTION.findall((ROOT / "kernels" / "reference.py").read_text()))
    rows = [
        line for line in (ROOT / "docs/gradients/index.md").read_text().splitlines() if "](" in line
    ]
    named = {name for row in rows if row.startswith("| [") for name in re.findall(r"`(\w+)`", row)}
    assert named, "the table of docs/gradients/index.md has no functions"
    assert named <= defined


LINK = re.compile(r"\]\((?!https?://)([^)#\s]*)(?:#([^)\s]*))?\)")


def anchor(heading: str) -> str:
    """The name that GitHub and MyST give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip("# ").lower()).replace(" ", "-")


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links(text: Path) -> None:
    """They lead to files and headings that exist."""
    source = text.read_text(encoding="utf-8")
    for target, heading in LINK.findall(source):
        path = (text.parent / target) if target else text
        assert path.exists(), f"{target}: no such file"
        if heading:
            headings = re.findall(r"^#+ .*$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in map(anchor, headings), f"{target}#{heading}: no such heading"


@pytest.mark.slow
def test_site(tmp_path: Path) -> None:
    """`make docs` builds every page; a link to a source file is a name or the file itself."""
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going"]
    subprocess.run([*command, str(ROOT / "docs"), str(tmp_path)], check=True)
    steps = list(tmp_path.glob("steps/*/explain.html"))
    pages = [page for page in tmp_path.rglob("*.html") if "_static" not in page.parts]
    pages = [page for page in pages if page not in steps]
    led_to = set()
    assert len(pages) > len(list((ROOT / "docs").rglob("*.md")))  # and search, index
    for page in pages:
        html = page.read_text(encoding="utf-8")
        assert r"\(" not in html and r"\[" not in html, page
        for target in re.findall(r'(?:href|src)="([^"]+)"', html):
            path, _, heading = target.partition("#")
            if not re.match(r"\w+:", target):
                found = page.parent / path.partition("?")[0] if path else page
                assert found.exists(), f"{page.name}: {target}"
                if found.resolve() in steps:
                    layer = heading.split("/")[0]
                    led_to.add(layer)
                    names = re.findall(r'"(?:operation|layer|name)": "([^"]+)"', found.read_text())
                    assert not layer or layer in names, target
                elif heading:
                    assert f'id="{heading}"' in found.read_text(encoding="utf-8"), target
    assert len(steps) == 3 and led_to > {"attention", "rms_norm", "rotary", "norm_rotary", "adamw"}
    for page in steps:
        links = re.findall(r'"link": "([^"]+)"', page.read_text(encoding="utf-8"))
        assert links and all((page.parent / link).exists() for link in links), page
