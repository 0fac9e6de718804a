"""Gradient norms by layer and by kind, beside those of the named gradients."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mantrans import CustomTransformerWrapper
from mantrans.records import read_records
from mantrans.training.layer_norms import LayerNorms
from mantrans.training.trainer import Trainer
from tests.support.runs import LLAMA, metrics_file, small


def build(dtype: torch.dtype = torch.float32, **model: Any) -> CustomTransformerWrapper:
    shape = {"vocab_size": 53, "d_model": 24, "n_blocks": 3, "n_heads": 2, "max_seq_len": 12}
    wrapper = CustomTransformerWrapper(**shape, dtype=dtype, device="cpu", **model)
    tokens = torch.randint(0, 53, (4, 12), generator=torch.Generator().manual_seed(0))
    wrapper.model.backward(torch.randn_like(wrapper.model.forward(tokens)))
    return wrapper


ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokens")


@pytest.mark.parametrize(
    ("dtype", "model"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {**LLAMA, "n_kv_heads": 1, "tie_embeddings": False}),
        (torch.float64, {**LLAMA, "qk_norm": True, "head_dim": 10}),
    ],
)
def test_layer_norms_equal_named_gradients(dtype: torch.dtype, model: dict[str, Any]) -> None:
    wrapper = build(dtype, **model)
    norms = LayerNorms(wrapper.model.parameters)
    found = norms.read(norms.measure())
    layers: dict[str, float] = {}
    kinds: dict[str, float] = {}
    for name, gradient in wrapper.model.named_gradients():
        *inside, _ = name.split(".")
        square = gradient.double().square().sum().item()
        layer = ".".join(inside[:2]) if inside[0] == "blocks" else inside[0]
        layers[layer] = layers.get(layer, 0.0) + square
        if inside[0] == "blocks":
            kind = ".".join(inside[2:])
            kinds[kind] = kinds.get(kind, 0.0) + square
    for expected, ours in ((layers, found.by_layer), (kinds, found.by_kind)):
        assert list(ours) == list(expected), "in the order of the forward"
        roots = {name: math.sqrt(square) for name, square in expected.items()}
        assert ours == pytest.approx(roots, rel=6e-6)
    assert {"blocks.0", "blocks.2", "final_norm"} < found.by_layer.keys()


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(value, torch.float32) for value in (0.0, 1e-40, 1e-30, 3e38, math.inf, math.nan)]
    + [(value, torch.float64) for value in (1e-300, 1e300)],
)
def test_layer_norms_edges(value: float, dtype: torch.dtype) -> None:
    """Finite gradients have finite norms; one that is not finite is only its layer's."""
    wrapper = build(dtype)
    gradients = dict(wrapper.model.named_gradients())
    for gradient in gradients.values():
        gradient.zero_()
    gradients["blocks.1.mlp.up.weight"].fill_(value)
    norms = LayerNorms(wrapper.model.parameters)
    found = norms.read(norms.measure())
    value = gradients["blocks.1.mlp.up.weight"].view(-1)[0].item()  # as float32 has it
    expected = value * math.sqrt(gradients["blocks.1.mlp.up.weight"].numel())
    for norm in (found.by_layer.pop("blocks.1"), found.by_kind.pop("mlp.up")):
        assert norm == pytest.approx(expected, rel=1e-5, nan_ok=True)
    assert not any(found.by_layer.values()) and not any(found.by_kind.values())


def test_layer_norms_in_metrics(tmp_path: Path, tokens: Path) -> None:
    """Those of the logged step, whose parts make up its gradient norm."""
    config = small(tmp_path, tokens, log_every=1, max_steps=3, eval_every=3)
    Trainer(config, quiet=True).run()
    records = read_records(metrics_file(tmp_path))
    section = (ROOT / "docs/getting-started.md").read_text().partition("## What is measured")[2]
    rows = re.findall(r"^\| (`.*?) \|", section.partition("##")[0], re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == set().union(*records)
    records = [r for r in records if "loss" in r]
    assert [r["step"] for r in records] == [1, 2, 3]
    for record in records:
        layers, kinds = record["grad_norm_by_layer"], record["grad_norm_by_kind"]
        assert math.hypot(*layers.values()) == pytest.approx(record["grad_norm"], rel=1e-5)
        assert math.hypot(*kinds.values()) == pytest.approx(layers["blocks.0"], rel=1e-5)
