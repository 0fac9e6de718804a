"""Arguments and fields: what a number may be, and what a wrong one is answered with."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mantrans import CustomTransformerWrapper
from mantrans.config import SECTIONS, Config, ModelConfig
from mantrans.config.arguments import ADAMW, BUILD, DRAWING, MUON, OPTIMIZER, SAMPLING, SHAPE
from mantrans.config.section import SMALLEST_NORMAL, kinds
from mantrans.data.tokenizer import load_tokenizer
from mantrans.errors import ConfigError, DataError
from mantrans.evaluation.evaluator import evaluate
from mantrans.models.sampling import sample
from mantrans.optim import SGD, AdamW, Muon
from mantrans.optim.guards import OutlierGuard
from mantrans.optim.schedule import scheduled_learning_rate
from mantrans.training.trainer import Trainer

V, T = 37, 12
SIZES: dict[str, Any] = {
    "vocab_size": V, "d_model": 16, "n_blocks": 1, "n_heads": 2, "d_ffn": 24, "max_seq_len": T,
}  # fmt: skip
NUMBERS = [
    (section, name)
    for section, model in SECTIONS.items()
    for name, found in model.model_fields.items()
    if float in kinds(found)
]


def build(**options: Any) -> CustomTransformerWrapper:
    return CustomTransformerWrapper(
        **{**SIZES, "dtype": torch.float32, "device": "cpu", "optimizer": "adamw", **options}
    )


@pytest.fixture(scope="module")
def model() -> CustomTransformerWrapper:
    return build()


IDS = torch.arange(2 * T).view(2, T) % V

# ---------------------------------------------------------------------------- fields of a config


def test_config_numbers_all_tried() -> None:
    assert len(NUMBERS) >= 15 and ("evaluation", "top_p") in NUMBERS


@pytest.mark.promise("limits of numbers")
@pytest.mark.parametrize(("section", "name"), NUMBERS)
@pytest.mark.parametrize("value", [5e-324, -5e-324, 1e-310, 1e-46, 1e-40, 1.1e-38])
def test_config_number_float32_zero(section, name, value) -> None:
    override = f"{section}.{name}={value!r}"
    with pytest.raises(ConfigError, match=rf"{section}\.{name}.*expected .*got {value!r}"):
        Config.from_dict({"training": {"max_steps": 1}}, "test", [override])


@pytest.mark.promise("limits of numbers")
@pytest.mark.parametrize("name", ["beta1", "beta2"])
@pytest.mark.parametrize("value", [1 - 2**-26, 1 - 1e-12, 1 - 2**-53])
def test_config_number_float32_limit(name, value) -> None:
    with pytest.raises(ConfigError, match=f"{name}.*which float32 does not hold"):
        Config.from_dict({"training": {"max_steps": 1, name: value}}, "test")
    Config.from_dict({"training": {"max_steps": 1, name: 1 - 2**-24}}, "test")


# ---------------------------------------------------------------------------- sampling

POSITIVE = st.floats(SMALLEST_NORMAL, 1.0) | st.floats(-126, 0).map(lambda power: 2.0**power)


@pytest.mark.promise("limits of numbers")
@given(
    temperature=st.just(0.0) | POSITIVE | st.floats(1.0, 100.0),
    top_p=st.none() | POSITIVE,
    top_k=st.none() | st.integers(1, 2**24),
    min_p=st.none() | POSITIVE,
    repetition_penalty=st.just(1.0) | POSITIVE | st.floats(1.0, 100.0),
    scale=st.sampled_from([1e-45, 1e-30, 1e-3, 1.0, 80.0, 1e4, 1e30, 3e38]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 2**64 - 1),
)
@settings(max_examples=100, deadline=None)
def test_sampling_any_settings(scale, dtype, seed, **values) -> None:
    """Any setting that a config accepts, finite logits of any size."""
    Config.from_dict({"training": {"max_steps": 1}, "evaluation": values}, "test")
    if dtype == torch.float64 and scale == 3e38:
        scale = 1e308
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.rand(3, V, generator=generator, dtype=torch.float64) * 2 - 1) * scale
    logits = logits.to(dtype).nan_to_num()
    drawn = sample(logits, generator, **values, seen=logits > 0)
    assert drawn.shape == (3,) and ((drawn >= 0) & (drawn < V)).all()
    if (
        values["repetition_penalty"] == 1 and values["temperature"] < 1e-6 * scale
    ):  # cold: the probability of any other token underflows
        likely = logits.gather(1, drawn[:, None])[:, 0]
        assert (likely >= logits.max(1).values - 1e-3 * scale).all()


# ---------------------------------------------------------------------------- library arguments


class Door(NamedTuple):
    """A public function, as `call(argument=value)`, with the checks of its arguments."""

    call: Callable[..., Any]
    rules: dict[str, Any]


def doors(model: CustomTransformerWrapper, folder: Path) -> dict[str, Door]:
    ops, p = model.model.ops, model.model.parameters
    one = torch.tensor(1.0)
    return {
        "constructor": Door(build, {**SHAPE, **BUILD}),
        "from_config": Door(
            lambda **k: CustomTransformerWrapper.from_config(model.config, **k), BUILD
        ),
        "from_pretrained": Door(
            lambda **k: CustomTransformerWrapper.from_pretrained(folder, **k), BUILD
        ),
        "from_checkpoint": Door(
            lambda **k: CustomTransformerWrapper.from_checkpoint(folder / "model.pt", **k), BUILD
        ),
        "optimizer_options": Door(lambda **k: build(optimizer_options=k), ADAMW),
        "AdamW": Door(lambda **k: AdamW(ops, p, **k), ADAMW),
        "Muon": Door(lambda **k: Muon(ops, p, **k), MUON),
        "SGD": Door(lambda **k: SGD(ops, p, **k), OPTIMIZER),
        "Optimizer.step": Door(
            lambda **k: model.optimizer.step(one, one, **k), {"max_grad_norm": float | None}
        ),
        "OutlierGuard": Door(
            lambda **k: OutlierGuard(**{"z_score": 3.0, "window": 8, "device": "cpu", **k}),
            {"z_score": float, "window": int},
        ),
        "schedule": Door(
            lambda **k: scheduled_learning_rate(**{"step": 1, "total_steps": 9, "peak": 1.0, **k}),
            {"step": int, "total_steps": int, "peak": float, "minimum": float,
             "warmup_steps": int, "decay": str, "decay_fraction": float},
        ),
        "train_step": Door(
            lambda **k: model.train_step(IDS, IDS, **k),
            {"learning_rate": float, "max_grad_norm": float | None, "micro_batches": int},
        ),
        "accumulate_gradients": Door(
            lambda **k: model.accumulate_gradients(IDS, IDS, **k),
            {"micro_batches": int, "overwrite": bool},
        ),
        "update_parameters": Door(model.model.update_parameters, {"learning_rate": float}),
        "generate": Door(lambda **k: model.generate(IDS[:, :3], **k), SAMPLING),
        "stream": Door(lambda **k: model.stream(IDS[:, :3], **k), SAMPLING),
        "Trainer": Door(
            lambda **k: Trainer(Config(training={"max_steps": 1}), **k),
            {"profile": int, "debug_nan": bool, "check_kernels": bool, "quiet": bool},
        ),
        "evaluate": Door(
            lambda **k: evaluate(model, None, None, None, **k),
            {"max_batches": int | None, "generate": bool, "coherence": bool},
        ),
        "sample": Door(
            lambda **k: sample(torch.zeros(1, 4), torch.Generator(), **k), DRAWING
        ),
    }  # fmt: skip


DOORS = [
    "constructor", "from_config", "from_pretrained", "from_checkpoint", "optimizer_options",
    "AdamW", "Muon", "SGD", "Optimizer.step", "OutlierGuard", "schedule", "train_step",
    "accumulate_gradients", "update_parameters", "generate", "stream",
    "Trainer", "evaluate", "sample",
]  # fmt: skip
# Accepted by no argument at all, but None by some and a bool by some.
WRONG: list[Any] = [
    "x", "1", b"1", -1, -0.5, 1.5e300, 2**70, math.nan, math.inf, [], [1], {}, object(), 1j,
    np.float64("nan"), np.int64(-3), torch.tensor(-2.0), torch.ones(2), lambda: 1,
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    model.save_checkpoint(folder / "model.pt")
    return folder


def may_be(rule: Any, kind: Any) -> bool:
    return str(kind) in str(rule) if kind is None else kind.__name__ in str(rule)


@pytest.mark.promise("wrong arguments")
@pytest.mark.parametrize("door", DOORS)
def test_argument_wrong(model, folder, door: str) -> None:
    """Every argument of every door, with wrong values and types of many kinds."""
    pytest.importorskip("safetensors")
    call, rules = doors(model, folder)[door]
    for name, rule in rules.items():
        wrong = list(WRONG)
        wrong += [] if may_be(rule, None) else [None]
        wrong += [] if may_be(rule, bool) else [True, np.True_]
        wrong += [1.5, np.float32(1.5)] if may_be(rule, int) else []
        if door in ("schedule", "Trainer") and may_be(rule, int):  # no limit above
            wrong.remove(2**70)
        for value in wrong:
            with pytest.raises((ValueError, TypeError)) as refused:
                call(**{name: value})
            message = str(refused.value)
            assert message.startswith(f"{name}: expected "), (name, value, message)
            assert ", got " in message and "\n" not in message


def test_arguments_all_tried(model, folder) -> None:
    assert list(doors(model, folder)) == DOORS


@pytest.mark.parametrize("door", ["from_checkpoint", "from_pretrained", "from_config"])
def test_keyword_unknown(model, folder, door: str) -> None:
    """An unknown keyword is a type error."""
    pytest.importorskip("safetensors")
    with pytest.raises(TypeError, match="colour"):
        doors(model, folder)[door].call(colour=1)


@pytest.mark.parametrize("options", [{"beta3": 0.5}, {"lr": 1.0}, {1: 2}, 5, [("beta1", 0.5)]])
def test_optimizer_options_wrong(options: Any) -> None:
    with pytest.raises(ConfigError, match=r"^optimizer_options: expected a dict of .*beta1"):
        build(optimizer_options=options)


@pytest.mark.parametrize("device", ["x", "meta", 5.5, None, [], "cuda:999", "mps"])
def test_device_wrong(device: Any) -> None:
    with pytest.raises(ConfigError, match=r"^device: expected"):
        build(device=device)


@pytest.mark.parametrize("dtype", ["x", "float16", torch.int64, 5, None, [], float])
def test_dtype_wrong(model, folder, dtype: Any) -> None:
    for make in (build, doors(model, folder)["from_checkpoint"].call):
        with pytest.raises(ConfigError, match=r"^dtype: expected"):
            make(dtype=dtype)


@pytest.mark.parametrize("path", [5, None, b"x", [], 1.5])
def test_path_wrong(model, path: Any) -> None:
    for call in (
        model.save_checkpoint, model.load_checkpoint, model.from_checkpoint, model.save_pretrained,
        model.from_pretrained,
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=r"^(path|directory): expected a file's path, got"):
            call(path)


def test_numbers_numpy_and_torch(tmp_path: Path) -> None:
    sizes = {name: np.int64(size) for name, size in SIZES.items()}
    plain = build(seed=3)
    model = build(**sizes, seed=np.uint8(3), layer_norm_epsilon=np.float64(1e-5))
    assert model.config == plain.config and type(model.config.d_model) is int
    model.save_checkpoint(tmp_path / "model.pt")
    options = {"max_length": 9, "temperature": 0.5, "top_k": 4, "seed": 1}
    others = {name: np.asarray(value)[()] for name, value in options.items()}
    assert torch.equal(model.generate(IDS, **options), plain.generate(IDS, **others))
    result = model.train_step(IDS, IDS, np.float32(1e-3), torch.tensor(1.0), np.int32(2))
    assert result["status"] == "ok"


# ---------------------------------------------------------------------------- tensors

FEW = torch.tensor([[1, 2, 3]])
NO_IDS: list[Any] = [
    FEW.float(), FEW.bool(), FEW.to(torch.complex64), FEW.bfloat16(), FEW[0, 0], FEW[None], FEW - 2,
    FEW + V, FEW[:, :0], FEW.to("meta"), FEW.to_sparse(), None, 5, "abc", {}, np.ones((1, 3)),
]  # fmt: skip


@pytest.mark.promise("wrong arguments")
@pytest.mark.parametrize("wrong", NO_IDS, ids=lambda x: type(x).__name__)
def test_batch_wrong(model, wrong: Any) -> None:
    before = model.model.parameters.weights.clone()
    for name, call in (
        ("input_ids", lambda: model.forward(wrong)),
        ("input_ids", lambda: model.train_step(wrong, FEW)),
        ("input_ids", lambda: model.generate(wrong)),
        ("labels", lambda: model.forward(FEW, wrong)),
        ("labels", lambda: model.train_step(FEW, wrong)),
        ("tokens", lambda: model.model.forward(wrong)),
    ):
        if name == "labels" and wrong is None:  # forward's default
            continue
        with pytest.raises((ValueError, TypeError), match=rf"^{name}: expected .*got "):
            call()
    assert torch.equal(model.model.parameters.weights, before)


@pytest.mark.promise("wrong arguments")
@pytest.mark.parametrize(
    "wrong", [[[1.5]], [1, 2], [[1], ["a"]], [[2**70]], [[None]], [[[1]]], [[]], [[True]], "a", 5]
)
def test_prompt_wrong(model, wrong: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"^input_ids: expected .*got "):
        model.generate(wrong)


@pytest.mark.parametrize("text", ["Once upon a time", ["Once", "upon"], ("Once",), ""])
def test_prompt_text(model, text: Any) -> None:
    """The message names the tokenizer."""
    with pytest.raises(TypeError, match="load_tokenizer"):
        model.generate(text)


def test_backward_wrong_gradient(model) -> None:
    """A wrong gradient of the logits is refused."""
    for wrong in (torch.zeros(2, T, V + 1), torch.zeros(2 * T, V), None, 1.0):
        model.model.forward(IDS)
        with pytest.raises(ValueError, match=rf"dlogits: expected a tensor of shape \(2, {T}, {V}"):
            model.model.backward(wrong)
    model.model.backward(torch.zeros(2, T, V))  # the forward's values are still there
    with pytest.raises(ValueError, match="max_seq_len"):
        model.model.forward(torch.zeros(1, T + 1, dtype=torch.int64))


# ---------------------------------------------------------------------------- what is said


def test_end_of_text_outside_vocabulary(model) -> None:
    with pytest.raises(ValueError, match=f"eos_token_id: expected below the vocabulary's {V}"):
        model.generate(FEW, eos_token_id=V)


def test_model_repr(model) -> None:
    """A model's repr says what it is."""
    text = repr(model)
    for fact in ("vocab_size=37", "n_blocks=1", "d_ffn=24", "dtype=float32", "device=cpu",
                 "backend=native", "optimizer=adamw"):  # fmt: skip
        assert fact in text
    assert "optimizer=None" in repr(build(inference=True)) and "\n" not in text
    assert "d_ffn=64" in repr(build(d_ffn=None))


