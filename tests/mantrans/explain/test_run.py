"""The page of a trained model, made by the command that its run names at the end."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from mantrans.cli import main
from mantrans.data.tokenizer import load_tokenizer
from mantrans.wrapper import CustomTransformerWrapper
from tests.mantrans.explain.test_numbers import check_page
from tests.support.explained import page_data
from tests.support.runs import GOLDEN, checkpoints, small

CONTEXT = 16  # tokens, of `small`
MODELS: dict[str, dict[str, Any]] = {
    "gpt2 in float32": {},
    "qwen3 in bfloat16": {
        "dtype": "bfloat16", "norm": "rms_norm", "position": "rope", "mlp": "swiglu",
        "qk_norm": True, "n_kv_heads": 1, "bias": False, "n_blocks": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "model", [pytest.param(m, marks=[] if "gpt2" in m else pytest.mark.slow) for m in MODELS]
)
def test_page_of_run(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Every number of it, from the checkpoint that it is made of."""
    config = small(tmp_path, tmp_path / "tokens", model=MODELS[model])
    config.save(tmp_path / "config.yaml")
    assert main(["train", "--config", str(tmp_path / "config.yaml")]) == 0
    said = "".join(capsys.readouterr())
    found = re.search(r"look at next +mantrans (.*?)   \(.*: (.*)\)", said)
    assert found, said
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.delenv("OMP_WAIT_POLICY")
    text = "Once there was a cat."
    assert main([*shlex.split(found[1]), "--text", text]) == 0
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE", "a busy machine"
    page = Path(found[2])
    assert capsys.readouterr().out.strip() == str(page)
    data = page_data(page)
    tokens = torch.tensor([load_tokenizer(str(GOLDEN / "tokenizer")).encode(text)[:CONTEXT]])
    wrapper = CustomTransformerWrapper.from_checkpoint(
        checkpoints(tmp_path) / "best.pt", dtype=torch.float64, device="cpu", backend="reference",
        optimizer_options={
            name: getattr(config.training, name)
            for name in ("weight_decay", "max_grad_norm", "beta1", "beta2", "epsilon")
        },
    )  # fmt: skip
    check_page(data, wrapper, tokens)
    notes = " ".join(data["about"]["notes"])
    assert "float64" in notes and f"the first {CONTEXT} are used" in notes
