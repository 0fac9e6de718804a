"""Blank arguments, which a shell makes of variables that are not set."""

from __future__ import annotations

from pathlib import Path

import pytest

from mantrans.cli import main

OPTIONS = (
    "train --resume", "train --config", "train --set", "evaluate --checkpoint c.pt --config",
    "evaluate --checkpoint", "evaluate --checkpoint c.pt --json", "summary c.yaml --set",
    "evaluate --checkpoint c.pt --set", "evaluate --checkpoint c.pt --device", "summary",
    "generate --checkpoint", "generate --prompt a --checkpoint c.pt --device", "report",
    "generate --checkpoint c.pt --file", "chat --checkpoint", "chat --checkpoint c.pt --format",
    "chat --checkpoint c.pt --device",
    "report r --output", "report r --compare", "report r --compare other", "convert",
    "convert old.pt", "export --checkpoint", "export --checkpoint c.pt --output",
    "prepare --config", "prepare --set", "prepare --output", "verify --from 1 --steps 1",
    "tokenizer train --output", "tokenizer analyze --tokenizer", "tokenizer encode --tokenizer",
    "tokenizer analyze --tokenizer t --input",
)  # fmt: skip


@pytest.mark.promise("refused starts")
@pytest.mark.parametrize("blank", ["", " ", "\t\n"])
@pytest.mark.parametrize("options", OPTIONS)
def test_argument_blank(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: str,
    blank: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    name = options.split()[-1]
    forms = [[*options.split(), blank]]
    if name.startswith("--"):
        forms.append([*options.split()[:-1], f"{name}={blank}"])
    for arguments in forms:
        assert main(arguments) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert "expected a value, got" in line
        assert not name.startswith("--") or f"argument {name}: " in line
    assert not any(tmp_path.iterdir())
