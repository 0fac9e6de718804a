"""The how-tos of docs/ do what they say. Python blocks are run by `tests/tools/test_docs.py`."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mantrans.cli import main
from mantrans.kernels import reference
from tests.support.compare import assert_close
from tests.support.readme import write_own_texts
from tests.support.runs import small

DOCS = Path(__file__).parents[2] / "docs"


def block_of(page: str, fence: str = "") -> list[str]:
    """The blocks of a page with this language."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.findall(rf"^ *```{fence}\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
    assert found, f"{page}: no block"
    return found


def commands_of(page: str) -> list[list[str]]:
    lines = "".join(block_of(page)).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines]


@pytest.mark.slow
def test_continue_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each line, with a tiny Qwen2 in the place of what is downloaded."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    from tests.mantrans.training.test_init_from import write_pretrained

    monkeypatch.chdir(tmp_path)
    write_own_texts(tmp_path)
    (tmp_path / "mine.txt").rename("my_stories.txt")
    download, *commands = commands_of("continue-a-model.md")
    assert download[:2] == ["hf", "download"] and download[3:] == ["--local-dir", "smollm2"]
    write_pretrained(tmp_path / "smollm2", "qwen2")
    for program, command, *arguments in commands:
        assert program == "mantrans"
        if command == "train":
            arguments += ["--set=training.max_steps=2", "--set=training.device=cpu"]
            arguments = [a.replace("max_length=512", "max_length=16") for a in arguments]
        assert main([command, *arguments]) == 0, (command, capsys.readouterr().err)
    model = transformers.AutoModelForCausalLM.from_pretrained("exported")
    assert model.config.model_type == "qwen2" and Path("mine.gguf").stat().st_size > 1000


@pytest.mark.slow
def test_two_gpus(tmp_path: Path) -> None:
    """Each line, by torchrun itself, on two CPU processes."""
    root = DOCS.parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    environment["GLOO_SOCKET_IFNAME"] = "lo"
    (tmp_path / "configs").mkdir()
    settings = {
        "experiment_name": "gpt2-124m",
        "max_steps": 3,
        "gradient_accumulation_steps": 2,
        "batch_size": 2,
    }
    settings |= {"output_dir": "runs", "checkpoint_dir": "checkpoints"}
    small(tmp_path, tmp_path / "tokens", **settings).save(tmp_path / "configs/gpt2-124m.yaml")
    (tmp_path / "train.py").symlink_to(root / "train.py")
    programs = {"mantrans": ["mantrans"], "torchrun": ["torch.distributed.run"]}
    said = []
    for program, *arguments in commands_of("two-gpus.md"):
        command = [sys.executable, *(["-m", *programs[program]] if program in programs else [])]
        done = subprocess.run(
            [*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout + done.stderr)
    summary, first, second, third = said
    assert "2 processes" in first and "rank" in summary
    assert "nothing left to train" in second and "nothing left to train" in third


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The page's Triton file."""
    (code,) = block_of("new-operation.md", "py")
    path = tmp_path_factory.mktemp("kernels") / "relu_squared.py"
    path.write_text(code)
    spec = importlib.util.spec_from_file_location("relu_squared", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_operation_triton(kernels: ModuleType, dtype: torch.dtype) -> None:
    """Equal to the mathematics of the page; NaN stays."""
    h, dy = torch.randn(2, 7, 301, generator=torch.Generator().manual_seed(0)).to(dtype)
    h[3, 5] = torch.nan
    wide = reference.widen(h).clamp(min=0)
    y, dh = kernels.relu_squared_forward(h), kernels.relu_squared_backward(dy, h)
    for found, exact in ((y, wide.square()), (dh, 2 * wide * reference.widen(dy))):
        assert found.isnan().sum() == 1 and found[3, 5].isnan()
        assert_close(found.nan_to_num(), exact.to(dtype).nan_to_num(), 1e-7, "triton")
