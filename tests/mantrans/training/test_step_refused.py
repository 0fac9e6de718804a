"""A step that is not finite in any of its numbers, or has no target, changes nothing."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from mantrans import CustomTransformerWrapper
from mantrans.errors import CheckpointError, ConfigError
from mantrans.kernels.reference import IGNORE_INDEX
from mantrans.optim.optimizer import StepOutcome
from mantrans.training.batches import HostTokens
from mantrans.training.step import TrainStep
from mantrans.wrapper import mean_scale

V, T = 31, 8
IDS = torch.arange(2 * T).view(2, T) % V
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
KINDS = [  # backend, dtype, optimizer, stochastic rounding
    ("native", torch.float32, "adamw", False),
    ("native", torch.bfloat16, "adamw", False),
    ("native", torch.bfloat16, "sgd", False),
    ("native", torch.bfloat16, "adamw", True),
    ("native", torch.float64, "sgd", False),
    ("native", torch.float32, "muon", False),
    ("native", torch.bfloat16, "muon", True),
    ("reference", torch.float64, "muon", False),
    ("reference", torch.float32, "sgd", False),
    ("reference", torch.bfloat16, "adamw", False),
    ("reference", torch.bfloat16, "sgd", True),
    ("reference", torch.float64, "adamw", False),
]


def build(backend="native", dtype=torch.float32, optimizer="adamw", stochastic=False, **more: Any):
    """A model after one step, so that its moments are not 0."""
    wrapper = CustomTransformerWrapper(
        vocab_size=V, d_model=16, n_blocks=1, n_heads=2, d_ffn=24, max_seq_len=T, device="cpu",
        dtype=dtype, backend=backend, optimizer=optimizer, stochastic_rounding=stochastic, **more,
    )  # fmt: skip
    wrapper.train_step(IDS, IDS)
    return wrapper


def everything(wrapper: CustomTransformerWrapper) -> dict[str, Tensor]:
    """All that a step may change."""
    p = wrapper.model.parameters
    found = {"weights": p.weights, "updates": p.updates, **wrapper.optimizer.state()}
    found |= {} if p.master is None else {"master": p.master}
    return {name: x.clone() for name, x in found.items()}


def unchanged(wrapper: CustomTransformerWrapper, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(x, before[name]) for name, x in everything(wrapper).items())


NAN, INF = float("nan"), float("inf")
# Numbers of a step; a text is a power of the largest number of the dtype in which it is computed.
BAD_STEPS: dict[str, dict[str, Any]] = {
    "rate nan": {"rate": NAN},
    "rate inf": {"rate": INF},
    "rate -inf": {"rate": -INF},
    "rate times gradient": {"rate": "0.95", "gradient": "0.3", "norm": None},
    "rate times decay": {"rate": "0.999", "decay": 100.0},
    "loss nan": {"loss": NAN},
    "loss inf": {"loss": INF},
    "gradient nan": {"gradient": NAN},
    "gradient inf": {"gradient": -INF},
    "gradient nan, no clip": {"gradient": NAN, "norm": None},
    "gradient inf, no clip": {"gradient": INF, "norm": None},
    "gradient squared": {"gradient": "0.6", "norm": None},
    "largest gradient": {"gradient": "1.0", "norm": None},
}


def bad_step(wrapper: CustomTransformerWrapper, bad: dict[str, Any]) -> StepOutcome:
    """The optimizer's step with these numbers; one element has the gradient given."""
    p = wrapper.model.parameters
    wrapper.optimizer.weight_decay = bad.get("decay", 0.1)
    p.gradients.zero_()

    def number(name: str) -> Tensor:
        value = bad.get(name, 1.0)
        if isinstance(value, str):
            value = torch.finfo(p.wide).max ** float(value)
        return p.gradients.new_tensor(value)

    p.gradients[p.offset("blocks.0.mlp.up.weight") + 3] = number("gradient")
    norm = bad.get("norm", "configured")
    return wrapper.optimizer.step(number("loss"), number("rate"), max_grad_norm=norm)