def test_dtype_default(folder) -> None:
    """Of a new model; one that is loaded from transformers' format is float32."""
    assert CustomTransformerWrapper(**SIZES, device="cpu").dtype == torch.bfloat16
    auto = CustomTransformerWrapper(**SIZES, device="cpu", dtype="auto").dtype
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert auto == (torch.bfloat16 if native else torch.float32)
    pytest.importorskip("safetensors")
    loaded = CustomTransformerWrapper.from_pretrained(folder, device="cpu")
    assert (loaded.dtype, loaded.optimizer_name) == (torch.float32, "sgd")


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32], ids=str)
def test_generate_greedy_with_cache(backend: str, dtype: torch.dtype) -> None:
    """In bfloat16 they need not be: `generate` says why."""
    for seed in range(4):
        model = build(backend=backend, dtype=dtype, seed=seed, initializer_range=0.3)
        prompts = [IDS[0, :4], IDS[1, :7], IDS[1, :1]]
        options = {"max_length": 40, "temperature": 0}
        cached = model.generate(prompts, **options)
        assert all(map(torch.equal, cached, model.generate(prompts, **options, use_cache=False)))


def test_vocab_size_missing() -> None:
    for config in (ModelConfig(), None, {}, 5):
        with pytest.raises(ConfigError, match=r"^config: expected a ModelConfig with a vocab_size"):
            CustomTransformerWrapper.from_config(config)


