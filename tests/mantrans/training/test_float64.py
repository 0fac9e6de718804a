"""A float64 model stays float64 to the end: a run beside one written down anew with autograd.

The run is the trainer's own: accumulation, clipping, schedule, guard, validation, checkpoint. The
other one below has the formulas and PyTorch's autograd, and nothing of `mantrans` but the run's
first weights and its batches. 1e-13 is a few hundred roundings of 1.1e-16; one number that passes
through float32 on the way costs 1e-8. The keys' bias has no gradient but rounding noise, which
AdamW would blow up to full steps: its epsilon is 1e-3 here, against which 1e-17 is nothing.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mantrans import CustomTransformerWrapper
from mantrans.checkpoint import state_file
from mantrans.config import ModelConfig
from mantrans.kernels.backend import choose
from mantrans.records import read_records
from mantrans.training.trainer import Trainer
from tests.support.runs import checkpoints, metrics_file, small

TOLERANCE = 1e-13
STEPS, WARM_UP, PEAK, LIMIT = 6, 2, 5e-3, 0.05
BETA1, BETA2, EPSILON, DECAY = 0.9, 0.95, 1e-3, 0.1


def largest_error(actual: Any, expected: Any) -> float:
    """The largest difference, relative to the largest expected magnitude."""
    actual, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, expected))
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


# ------------------------------------------------------------------ the model, from its formulas


def norm(x: Tensor, w: dict[str, Tensor], name: str, epsilon: float) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    variance = centered.square().mean(-1, keepdim=True)
    return centered / (variance + epsilon).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def attended(x: Tensor, w: dict[str, Tensor], name: str, H: int, seen: Tensor) -> Tensor:
    q, k, v = (
        part.unflatten(-1, (H, -1)).transpose(1, 2)
        for part in linear(x, w, f"{name}.qkv").chunk(3, -1)
    )
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~seen[:, None], -math.inf)
    return linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), w, f"{name}.projection")


def gelu(u: Tensor) -> Tensor:
    return 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))


def logits_of(w: dict[str, Tensor], tokens: Tensor, config: ModelConfig, eot: int) -> Tensor:
    """tokens (B, T) -> (B, T, V), attention inside documents, which end with `eot`."""
    document = (tokens == eot).cumsum(1).roll(1, 1)
    document[:, 0] = 0
    seen = (document[:, :, None] == document[:, None, :]).tril()
    x = w["token_embedding.weight"][tokens] + w["position_embedding.weight"][: tokens.shape[1]]
    for i in range(config.n_blocks):
        name, epsilon = f"blocks.{i}", config.layer_norm_epsilon
        y = norm(x, w, f"{name}.norm_1", epsilon)
        x = x + attended(y, w, f"{name}.attention", config.n_heads, seen)
        y = norm(x, w, f"{name}.norm_2", epsilon)
        x = x + linear(gelu(linear(y, w, f"{name}.mlp.up")), w, f"{name}.mlp.down")
    y = norm(x, w, "final_norm", config.layer_norm_epsilon)
    return y @ w["token_embedding.weight"].T


def loss_of(w: dict[str, Tensor], rows: Tensor, config: ModelConfig, eot: int) -> Tensor:
    """The mean loss of rows (B, T+1)."""
    log_p = logits_of(w, rows[:, :-1], config, eot).log_softmax(-1)
    return -log_p.gather(-1, rows[:, 1:, None]).mean()


def rate_of(step: int) -> float:
    """Linear warm-up, then half a cosine down to 0 at the last step."""
    if step < WARM_UP:
        return PEAK * (step + 1) / WARM_UP
    return PEAK * 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / (STEPS - 1 - WARM_UP)))


class Expected:
    """The run written down anew: what it would log, and the weights that it ends with."""

    def __init__(self, trainer: Trainer, optimizer: str) -> None:
        self.weights = {n: x.clone() for n, x in trainer.wrapper.model.named_parameters()}
        self.m = {name: torch.zeros_like(x) for name, x in self.weights.items()}
        self.v = {name: torch.zeros_like(x) for name, x in self.weights.items()}
        self.records: list[tuple[float, float, float]] = []
        batches = [trainer.loader.batch(step) for step in range(STEPS)]
        eot = trainer.tokenizer.eot_id
        assert any((rows == eot).any() for rows in batches), "no document ends in these batches"
        for step, rows in enumerate(batches):
            leaves = {name: x.clone().requires_grad_() for name, x in self.weights.items()}
            loss = loss_of(leaves, rows, trainer.wrapper.config, eot)
            gradients = dict(
                zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)
            )
            size = torch.cat([g.flatten() for g in gradients.values()]).norm().item()
            clip = min(1.0, LIMIT / (size + 1e-6))
            assert clip < 1, "nothing is clipped"
            self.records.append((loss.item(), size, rate_of(step)))
            for name, g in gradients.items():
                self.update(name, g * clip, optimizer, step + 1, rate_of(step))

    def update(self, name: str, g: Tensor, optimizer: str, t: int, rate: float) -> None:
        decay = DECAY if g.dim() > 1 else 0.0
        w, m, v = (values[name] for values in (self.weights, self.m, self.v))
        m.mul_(BETA1).add_((1 - BETA1) * g)
        v.mul_(BETA2).add_((1 - BETA2) * g * g)
        if optimizer == "adamw":
            g = m / (1 - BETA1**t) / ((v / (1 - BETA2**t)).sqrt() + EPSILON)
        w.sub_(rate * (decay * w + g))


# --------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize(
    ("optimizer", "backend", "recompute"),
    [
        ("adamw", "reference", "none"),
        ("adamw", "native", "block"),
        ("sgd", "reference", "block"),
        ("sgd", "native", "none"),
    ],
)
def test_train_float64(tmp_path: Path, optimizer: str, backend: str, recompute: str) -> None:
    """A float64 run equals one by autograd."""
    config = small(
        tmp_path, tmp_path / "tokens", max_steps=STEPS, warmup_steps=WARM_UP, learning_rate=PEAK,
        log_every=1, eval_every=STEPS, save_every=STEPS, max_grad_norm=LIMIT, optimizer=optimizer,
        backend=backend, gradient_accumulation_steps=3, weight_decay=DECAY, beta1=BETA1,
        beta2=BETA2, epsilon=EPSILON, outlier_z_score=9.0, outlier_window=8, recompute=recompute,
        model={"dtype": "float64", "n_blocks": 2}, data={"attend_across_documents": False},
    )  # fmt: skip
    trainer = Trainer(config, quiet=True)
    expected = Expected(trainer, optimizer)
    trainer.run()

    records = [r for r in read_records(metrics_file(tmp_path)) if "grad_norm" in r]
    logged = [(r["loss"], r["grad_norm"], r["learning_rate"]) for r in records]
    for column in range(3):
        actual, wanted = ([row[column] for row in rows] for rows in (logged, expected.records))
        assert largest_error(actual, wanted) <= TOLERANCE
    state = state_file.load(checkpoints(tmp_path) / "latest.pt")
    for name, value in state["parameters"].items():
        assert value.dtype == torch.float64
        assert largest_error(value, expected.weights[name]) <= TOLERANCE, name
    for moments, wanted in (("exp_avg", expected.m), ("exp_avg_sq", expected.v)):
        for name, value in state["optimizer_state"].get(moments, {}).items():
            scale = max(x.abs().max() for x in wanted.values())  # that of all: see the keys' bias
            assert (value - wanted[name]).abs().max() <= TOLERANCE * scale, (moments, name)


class Narrow(TorchDispatchMode):
    """The operations that return numbers of fewer bits than float64."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64:
                self.found.add(str(function))
        return result