@pytest.mark.promise("NaN and infinity")
@pytest.mark.parametrize(("backend", "dtype", "optimizer", "stochastic"), KINDS)
def test_step_not_finite(backend, dtype, optimizer, stochastic) -> None:
    """It changes nothing."""
    wrapper = build(backend, dtype, optimizer, stochastic)
    before = everything(wrapper)
    for name, bad in BAD_STEPS.items():
        assert not bad_step(wrapper, bad).applied and unchanged(wrapper, before), name
    assert bad_step(wrapper, {}).applied and not unchanged(wrapper, before)


@pytest.mark.promise("rates and empty batches")
@pytest.mark.parametrize("rate", [NAN, INF, -1.0, 1e300, 100.1, -1e-9, 1e-40])
def test_step_impossible_rate(rate: float) -> None:
    """It is refused before the step."""
    wrapper = build()
    before = everything(wrapper)
    for call in (
        lambda: wrapper.train_step(IDS, IDS, rate),
        lambda: wrapper.model.update_parameters(rate),
    ):
        with pytest.raises(ConfigError, match=r"^learning_rate: expected .*got "):
            call()
    assert unchanged(wrapper, before)


@pytest.mark.promise("rates and empty batches")
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gradient", [float("nan"), float("inf"), -float("inf")])
def test_update_parameters_not_finite(backend, dtype, gradient: float) -> None:
    """Nothing changes."""
    wrapper = build(backend, dtype)
    p, before = wrapper.model.parameters, everything(wrapper)
    p.gradients[5] = gradient
    wrapper.model.update_parameters(0.1)
    assert unchanged(wrapper, before)
    p.gradients[5] = 1.0
    wrapper.model.update_parameters(0.1)
    assert not unchanged(wrapper, before) and p.updates == before["updates"] + 1


# ------------------------------------------------------------------------------ without targets

NO_TARGETS = {
    "all ignored": (IDS, torch.full_like(IDS, IGNORE_INDEX)),
    "one token a row": (IDS[:, :1], IDS[:, :1]),
    "only the first": (IDS, IDS.where(torch.arange(T) == 0, IGNORE_INDEX)),
}


@pytest.mark.promise("rates and empty batches")
@pytest.mark.parametrize(("backend", "dtype", "optimizer", "stochastic"), KINDS)
def test_train_step_no_targets(caplog, backend, dtype, optimizer, stochastic) -> None:
    """Nothing changes, and it is logged."""
    wrapper = build(backend, dtype, optimizer, stochastic)
    before = everything(wrapper)
    for micro_batches in (1, 2):
        for name, batch in NO_TARGETS.items():
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                result = wrapper.train_step(*batch, micro_batches=micro_batches)
            assert result == {"loss": 0.0, "status": "ok", "grad_norm": 0.0}
            assert unchanged(wrapper, before) and "no label is a target" in caplog.text, name
            assert not any(g.any() for _, g in wrapper.model.named_gradients())


def test_train_step_one_target() -> None:
    wrapper = build()
    before = everything(wrapper)
    wrapper.train_step(IDS, IDS.where(torch.arange(T) == 3, IGNORE_INDEX))
    assert not unchanged(wrapper, before)
    assert mean_scale(torch.tensor([IGNORE_INDEX]), torch.float32) == 0
    assert mean_scale(torch.tensor([3, IGNORE_INDEX, 4]), torch.float32) == 0.5


class Source(HostTokens):
    """Every second batch has no target."""

    def __init__(self) -> None:
        self.step = 0

    def load(self, step: int) -> None:
        self.step = step

    def rows(self) -> Tensor:
        return torch.arange(2 * (T + 1)).view(2, T + 1) % V