def broken_states(state: dict[str, Any]) -> dict[str, Any]:
    """Each item of a state missing or of another kind; {what is named: state}."""
    found: dict[str, Any] = {"model_config": None}
    for name in state:
        found[name] = {**state, name: None}
    moments = {**state["optimizer_state"], "exp_avg": [1.0]}
    return found | {"exp_avg": {**state, "optimizer_state": moments}}


def test_load_state_wrong() -> None:
    """It is refused, and nothing changes."""
    model = build()
    state, before = model.state_dict(), model.model.parameters.weights.clone()
    for name, broken in broken_states(state).items():
        with pytest.raises((ValueError, TypeError), match=rf"^{name}: expected .*got"):
            model.load_state_dict(broken)
    for name in ("model_config", "parameters", "optimizer"):
        with pytest.raises((ValueError, TypeError), match=rf"^{name}: expected .*got"):
            CustomTransformerWrapper.from_state_dict({**state, name: [1]}, device="cpu")
    name, value = next(iter(state["parameters"].items()))
    broken = {**state, "parameters": {**state["parameters"], name: value.tolist()}}
    with pytest.raises(TypeError, match=f"^{name}: expected a Tensor"):
        model.load_state_dict(broken)
    assert torch.equal(model.model.parameters.weights, before)


