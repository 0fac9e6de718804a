"""A leading ~ is the home folder wherever a path is given: no folder named ~ is ever made."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mantrans.cli import main
from tests.support.runs import GOLDEN, NAME, small

OTHERS = "--set data.val_path=~/held.txt --set data.tokenizer=~/tokenizer"
FOLDERS = "--set training.output_dir=~/runs --set training.checkpoint_dir=~/checkpoints"
COMMANDS = [
    f"train --config ~/c.yaml --set data.path=~/text.txt --set data.cache_dir=~/tokens {OTHERS} "
    + FOLDERS,
    f"train --config ~/c.yaml {OTHERS} --set training.max_steps=3 "
    f"--resume ~/checkpoints/{NAME}/latest.pt",
    f"evaluate --checkpoint ~/checkpoints/{NAME}/best.pt --config ~/c.yaml --json ~/report.json",
    f"evaluate --checkpoint ~/checkpoints/{NAME}/best.pt --set data.path=~/text.txt",
    "summary ~/c.yaml",
    f"generate --checkpoint ~/checkpoints/{NAME}/best.pt --prompt x --max-length 3",
    f"report ~/runs/{NAME} --output ~/page.html --compare ~/runs/{NAME}",
    "tokenizer train --input ~/text.txt --output ~/own --vocab-size 260",
    "tokenizer analyze --tokenizer ~/own --input ~/text.txt",
    "tokenizer encode --tokenizer ~/own x",
]


def test_commands_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command knows the home folder."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    (home / "tokenizer").symlink_to(GOLDEN / "tokenizer")
    text = (GOLDEN / "stories.txt").read_text()
    (home / "text.txt").write_text(text)
    (home / "held.txt").write_text(text[:3000])
    data = {"path": "~/text.txt", "cache_dir": "~/tokens", "validation_fraction": None}
    config = small(Path("~"), Path("~/tokens"), max_steps=2, eval_every=2, data=data)
    config.save(home / "c.yaml")
    for command in COMMANDS:
        assert main(command.split()) == 0, command
    made = {"report.json", "page.html", "own", "tokens", "runs", "checkpoints"}
    assert made <= {path.name for path in home.iterdir()}
    assert not any(here.iterdir())


@pytest.mark.parametrize(
    "command",
    [
        "train --config ~no-such-user/c.yaml",
        "train --set data.cache_dir=~no-such-user/x",
        "evaluate --checkpoint ~no-such-user/x.pt",
        "report ~no-such-user/runs",
        "tokenizer train --dataset builtin-stories --output ~no-such-user/x",
    ],
)
def test_commands_unknown_user_home(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    """An unknown user's home is refused."""
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "expected a known user after ~" in line and "~no-such-user" in line
    assert not os.listdir(tmp_path)