def model(backend: str = "native", **options: Any) -> CustomTransformerWrapper:
    return CustomTransformerWrapper(
        vocab_size=37, d_model=16, n_blocks=2, n_heads=2, max_seq_len=12, dtype=torch.float64,
        device="cpu", backend=backend, **options,
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_model_float64_results(tmp_path: Path, optimizer: str, backend: str) -> None:
    """Every door of a model: steps, loss, logits, sampling, saving, loading."""
    ours = model(backend, optimizer=optimizer)
    ids = torch.randint(0, 37, (4, 12), generator=torch.Generator().manual_seed(0))
    ours.model.forward(ids)  # what libraries set up at their first call is not ours
    with Narrow() as narrow:
        for limit in (None, 0.01, "configured"):
            ours.train_step(ids, ids, learning_rate=1e-3, max_grad_norm=limit, micro_batches=2)
        ours.forward(ids, ids)
        ours.model.forward(ids)
        ours.model.backward(torch.ones(4, 12, 37, dtype=torch.float64))
        ours.model.update_parameters(1e-3)
        ours.model.losses(ids, ids)
        for cache in (True, False):
            ours.generate(ids[:2], max_length=20, temperature=0.7, top_k=9, use_cache=cache)
            ours.generate(ids[:2], max_length=20, top_p=0.9, use_cache=cache)
        ours.save_checkpoint(tmp_path / "x.pt")
        ours.load_checkpoint(tmp_path / "x.pt")
        ours.save_pretrained(tmp_path / "folder")
    assert not narrow.found


def test_save_float64(tmp_path: Path) -> None:
    """Saved weights come back bit for bit."""
    pytest.importorskip("safetensors")
    ours = model(optimizer="adamw")
    for name, value in ours.model.named_parameters():
        ours.model.parameters.write(name, torch.rand(value.shape, dtype=torch.float64))
    ids = torch.randint(0, 37, (4, 12))
    ours.train_step(ids, ids)
    ours.save_checkpoint(tmp_path / "x.pt")
    ours.save_pretrained(tmp_path / "folder")
    loaded = [
        CustomTransformerWrapper.from_checkpoint(tmp_path / "x.pt"),
        CustomTransformerWrapper.from_pretrained(tmp_path / "folder", dtype="float64"),
    ]
    for other in loaded:
        theirs = dict(other.model.named_parameters())
        assert all(torch.equal(x, theirs[name]) for name, x in ours.model.named_parameters())
    assert torch.equal(loaded[0].optimizer.exp_avg_sq, ours.optimizer.exp_avg_sq)


def test_triton_float64() -> None:
    """On a GPU `auto` computes it natively, and asking for Triton is refused in one line."""
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    for device in (cuda, cpu):
        assert choose("auto", device, torch.float64).__name__ == "mantrans.kernels.native"
    with pytest.raises(ValueError, match=r"^backend: expected native or reference for float64"):
        choose("triton", cuda, torch.float64)
    with pytest.raises(ValueError, match=r"^backend: expected native or reference for float64"):
        model("triton")