def test_gradients_absent() -> None:
    """A model without gradients says so."""
    model = build(inference=True).model
    for call in (
        lambda: model.update_parameters(0.1), model.zero_gradients,
        lambda: dict(model.named_gradients()),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="expected a model with gradients, got inference"):
            call()


@pytest.mark.parametrize("wrong", [1.0, None, "x", [1.0], torch.ones(2), torch.ones(1, 1)])
def test_optimizer_wants_0_d_tensors(model, wrong: Any) -> None:
    one = torch.tensor(1.0)
    for name, arguments in (("loss", (wrong, one)), ("learning_rate", (one, wrong))):
        with pytest.raises(TypeError, match=f"^{name}: expected a 0-d tensor, got "):
            model.optimizer.step(*arguments)


@pytest.mark.parametrize(
    "ids", [[1.7], ["a"], "ab", 5, None, [None], [[1]], torch.ones(2), np.ones(2), [-1], [2**70]]
)
def test_decode_wrong_ids(ids: Any) -> None:
    tokenizer = load_tokenizer("tinystories_bpe_4096")
    with pytest.raises(DataError, match="expected token ids"):
        tokenizer.decode(ids)
    for good in ([300, 301], torch.tensor([300, 301]), np.array([300, 301]), (300, np.uint16(301))):
        assert tokenizer.decode(good) == tokenizer.decode([300, 301])
