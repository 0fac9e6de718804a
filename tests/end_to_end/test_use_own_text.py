"""From a text of one's own to a tokenizer, a model and its words, as the README says."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest

from mantrans.cli import main
from tests.support.readme import own_text_commands, write_own_texts


@pytest.mark.promise("README's commands")
def test_readme_own_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """README's commands for a text of one's own."""
    monkeypatch.chdir(tmp_path)
    write_own_texts(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Once upon a time\n"))
    printed = []
    for command in own_text_commands():
        assert main(command) == 0, (command, capsys.readouterr().err)
        printed.append(capsys.readouterr())
    assert [command[0] for command in own_text_commands()] == [
        "tokenizer", "train", "train", "evaluate", "generate", "chat",
    ]  # fmt: skip
    _, first, resumed, evaluated, generated, chatted = printed
    assert "1,000 documents" in first.err  # all of them
    records = (tmp_path / "runs/local/metrics.jsonl").read_text().splitlines()
    steps = [row["step"] for row in map(json.loads, records) if "loss" in row]
    assert steps[-1] == 4 and "step 2" in resumed.err
    size = len((tmp_path / "other.txt").read_bytes().replace(b"\n<|endoftext|>\n", b""))
    assert f"{size:,} bytes" in evaluated.out and "bits per byte" in evaluated.out
    assert re.match(r"Once upon a time\S* ?\S", generated.out)
    assert len(chatted.out) > 10 and "/help" in chatted.err
