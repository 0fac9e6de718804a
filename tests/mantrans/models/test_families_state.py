"""Llama's and Qwen's models through all that a GPT-2 goes through: dtypes, documents, the captured
step, checkpoints, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mantrans.errors import CheckpointError, ConfigError
from mantrans.kernels.reference import document_starts
from mantrans.training import step as step_module
from mantrans.training.diagnosis import first_non_finite
from mantrans.training.step import MicroBatch, TrainStep
from mantrans.wrapper import CustomTransformerWrapper
from tests.support.compare import relative_error

V, T = 53, 13
LLAMA: dict[str, Any] = {"norm": "rms_norm", "position": "rope", "mlp": "swiglu", "bias": False}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, "n_kv_heads": 2, "head_dim": 6},
    "qwen2": {**LLAMA, "qkv_bias": True, "n_kv_heads": 1, "attention_window": 4},
    "qwen3": {**LLAMA, "qk_norm": True, "tie_embeddings": False},
}
IDS = torch.randint(1, V, (4, T), generator=torch.Generator().manual_seed(3))


def build(name: str, dtype: torch.dtype = torch.float32, **more: Any) -> CustomTransformerWrapper:
    options = {"backend": "native", "optimizer": "adamw", "seed": 5, **MODELS[name], **more}
    return CustomTransformerWrapper(V, 24, 2, 4, 40, T, dtype=dtype, device="cpu", **options)


BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
FAST = [
    ("llama", torch.float64, False, "none"),
    ("qwen2", torch.float32, False, "block"),
    ("qwen3", torch.bfloat16, False, "gelu"),
    ("llama", torch.bfloat16, True, "block"),
]
ALL = [
    (name, dtype, stochastic, recompute)
    for name in MODELS
    for dtype in BOUNDS
    for stochastic in (False, True)
    if not stochastic or dtype == torch.bfloat16
    for recompute in ("none", "gelu", "block")
]


@pytest.mark.parametrize(
    ("name", "dtype", "stochastic", "recompute"),
    [kind if kind in FAST else pytest.param(*kind, marks=pytest.mark.slow) for kind in ALL],
)
def test_train_any_dtype(name: str, dtype: torch.dtype, stochastic: bool, recompute: str) -> None:
    model = build(name, dtype, recompute=recompute, stochastic_rounding=stochastic)
    exact = build(name, torch.float64, backend="reference")
    losses = []
    for _ in range(8):
        results = [m.train_step(IDS, IDS, learning_rate=1e-2) for m in (model, exact)]
        assert all(r["status"] == "ok" for r in results)
        losses.append([r["loss"] for r in results])
    ours, theirs = torch.tensor(losses, dtype=torch.float64).T
    assert relative_error(ours, theirs) <= BOUNDS[dtype] and theirs[-1] < 0.8 * theirs[0]


def test_window_documents() -> None:
    """It ends at the document's first token, and within a document at its own."""
    model = build("qwen2", torch.float64).model  # sees 4 tokens in each of 2 blocks
    tokens = IDS[:1].clone()
    tokens[0, 6] = 0  # the end of the first document
    starts = document_starts(tokens, 0)
    assert starts[0].tolist() == [0] * 7 + [7] * 6
    assert model.network.first_key(tokens, starts)[0].tolist() == [
        0, 0, 0, 0, 1, 2, 3, 7, 7, 7, 7, 8, 9
    ]  # fmt: skip
    assert model.network.first_key(tokens[:, :4], None) is None  # all of them see all before

    def losses(changed: int, documents: bool) -> torch.Tensor:
        other = tokens.clone()
        other[0, changed] = other[0, changed] % (V - 1) + 1
        return model.losses(other, torch.full_like(tokens, 3), starts if documents else None)

    plain, within = (model.losses(tokens, torch.full_like(tokens, 3), s) for s in (None, starts))
    across = losses(5, documents=False) != plain
    assert across.tolist() == [False] * 5 + [True] * 7 + [False]  # 1 + 2 · (4 - 1) positions
    inside = losses(5, documents=True) != within
    assert inside.tolist() == [False] * 5 + [True] * 2 + [False] * 6


class Source:
    """The same sequences at every step."""

    def load(self, step: int) -> None: ...

    def rows(self) -> torch.Tensor:
        return torch.cat((IDS, IDS[:, :1]), dim=1)


