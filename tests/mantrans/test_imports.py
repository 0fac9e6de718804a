"""What is not imported before it is needed, by name: no clock decides."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mantrans.cli import COMMANDS
from mantrans.config import Config
from tests.support.runs import small

ROOT = Path(__file__).parents[2]
OPTIONAL = {
    "transformers", "datasets", "pyarrow", "pandas", "matplotlib", "anthropic", "safetensors",
    "tensorflow", "mantrans.proof", "mantrans_oracle", "torch._dynamo", "torch._inductor",
    "triton.compiler",
}  # fmt: skip
LATER = {"jinja2", "tensorboard", "torch.utils.tensorboard"}
HEAVY = {"torch", "numpy", "pydantic", "yaml", "tqdm", "jinja2", "tokenizers", "filelock"}


def imported(program: str, among: set[str], *arguments: str) -> set[str]:
    """Which of these modules a fresh interpreter has after `program`."""
    ending = f"\nimport sys\nprint('modules', *({among!r} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", program + ending, *arguments],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_help_imports() -> None:
    program = """
import sys
from contextlib import redirect_stdout
from io import StringIO
from mantrans.cli import main
for command in sys.argv[1:]:
    with redirect_stdout(StringIO()) as shown:
        try:
            main([command, "--help"])
        except SystemExit as ended:
            assert ended.code == 0
    assert shown.getvalue().startswith("usage: mantrans"), command
"""
    commands = [name for name in COMMANDS if name != "tokenizer"]  # its options are its module's
    assert imported(program, HEAVY | OPTIONAL | LATER, "--help", *commands) == set()
    assert not imported(program, {"torch"} | OPTIONAL | LATER, "tokenizer")


def test_train_imports(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Before its set-up neither the report's templates nor TensorBoard; never what is optional."""
    config: Config = small(tmp_path, tmp_path / "tokens", max_steps=2)
    config.save(tmp_path / "config.yaml")
    program = f"""
import sys
import mantrans.training.trainer, mantrans.training.resume
assert not {OPTIONAL | LATER} & sys.modules.keys()
from mantrans.cli import main
assert main(sys.argv[1:]) == 0
"""
    assert imported(program, OPTIONAL, "train", "--config", str(tmp_path / "config.yaml")) == set()
