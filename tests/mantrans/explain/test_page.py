"""The page as a file: whole, safe, told what was cut; bad input gets one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mantrans.cli import MISTAKE, main
from mantrans.data.tokenizer import load_tokenizer
from mantrans.explain import page
from mantrans.wrapper import CustomTransformerWrapper

TEXT = "A </script><b>&amp; “cat”\n sat ]]> on <!-- <mat>."


@pytest.fixture(autouse=True)
def no_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(page, "MOST_OPERATIONS", 1)  # one finite difference a parameter


def explain(*arguments: str) -> tuple[str, dict[str, Any]]:
    assert main(["explain", "--output", "out", *arguments]) == 0
    html = Path("out/explain.html").read_text(encoding="utf-8")
    (found,) = re.findall(r'<script type="application/json" id="step">(.*?)</script>', html, re.S)
    return html, json.loads(found)


def test_page_hostile_text(capsys: pytest.CaptureFixture) -> None:
    """Page loads nothing and runs nothing of the text."""
    html, data = explain("--text", TEXT, "--max-tokens", "64")
    assert capsys.readouterr().out == "out/explain.html\n"
    assert data["about"]["text"] == TEXT
    assert html.count("<script") == html.count("</script>") == 2
    assert "<b>" not in html and "default-src 'none'" in html
    outside = re.sub(r"<script.*?</script>", "", html, flags=re.S)
    assert not re.search(r"(src|href)=|url\(|@import|https?:", outside)
    links = [f["link"] for f in data["functions"].values()]
    links += [m["caller"]["link"] for m in data["moments"]]
    links += [w["derivation"]["link"] for w in data["words"].values()]
    assert all(Path("out", link.split("#")[0]).is_file() for link in links)


def test_page_code(capsys: pytest.CaptureFixture) -> None:
    functions = explain("--text", "one two three")[1]["functions"]
    assert {"linear_backward", "attention_backward", "adamw_update"} <= functions.keys()
    for name, function in functions.items():
        link, line = function["link"].split("#L")
        lines = Path("out", link).read_text(encoding="utf-8").splitlines()
        shown = function["source"].splitlines()
        assert lines[int(line) - 1 :][: len(shown)] == shown
        assert shown[0].startswith(f"def {name}(")


def test_page_text_too_long() -> None:
    """Default sentence fits and a longer text is cut and said."""
    tokens = load_tokenizer("tinystories_bpe_4096").encode(page.TEXT)
    assert 10 < len(tokens) <= page.TOKENS
    subject = page.fresh()
    for most, count, why in ((24, 24, "--max-tokens shows more"), (90, 64, "the model's context")):
        ids, (note,) = page.sentence(subject, "a cat " * 50, most)
        assert ids == subject.tokenizer.encode("a cat " * 50)[:count]
        assert f"tokens; the first {count} are used ({why}" in note


def test_page_large_model() -> None:
    """Fewer differences of a large model are said."""
    data = explain("--text", "a cat sat")[1]
    assert {len(p["elements"]) for p in data["parameters"].values()} == {1}
    assert any("1 of a parameter's elements" in note for note in data["about"]["notes"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--text", "a"], "--text: expected at least 2 tokens, got 1 from a (text)"),
        (["--text", " "], "expected a value, got   (text): an unset variable?"),
        (["--checkpoint", "none.pt"], "none.pt: "),
        (["--max-tokens", "1"], "expected an integer from 2"),
        (["--output", "file"], "file/explain.html: cannot be written"),
        (["--output", "folder"], "folder/explain.html: expected the name of an HTML file"),
    ],
)
def test_page_bad_input(arguments: list[str], words: str, capsys: pytest.CaptureFixture) -> None:
    """Bad input gets one line."""
    Path("file").touch()
    Path("folder/explain.html").mkdir(parents=True)
    arguments = arguments if "--text" in arguments else ["--text", "a cat sat", *arguments]
    assert main(["explain", *arguments]) == MISTAKE
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: ") and words in told


def test_page_checkpoint_without_tokenizer(capsys: pytest.CaptureFixture) -> None:
    """A checkpoint that train.py did not save is refused."""
    model = CustomTransformerWrapper(40, 16, 1, 2, max_seq_len=8, device="cpu")
    model.save_checkpoint("own.pt")
    assert main(["explain", "--checkpoint", "own.pt"]) == MISTAKE
    assert "own.pt: expected a checkpoint that train.py saved" in capsys.readouterr().err


def test_page_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is not finite is refused."""
    subject = page.fresh()
    subject.wrapper.model.parameters.weights.fill_(torch.nan)
    monkeypatch.setattr(page, "fresh", lambda: subject)
    with pytest.raises(page.ModelError, match="expected finite numbers"):
        page.write_page(text="a cat sat")
