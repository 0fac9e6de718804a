"""`mantrans export`: a run's model as a folder of transformers, or as a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mantrans import CustomTransformerWrapper
from mantrans.checkpoint import state_file
from mantrans.cli import main
from mantrans.data.tokenizer import load_tokenizer
from mantrans.training.trainer import Trainer
from tests.support.runs import GOLDEN, small

LLAMA = {
    "norm": "rms_norm", "position": "rope", "mlp": "swiglu", "bias": False, "n_kv_heads": 1,
    "dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run in bfloat16, whose checkpoint has the float32 masters."""
    folder = tmp_path_factory.mktemp("export")
    config = small(folder, folder / "tokens", model=LLAMA, max_steps=2, save_every=2)
    Trainer(config, quiet=True).run()
    return folder / "checkpoints" / "small" / "latest.pt"


def export(checkpoint: Path, output: Path, *more: str) -> int:
    return main(["export", "--checkpoint", str(checkpoint), "--output", str(output), *more])


def test_export_folder(tmp_path, checkpoint, capsys) -> None:
    """The folder has the masters and the tokenizer."""
    pytest.importorskip("safetensors")
    assert export(checkpoint, tmp_path / "out") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    found = CustomTransformerWrapper.from_pretrained(tmp_path / "out", device="cpu")
    masters = state_file.load(checkpoint)["parameters"]
    for name, value in found.model.named_parameters():
        assert masters[name].dtype == torch.float32 and torch.equal(value, masters[name]), name
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.hash == load_tokenizer(GOLDEN / "tokenizer").hash


def test_export_gguf(tmp_path, checkpoint) -> None:
    """The file is that of the library."""
    pytest.importorskip("gguf")
    assert export(checkpoint, tmp_path / "m.gguf", "--gguf") == 0
    model = CustomTransformerWrapper.from_checkpoint(checkpoint, device="cpu")
    (tmp_path / "library").mkdir()
    model.save_gguf(tmp_path / "library" / "m.gguf", load_tokenizer(GOLDEN / "tokenizer"))
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "library" / "m.gguf").read_bytes()


def changed(checkpoint: Path, folder: Path, change: Any) -> Path:
    state = state_file.load(checkpoint)
    change(state)
    state_file.save(folder / "changed.pt", state)
    return folder / "changed.pt"


def drop_a_parameter(state: dict) -> None:
    del state["parameters"]["final_norm.weight"]


REFUSED = {
    "no file": (lambda s: Path("none.pt"), "none.pt: "),
    "a parameter is missing": (drop_a_parameter, "the first is final_norm.weight"),
    "no family": (
        lambda s: s["model_config"].update(mlp="gelu"),
        "expected the parameters of this",
    ),
    "another vocabulary": (
        lambda s: s["model_config"].update(vocab_size=9),
        "vocab_size: expected",
    ),
    "another tokenizer": (
        lambda s: s["config"]["data"].update(tokenizer="tinystories_bpe_4096"),
        "data.tokenizer: expected the checkpoint's 'tokenizer'",
    ),
    "odd bytes for a tokenizer": (
        lambda s: s["tokenizer"].update(file=torch.tensor([255, 254], dtype=torch.uint8)),
        "changed.pt: expected a checkpoint that train.py saved",
    ),
    "no tensor for a tokenizer": (
        lambda s: s["tokenizer"].update(file="{}"),
        "changed.pt: expected a checkpoint that train.py saved",
    ),
    "no tokenizer in its bytes": (
        lambda s: s["tokenizer"].update(file=torch.tensor([123, 125], dtype=torch.uint8)),
        "(in the checkpoint) cannot be used",
    ),
    "not of a run": (lambda s: s.pop("tokenizer"), "got one without tokenizer"),
}


@pytest.mark.parametrize("gguf", [[], ["--gguf"]], ids=["folder", "gguf"])
@pytest.mark.parametrize("case", REFUSED)
def test_export_refuses(tmp_path, checkpoint, capsys, case, gguf) -> None:
    """What cannot be exported is refused in one line."""
    change, expected = REFUSED[case]
    path = Path("none.pt") if case == "no file" else changed(checkpoint, tmp_path, change)
    assert export(path, tmp_path / "out", *gguf) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and expected in line and line.isprintable(), line
    assert not (tmp_path / "out").exists()


def test_export_no_family(tmp_path, capsys) -> None:
    config = small(
        tmp_path, tmp_path / "tokens", model={"norm": "rms_norm"}, max_steps=2, save_every=2
    )
    Trainer(config, quiet=True).run()
    latest = tmp_path / "checkpoints" / "small" / "latest.pt"
    capsys.readouterr()
    assert export(latest, tmp_path / "out") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: norm: expected layer_norm (text), as GPT2LMHeadModel has")
    assert not (tmp_path / "out").exists()


def test_export_unwritable(tmp_path, checkpoint, capsys) -> None:
    """A place that cannot be written is refused."""
    (tmp_path / "file").write_text("")
    assert export(checkpoint, tmp_path / "file") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "file") in line and "could not be written" in line
