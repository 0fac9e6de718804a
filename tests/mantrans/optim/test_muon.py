"""Muon beside `torch.optim.Muon` and `torch.optim.AdamW`: which parameter has which update."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.optim._muon as torch_muon
from torch import Tensor

from mantrans import CustomTransformerWrapper
from mantrans.config import TrainingConfig
from mantrans.errors import ConfigError
from mantrans.optim import Muon, muon, options
from mantrans.optim.optimizer import StepOutcome

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2 untied": {"tie_embeddings": False},
    "llama": {
        "n_kv_heads": 1, "norm": "rms_norm", "position": "rope", "mlp": "swiglu", "bias": False,
    },
}  # fmt: skip
RATE, DECAY = 1e-2, 0.1
CPU = torch.device("cpu")


def build(family: str = "gpt2 untied", dtype: torch.dtype = torch.float64, backend: str = "native",
          **more: Any) -> CustomTransformerWrapper:  # fmt: skip
    shape = {"vocab_size": 61, "d_model": 16, "n_blocks": 3, "n_heads": 2, "d_ffn": 24}
    return CustomTransformerWrapper(
        **shape, max_seq_len=12, dtype=dtype, device="cpu", backend=backend, optimizer="muon",
        optimizer_options={"max_grad_norm": None, **more}, **FAMILIES[family],
    )  # fmt: skip


def draw_gradients(model: CustomTransformerWrapper, step: int) -> dict[str, Tensor]:
    """Fill the gradients; returns copies."""
    generator = torch.Generator().manual_seed(step)
    drawn = {}
    for name, gradient in model.model.named_gradients():
        gradient.copy_(torch.randn(gradient.shape, generator=generator, dtype=torch.float64))
        drawn[name] = gradient.clone()
    return drawn


def take(model: CustomTransformerWrapper, rate: float = RATE) -> StepOutcome:
    numbers = [torch.tensor(x, dtype=model.model.parameters.wide) for x in (1.0, rate)]
    return model.trainable().step(*numbers)


class Theirs:
    """The same parameters under torch's two optimizers."""

    def __init__(self, model: CustomTransformerWrapper, scale: str) -> None:
        p = model.model.parameters
        self.weights = {n: torch.nn.Parameter(x.clone()) for n, x in p.named(p.best_weights())}
        by_group: dict[str, list[Tensor]] = {"blocks": [], "decayed": [], "vectors": []}
        for name, weight in self.weights.items():
            inside = name.startswith("blocks.") and weight.dim() == 2
            group = "blocks" if inside else "vectors" if weight.dim() == 1 else "decayed"
            by_group[group].append(weight)
        self.optimizers = [
            torch.optim.Muon(by_group["blocks"], RATE, DECAY, adjust_lr_fn=scale),
            torch.optim.AdamW(by_group["decayed"], RATE, (0.9, 0.95), weight_decay=DECAY),
            torch.optim.AdamW(by_group["vectors"], RATE, (0.9, 0.95), weight_decay=0.0),
        ]

    def step(self, gradients: dict[str, Tensor]) -> None:
        for name, weight in self.weights.items():
            weight.grad = gradients[name]
        for optimizer in self.optimizers:
            optimizer.step()


def in_its_own_dtype(gradient: Tensor, coefficients: Any, steps: int, eps: float) -> Tensor:
    """`torch.optim.Muon`'s function without its cast to bfloat16."""
    a, b, c = coefficients
    x = gradient.T if gradient.shape[0] > gradient.shape[1] else gradient
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if gradient.shape[0] > gradient.shape[1] else x


def largest_difference(model: CustomTransformerWrapper, theirs: Theirs, blocks: bool) -> float:
    """Of weights, after steps of which each changes most of them by about RATE."""
    p = model.model.parameters
    return max(
        (x - theirs.weights[name]).abs().max().item()
        for name, x in p.named(p.best_weights())
        if (p.by_name[name].bucket in p.blocks) == blocks
    )


