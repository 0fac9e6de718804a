"""Our models beside transformers' Llama, Qwen2 and Qwen3: logits, loss, every gradient, AdamW.

Tolerances on the relative RMS error: float64 1e-10 and float32 1e-5, as for GPT-2
(`test_against_transformers.py`). In float64 the oracle computes in float64 throughout
(`tests.support.families`); untouched, its roundings to float32 leave 1e-6.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mantrans.models.family import packed_rows
from mantrans.wrapper import CustomTransformerWrapper, shift
from tests.support import families
from tests.support.compare import assert_close
from tests.support.families import CASES, V

pytest.importorskip("transformers", reason="transformers is the oracle here")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
B, T = 3, 31


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :9] = labels[2, 5:] = -100
    return ids, labels


def their_loss(model: torch.nn.Module, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = model(ids).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), shift(labels).flatten())
    return logits, loss


def assert_same_gradients(
    ours: CustomTransformerWrapper, theirs: torch.nn.Module, tolerance: float
) -> None:
    expected = families.gradients(ours, theirs)
    for name, gradient in ours.model.named_gradients():
        assert_close(gradient, expected[name], tolerance, name)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("reference", torch.float64),
        ("native", torch.float64),
        ("native", torch.float32),
        pytest.param("reference", torch.float32, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("case", CASES)
def test_families_loss_and_gradients(case: str, backend: str, dtype: torch.dtype) -> None:
    ours = families.ours(case, dtype, backend)
    theirs = families.theirs(ours, exact=dtype == torch.float64)
    ids, labels = batch()
    logits, loss = their_loss(theirs, ids, labels)
    loss.backward()

    outputs = ours.forward(ids, labels)
    assert_close(outputs["logits"], logits.detach(), TOLERANCE[dtype], "logits")
    assert_close(outputs["loss"], loss.detach(), TOLERANCE[dtype], "loss")
    ours.model.zero_gradients()
    accumulated = ours.accumulate_gradients(ids, shift(labels), 3)
    assert_close(accumulated, loss.detach(), TOLERANCE[dtype], "loss over micro-batches")
    assert_same_gradients(ours, theirs, TOLERANCE[dtype])


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_window_of_one(backend: str) -> None:
    """The softmax of one score is 1, whatever the score: both sides hold rounding noise there."""
    ours = families.ours("qwen3", torch.float64, backend, attention_window=1)
    theirs = families.theirs(ours, exact=True)
    ids, labels = batch()
    their_loss(theirs, ids, labels)[1].backward()
    ours.model.zero_gradients()
    ours.accumulate_gradients(ids, shift(labels))
    expected = families.gradients(ours, theirs)
    for name, gradient in ours.model.named_gradients():
        rows = sum(packed_rows(ours.config, name)[:2]) if "qkv" in name else 0
        rows = len(gradient) if "q_norm" in name or "k_norm" in name else rows
        assert_close(gradient[rows:], expected[name][rows:], 1e-10, name)
        scale = expected[name.replace("q_norm", "qkv").replace("k_norm", "qkv")].norm()
        assert gradient[:rows].norm() <= 1e-10 * scale, name


@pytest.mark.parametrize("case", CASES)
def test_oracle_untouched(case: str) -> None:
    """The untouched oracle agrees to its own rounding."""
    ours = families.ours(case, torch.float64, "reference")
    ids, labels = batch()
    logits, loss = their_loss(families.theirs(ours), ids, labels)
    outputs = ours.forward(ids, labels)
    assert_close(outputs["logits"], logits.detach(), 1e-6, "logits")
    assert_close(outputs["loss"], loss.detach(), 1e-6, "loss")


@pytest.mark.parametrize("recompute", ["gelu", "block"])
@pytest.mark.parametrize("case", ["llama, biases", "qwen2, window", "qwen3"])
def test_recompute_gradients(case: str, recompute: str) -> None:
    """Recomputed activations give the same gradients."""
    ours = families.ours(case, torch.float64, "native", recompute=recompute)
    theirs = families.theirs(ours, exact=True)
    ids, labels = batch()
    their_loss(theirs, ids, labels)[1].backward()
    ours.model.zero_gradients()
    ours.accumulate_gradients(ids, shift(labels))
    assert_same_gradients(ours, theirs, 1e-10)


@pytest.mark.parametrize("backend", [pytest.param("reference", marks=pytest.mark.slow), "native"])
@pytest.mark.parametrize(
    "case",
    [
        "qwen3",
        pytest.param("llama, scaled, tied", marks=pytest.mark.slow),
        pytest.param("qwen2, window", marks=pytest.mark.slow),
    ],
)
def test_adamw_twenty_steps(case: str, backend: str) -> None:
    """Twenty AdamW steps track torch optim."""
    options = {"beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1}
    ours = families.ours(case, torch.float64, backend, optimizer="adamw", optimizer_options=options)
    theirs = families.theirs(ours, exact=True)
    decayed = [p for p in theirs.parameters() if p.dim() > 1]
    plain = [p for p in theirs.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=3e-3, betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    ids, labels = batch()
    for _ in range(20):
        optimizer.zero_grad()
        their_loss(theirs, ids, labels)[1].backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        ours.train_step(ids, labels, learning_rate=3e-3, max_grad_norm=1.0)
    expected = families.weights(ours, theirs)
    for name, value in ours.model.named_parameters():
        # a rounding in a gradient passes through g/√(g²): small gradients amplify it
        assert_close(value, expected[name], 1e-8, name)