@pytest.mark.promise("rates and empty batches")
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_step_no_targets(monkeypatch, micro_batches: int) -> None:
    """Nothing changes."""
    wrapper, source = build(), Source()
    step = TrainStep(
        wrapper.model, wrapper.optimizer, source, micro_batches=micro_batches, history=8
    )
    whole = step.batch

    def batch():
        for part in whole():
            if source.step % 2:
                yield part._replace(
                    targets=torch.full_like(part.targets, IGNORE_INDEX), scale=part.scale * 0
                )
            else:
                yield part

    monkeypatch.setattr(step, "batch", batch)
    for number in range(4):
        before = everything(wrapper)
        step.run(number, 1e-2)
        assert unchanged(wrapper, before) == (number % 2 == 1)
    records = step.read()
    assert [r.applied for r in records] == [True, False, True, False]
    assert [r.loss == r.grad_norm == 0 for r in records] == [False, True, False, True]


# ------------------------------------------------------------------------------ another function

GPT2: dict[str, Any] = {
    "vocab_size": V, "d_model": 16, "n_blocks": 1, "n_heads": 2, "d_ffn": 24, "max_seq_len": T,
}  # fmt: skip
ROPE = {**GPT2, "position": "rope"}
SCALED = {**ROPE, "rope_scaling_factor": 8.0}
# The field, another value, and the model that it would have been.
OTHERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "n_heads": (4, GPT2), "layer_norm_epsilon": (1e-3, GPT2), "tie_embeddings": (False, GPT2),
    "bias": (False, GPT2), "d_model": (32, GPT2), "n_blocks": (2, GPT2), "d_ffn": (48, GPT2),
    "max_seq_len": (16, GPT2), "vocab_size": (32, GPT2), "n_kv_heads": (1, GPT2),
    "head_dim": (4, GPT2), "norm": ("rms_norm", GPT2), "position": ("rope", GPT2),
    "mlp": ("swiglu", GPT2), "qk_norm": (True, GPT2), "attention_window": (3, GPT2),
    "qkv_bias": (False, GPT2), "projection_bias": (False, GPT2), "mlp_bias": (False, GPT2),
    "rope_theta": (5e5, ROPE), "rope_scaling_factor": (8.0, ROPE),
    "rope_low_freq_factor": (2.0, SCALED), "rope_high_freq_factor": (8.0, SCALED),
    "rope_original_length": (64, SCALED),
}  # fmt: skip


def test_function_fields_all_tried() -> None:
    known = {*OTHERS, "dtype", "initializer_range"}
    assert known == set(build().config.model_fields_set | type(build().config).model_fields.keys())


@pytest.mark.promise("another function")
@pytest.mark.parametrize("name", OTHERS)
def test_load_checkpoint_other_function(tmp_path, name: str) -> None:
    """Also where every shape fits, as with n_heads: the field, what is expected, what it is."""
    value, shape = OTHERS[name]
    kind = {"device": "cpu", "dtype": torch.float32, "optimizer": "adamw"}
    CustomTransformerWrapper(**shape, **kind).save_checkpoint(tmp_path / "model.pt")
    other = CustomTransformerWrapper(**{**shape, name: value}, **kind, seed=9)
    before = everything(other)
    with pytest.raises(CheckpointError, match=rf"^{name}: expected .*, as in the checkpoint, got "):
        other.load_checkpoint(tmp_path / "model.pt")
    assert unchanged(other, before)


def test_load_checkpoint_same_function(tmp_path) -> None:
    """What does not change the function is loaded."""
    saved = CustomTransformerWrapper(V, 16, 1, 2, None, T, device="cpu", dtype=torch.float32)
    saved.save_checkpoint(tmp_path / "model.pt")
    other = CustomTransformerWrapper(
        V, 16, 1, 2, 64, T, device="cpu", dtype=torch.bfloat16, initializer_range=0.1,
        n_kv_heads=2, head_dim=8, qkv_bias=True, rope_theta=7.0, rope_original_length=9,
    )  # fmt: skip
    other.load_checkpoint(tmp_path / "model.pt")
    assert torch.equal(other.model.parameters.master, saved.model.parameters.weights)