@pytest.mark.parametrize(
    ("family", "scale"), [("gpt2 untied", "match_rms_adamw"), ("llama", "original")]
)
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [
        ("reference", torch.float64, 1e-13), ("native", torch.float64, 1e-13),
        ("reference", torch.float32, 3e-6), ("native", torch.float32, 3e-6),
    ],
)  # fmt: skip
def test_muon_twenty_steps(
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    dtype: torch.dtype,
    tolerance: float,
    family: str,
    scale: str,
) -> None:
    monkeypatch.setattr(torch_muon, "_zeropower_via_newtonschulz", in_its_own_dtype)
    monkeypatch.setattr(muon, "resolve_dtype", lambda dtype, device: torch.float32)
    ours = build(family, dtype, backend, scale=scale)
    theirs = Theirs(ours, scale)
    for step in range(20):
        theirs.step(draw_gradients(ours, step))
        assert take(ours).applied
    assert largest_difference(ours, theirs, blocks=True) < tolerance
    assert largest_difference(ours, theirs, blocks=False) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_twenty_steps_bfloat16(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Products in bfloat16, beside torch's as they are. A step's error is some 2% of its size."""
    monkeypatch.setattr(muon, "resolve_dtype", lambda dtype, device: torch.bfloat16)
    ours = build(dtype=dtype)
    theirs = Theirs(ours, "match_rms_adamw")
    for step in range(20):
        theirs.step(draw_gradients(ours, step))
        take(ours)
    assert largest_difference(ours, theirs, blocks=True) < 20 * 0.05 * RATE / 20**0.5
    assert largest_difference(ours, theirs, blocks=False) < 1e-6


def test_muon_rate_ratio() -> None:
    """The learning rate of the matrices in blocks alone."""
    changes = []
    for ratio in (1.0, 3.0):
        model = build(rate_ratio=ratio)
        p = model.model.parameters
        before = p.weights.clone()
        draw_gradients(model, 0)
        take(model)
        changes.append(dict(p.named(p.weights - before)))
    for name, change in changes[0].items():
        factor = 3.0 if p.by_name[name].bucket in p.blocks else 1.0
        torch.testing.assert_close(changes[1][name], factor * change)


def test_muon_rate_beyond_float32() -> None:
    """A rate that is a number, but not when multiplied, is refused: nothing changes."""
    model = build(dtype=torch.float32, rate_ratio=1e4)
    before = model.model.parameters.weights.clone()
    draw_gradients(model, 0)
    assert not take(model, 1e35).applied
    assert torch.equal(model.model.parameters.weights, before)
    assert take(model, 1e-3).applied


def test_muon_state() -> None:
    """One moment of the matrices in blocks, two of all else, in the buffers and by name."""
    model = build()
    p, optimizer = model.model.parameters, model.trainable()
    assert isinstance(optimizer, Muon)
    in_blocks = p.buckets[p.blocks[-1]].stop - p.buckets[p.blocks[0]].start
    assert len(optimizer.exp_avg) == len(p.weights)
    assert len(optimizer.exp_avg_sq) == len(p.weights) - in_blocks
    draw_gradients(model, 0)
    take(model)
    state = model.state_dict()["optimizer_state"]
    assert state["exp_avg"].keys() == p.by_name.keys()
    rest = {name for name in p.by_name if p.by_name[name].bucket not in p.blocks}
    assert state["exp_avg_sq"].keys() == rest and "output.weight" in rest
    gradients = dict(model.model.named_gradients())
    for name, square in state["exp_avg_sq"].items():
        torch.testing.assert_close(square, 0.05 * gradients[name] ** 2)
    for name, mean in state["exp_avg"].items():
        decay = 0.1 if name in rest else 0.05
        torch.testing.assert_close(mean, decay * gradients[name])


@pytest.mark.parametrize(("elements", "lengths"), [(10**9, [3]), (10**4, [1, 2]), (1, [1, 1, 1])])
def test_muon_batches(monkeypatch: pytest.MonkeyPatch, elements: int, lengths: list[int]) -> None:
    """Of however many blocks, the update is the same."""
    found = []
    for limit in (muon.BATCH_ELEMENTS, elements):
        monkeypatch.setattr(muon, "BATCH_ELEMENTS", limit)
        model = build()
        draw_gradients(model, 0)
        take(model)
        found.append(model.model.parameters.weights)
    optimizer = model.trainable()
    assert isinstance(optimizer, Muon) and list(map(len, optimizer.batches)) == lengths
    assert [name for batch in optimizer.batches for name in batch] == model.model.parameters.blocks
    torch.testing.assert_close(*found, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("backend", "dtype", "on_cpu", "expected"),
    [
        ("native", torch.float32, torch.bfloat16, torch.bfloat16),
        ("native", torch.bfloat16, torch.float32, torch.float32),
        ("native", torch.float64, torch.bfloat16, torch.float64),
        ("reference", torch.bfloat16, torch.bfloat16, torch.float32),
        ("triton", torch.float32, torch.float32, torch.bfloat16),
    ],
)
def test_muon_dtype(
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    dtype: torch.dtype,
    on_cpu: torch.dtype,
    expected: torch.dtype,
) -> None:
    """That of the products: the processor's fastest, of Triton a GPU's; float64 for float64."""
    monkeypatch.setattr(muon, "resolve_dtype", lambda dtype, device: on_cpu)
    optimizer = build(dtype=dtype, backend=backend).trainable()
    assert isinstance(optimizer, Muon) and optimizer.dtype == expected


def test_muon_options() -> None:
    """From the config's fields to the keywords; the learning rate becomes a ratio."""
    training = TrainingConfig(
        optimizer="muon", learning_rate=2e-3, muon_learning_rate=0.02, muon_momentum=0.9, beta1=0.8
    )
    found = options(training)
    assert (found["rate_ratio"], found["momentum"], found["beta1"]) == (10.0, 0.9, 0.8)
    assert options(TrainingConfig(optimizer="muon"))["rate_ratio"] == 1.0
    assert "rate_ratio" not in options(TrainingConfig(optimizer="adamw"))
    message = r"muon_learning_rate: expected at most 1,000,000 times learning_rate \(1e-30\), got 1"
    with pytest.raises(ConfigError, match=message):
        TrainingConfig.checked({"learning_rate": 1e-30, "muon_learning_rate": 1.0}, "test")


@pytest.mark.parametrize(("saved", "built"), [("adamw", "muon"), ("muon", "adamw")])
def test_load_state_other_optimizer(saved: str, built: str) -> None:
    """As between SGD and AdamW: the weights are taken over, the moments begin at 0."""
    one, other = (
        CustomTransformerWrapper(
            61, 16, 2, 2, max_seq_len=12, dtype=torch.bfloat16, device="cpu", optimizer=name, seed=i
        )
        for i, name in enumerate((saved, built))
    )
    ids = torch.arange(24).view(2, 12)
    assert one.train_step(ids, ids)["status"] == "ok"
    other.load_state_dict(one.state_dict())
    p, q = one.model.parameters, other.model.parameters
    assert torch.equal(p.best_weights(), q.best_weights()) and int(q.updates) == 0
    assert not any(moment.any() for moment in other.trainable().state().values())
    assert other.train_step(ids, ids)["status"] == "ok"
