"""Ten functional tests: does the thing do what it says on the label?"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from mantrans import CustomTransformerWrapper

V, B, T = 97, 4, 16


@pytest.fixture
def model() -> CustomTransformerWrapper:
    return CustomTransformerWrapper(
        vocab_size=V, d_model=32, n_blocks=2, n_heads=4, d_ffn=64, max_seq_len=32,
        dtype=torch.float32, device="cpu", seed=3,
    )  # fmt: skip


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(0))


def test_forward_shape(model, ids) -> None:
    """Logits have the right shape."""
    outputs = model.forward(ids)
    assert set(outputs) == {"logits"}
    assert outputs["logits"].shape == (B, T, V) and outputs["logits"].dtype == torch.float32


def test_loss_initial(model, ids) -> None:
    """A fresh model knows nothing: its loss is ln V, give or take what weights of 0.02 add."""
    loss = model.forward(ids, labels=ids)["loss"]
    assert loss.shape == () and abs(loss.item() - math.log(V)) < 0.1


def test_train_step_result(model, ids) -> None:
    """Train step reports and changes the weights."""
    before = {name: p.clone() for name, p in model.model.named_parameters()}
    result = model.train_step(ids, ids, learning_rate=1e-2)
    assert result["status"] == "ok" and math.isfinite(result["loss"]) and result["grad_norm"] > 0
    changed = [n for n, p in model.model.named_parameters() if not torch.equal(p, before[n])]
    assert len(changed) == len(before)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_train_step_one_batch(ids, optimizer) -> None:
    """One batch can be learned by heart."""
    model = CustomTransformerWrapper(
        vocab_size=V, d_model=32, n_blocks=2, n_heads=4, d_ffn=64, max_seq_len=32,
        dtype=torch.float32, device="cpu", optimizer=optimizer,
    )  # fmt: skip
    rate, norm = (0.5, 5.0) if optimizer == "sgd" else (1e-2, 1.0)
    losses = [
        model.train_step(ids, ids, learning_rate=rate, max_grad_norm=norm)["loss"]
        for _ in range(150)
    ]
    assert losses[-1] < 0.2 * losses[0]


def test_gradients_finite(model, ids) -> None:
    logits = model.model.forward(ids)
    model.model.backward(torch.randn_like(logits))
    for name, gradient in model.model.named_gradients():
        assert gradient.isfinite().all(), name


def test_generate_prompt(model, ids) -> None:
    tokens = model.generate(ids[:2, :5], max_length=20, temperature=0.8, top_k=10, seed=1)
    assert tokens.shape == (2, 20) and torch.equal(tokens[:, :5], ids[:2, :5])
    assert tokens.min() >= 0 and tokens.max() < V


def test_model_info(model) -> None:
    info = model.get_model_info()
    expected = V * 32 + 32 * 32  # embeddings
    expected += 2 * (4 * 32 + 3 * 32 * 33 + 32 * 33 + 64 * 33 + 32 * 65)  # blocks
    expected += 2 * 32  # final norm
    assert info["parameters"] == model.count_parameters() == expected
    assert info["d_model"] == 32 and info["device"] == "cpu" and info["backend"] == "native"


def test_checkpoint_round_trip(model, ids, tmp_path: Path) -> None:
    model.train_step(ids, ids)
    model.save_checkpoint(tmp_path / "checkpoint.pt", epoch=5, train_loss=1.23)
    kept = {name: p.clone() for name, p in model.model.named_parameters()}
    model.train_step(ids, ids, learning_rate=0.1)
    assert model.load_checkpoint(tmp_path / "checkpoint.pt") == {"epoch": 5, "train_loss": 1.23}
    for name, parameter in model.model.named_parameters():
        assert torch.equal(parameter, kept[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_from_checkpoint_continues(ids, tmp_path: Path, dtype) -> None:
    """From checkpoint goes on as if nothing had happened."""
    model = CustomTransformerWrapper(
        vocab_size=V, d_model=32, n_blocks=2, n_heads=4, max_seq_len=32, dtype=dtype, device="cpu",
        optimizer="adamw",
    )  # fmt: skip
    for _ in range(3):
        model.train_step(ids, ids)
    model.save_checkpoint(tmp_path / "checkpoint.pt")
    other = CustomTransformerWrapper.from_checkpoint(tmp_path / "checkpoint.pt", device="cpu")
    for _ in range(3):
        assert other.train_step(ids, ids) == model.train_step(ids, ids)
    for (name, ours), (_, theirs) in zip(
        model.model.named_parameters(), other.model.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_gradients_every_parameter(model, ids) -> None:
    """All but the keys' bias, on which softmax does not depend: there only rounding remains."""
    model.train_step(ids, ids, learning_rate=0.0)
    parameters = dict(model.model.named_parameters())
    gradients = dict(model.model.named_gradients())
    assert parameters.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.shape == parameters[name].shape
        assert gradient.abs().max() > 0, name