@pytest.mark.parametrize("name", MODELS)
def test_captured_step_equals_eager(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a direct call in place of the graph, as in `test_step.py`."""

    def stand_in(function):
        for _ in range(step_module.WARM_UP_RUNS + 1):
            function()
        return function

    monkeypatch.setattr(step_module, "cuda_graph", stand_in)
    found = []
    for capture in (False, True):
        model = build(name, torch.bfloat16)
        step = TrainStep(
            model.model, model.trainable(), Source(), micro_batches=2, end_of_text=0, history=4,
            capture=capture,
        )  # fmt: skip
        for number in range(3):
            step.run(number, 1e-2)
        found.append((step.read(), model.model.parameters.weights.clone()))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_checkpoint_resumed(name: str, dtype, tmp_path: Path) -> None:
    """A checkpoint goes on with the same bits."""
    model = build(name, dtype)
    model.train_step(IDS, IDS)
    model.save_checkpoint(tmp_path / "c.pt", epoch=5)
    loaded = CustomTransformerWrapper.from_checkpoint(tmp_path / "c.pt", device="cpu")
    assert loaded.config == model.config
    for wrapper in (model, loaded):
        wrapper.train_step(IDS, IDS)
    weights, others = (w.model.parameters.best_weights() for w in (model, loaded))
    assert torch.equal(weights, others)
    names = dict(model.model.named_parameters())
    assert ("position_embedding.weight" in names) is False
    assert not any("cos" in n or "angle" in n for n in names)
    assert ("blocks.1.attention.q_norm.weight" in names) == (name == "qwen3")


OTHERS = [
    ({"n_kv_heads": 4}, "n_kv_heads: expected 2, as in the checkpoint, got 4"),
    ({"head_dim": 8}, "head_dim: expected 6, as in the checkpoint, got 8"),
    (
        {"norm": "layer_norm"},
        "norm: expected rms_norm (text), as in the checkpoint, got layer_norm (text)",
    ),
    ({"position": "learned"}, "position: expected rope (text), as in the checkpoint, got learned"),
    ({"mlp": "gelu"}, "mlp: expected swiglu (text), as in the checkpoint, got gelu"),
    (
        {"rope_theta": 5e5},
        "rope_theta: expected 10000.0 (number), as in the checkpoint, got 500000.0",
    ),
    ({"rope_scaling_factor": 8.0}, "rope_scaling_factor: expected null, as in the checkpoint"),
    ({"qk_norm": True}, "qk_norm: expected false, as in the checkpoint, got true"),
    ({"attention_window": 5}, "attention_window: expected null, as in the checkpoint, got 5"),
    ({"qkv_bias": True}, "qkv_bias: expected false, as in the checkpoint, got true"),
]


@pytest.mark.parametrize(("changed", "message"), OTHERS)
def test_checkpoint_other_architecture(changed: dict[str, Any], message: str) -> None:
    """A checkpoint of another architecture is refused by its field."""
    state = build("llama").state_dict()
    with pytest.raises(CheckpointError) as refused:
        build("llama", **changed).load_state_dict(state)
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


def test_defaults_same_architecture() -> None:
    """Defaults and what they resolve to are one architecture."""
    state = build("qwen3").state_dict()
    same = {"n_kv_heads": 4, "head_dim": 6, "qkv_bias": False, "mlp_bias": False}
    build("qwen3", **same).load_state_dict(state)
    build("qwen3", bias=True, **same, projection_bias=False).load_state_dict(state)


REFUSED = [
    ({"n_kv_heads": 3}, "n_heads: expected a multiple of n_kv_heads (3), got 4"),
    ({"head_dim": 5}, "head_dim: expected an even width of a head, since position is rope, got 5"),
    ({"position": "learned", "qk_norm": True, "head_dim": 5},
     "head_dim: expected an even width of a head, since qk_norm is true, got 5"),
    ({"position": "learned", "rope_scaling_factor": 2.0},
     "rope_scaling_factor: expected null, since position is learned, got 2.0 (number)"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "message"), REFUSED)
def test_shape_wrong(changed: dict, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        build("llama", **changed)
    assert str(refused.value).endswith(message) and "\n" not in str(refused.value)


def test_diagnose_first_not_finite() -> None:
    """The first value that is not finite is named."""
    model = build("qwen3").model
    parameters = dict(model.named_parameters())
    parameters["blocks.1.attention.k_norm.weight"][2] = 3e38
    parameters["blocks.1.attention.q_norm.weight"][2] = 3e38
    rows = Source().rows()
    part = MicroBatch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), torch.tensor(0.02), None)
    found = first_non_finite(model, [part])
    assert "blocks.1.attention.out" in found or "blocks.1.attention.qkv" in found, found
