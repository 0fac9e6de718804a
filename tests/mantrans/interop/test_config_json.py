"""config.json of transformers 4.57 and 5: published ones are accepted as they are, and every field
that changes what the weights compute is either expressed or refused in one line."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from mantrans.config import ModelConfig
from mantrans.errors import CheckpointError, ConfigError
from mantrans.interop import config_json

# As published on the Hugging Face hub, without fields of no function.
SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 576,
    "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": True,
    "max_position_embeddings": 8192, "model_type": "llama", "num_attention_heads": 9,
    "num_hidden_layers": 30, "num_key_value_heads": 3, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.40.1",
    "use_cache": True, "vocab_size": 49152,
}  # fmt: skip
TINYLLAMA_1B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 5632, "max_position_embeddings": 2048, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 22, "num_key_value_heads": 4,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
LLAMA32 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu",
    "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192,
    "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
    "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
QWEN25_05B = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
    "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24,
    "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "use_cache": True, "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 1024, "initializer_range": 0.02, "intermediate_size": 3072,
    "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
PUBLISHED = {
    "SmolLM2-135M": (SMOLLM2_135M, {
        "d_model": 576, "n_blocks": 30, "n_heads": 9, "n_kv_heads": 3, "head_dim": 64,
        "d_ffn": 1536, "max_seq_len": 8192, "rope_theta": 1e5, "layer_norm_epsilon": 1e-5,
        "tie_embeddings": True, "qkv_bias": False, "qk_norm": False, "vocab_size": 49152,
        "initializer_range": 0.041666666666666664,
    }),
    "TinyLlama-1.1B": (TINYLLAMA_1B, {
        "d_model": 2048, "n_kv_heads": 4, "head_dim": 64, "d_ffn": 5632, "rope_theta": 1e4,
        "tie_embeddings": False, "mlp_bias": False,
    }),
    "Llama-3.2-1B": (LLAMA32, {
        "n_kv_heads": 8, "max_seq_len": 131072, "rope_theta": 5e5, "rope_scaling_factor": 32.0,
        "rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0, "rope_original_length": 8192,
    }),
    "Qwen2.5-0.5B": (QWEN25_05B, {
        "n_heads": 14, "n_kv_heads": 2, "head_dim": 64, "rope_theta": 1e6, "attention_window": None,
        "layer_norm_epsilon": 1e-6, "qkv_bias": True, "projection_bias": False, "qk_norm": False,
    }),
    "Qwen3-0.6B": (QWEN3_06B, {
        "d_model": 1024, "n_heads": 16, "head_dim": 128, "n_kv_heads": 8, "qk_norm": True,
        "qkv_bias": False, "max_seq_len": 40960, "attention_window": None,
    }),
}  # fmt: skip


def read(fields: dict[str, Any]) -> ModelConfig:
    """The config of a folder whose config.json has these fields, as JSON would give them."""
    return ModelConfig(**config_json.read(json.loads(json.dumps(fields)), "config.json")[1])


def resolved(fields: dict[str, Any]) -> dict[str, Any]:
    return read(fields).resolved()


@pytest.mark.parametrize("name", PUBLISHED)
def test_read_published(name) -> None:
    fields, expected = PUBLISHED[name]
    found = resolved(fields)
    expected = {"norm": "rms_norm", "position": "rope", "mlp": "swiglu", "bias": False, **expected}
    assert {field: found[field] for field in expected} == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_write_then_read(name) -> None:
    config = read(PUBLISHED[name][0])
    family = config_json.family_of(config)
    assert [family.architecture] == PUBLISHED[name][0]["architectures"]
    assert read(config_json.write(family, config)).resolved() == config.resolved()


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_reads_alike(name) -> None:
    """Its config class reads the published fields, ours, and those that it writes itself."""
    transformers = pytest.importorskip("transformers", reason="it is the oracle here")
    published = PUBLISHED[name][0]
    config = read(published)
    written = config_json.write(config_json.family_of(config), config)
    kind = type(transformers.AutoConfig.for_model(published["model_type"]))
    expected, got = (kind.from_dict(copy.deepcopy(fields)) for fields in (published, written))
    fields = [*config_json.family_of(config).fields.values(), "rope_parameters", "hidden_act"]
    fields += ["layer_types"] if hasattr(expected, "layer_types") else []
    for field in fields:
        if field != "head_dim":  # a Qwen2 has it only where its config says so
            assert getattr(got, field) == getattr(expected, field), field
    assert resolved(expected.to_dict()) == config.resolved()  # version 5's fields
    assert "rope_parameters" in expected.to_dict()


# ----------------------------------------------------------------------------------- RoPE's fields

LLAMA3 = LLAMA32["rope_scaling"]
V5 = {"rope_theta": ..., "rope_scaling": ...}
ROPES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"rope_theta": ..., "rope_scaling": ...}, {"rope_theta": 1e4, "rope_scaling_factor": None}),
    ({**V5, "rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}, {"rope_theta": 5.0}),
    ({**V5, "rope_parameters": {"rope_theta": 5.0}}, {"rope_theta": 5.0}),
    (
        {**V5, "rope_parameters": {**LLAMA3, "rope_theta": 5e5, "partial_rotary_factor": 1.0}},
        {"rope_theta": 5e5, "rope_scaling_factor": 32.0, "rope_original_length": 8192},
    ),
    ({"rope_scaling": {"type": "default"}}, {"rope_theta": 5e5, "rope_scaling_factor": None}),
    ({"rope_scaling": {**LLAMA3, "rope_theta": 5e5}}, {"rope_scaling_factor": 32.0}),
    ({"rope_parameters": LLAMA3}, {"rope_theta": 5e5, "rope_scaling_factor": 32.0}),
]


def changed(fields: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Fields with others in their place; `...` removes one."""
    return {name: value for name, value in {**fields, **changes}.items() if value is not ...}


@pytest.mark.parametrize(("changes", "expected"), ROPES, ids=lambda x: str(x)[:60])
def test_rope_forms(changes, expected) -> None:
    found = resolved(changed(LLAMA32, changes))
    assert {field: found[field] for field in expected} == expected


# ---------------------------------------------------------------------------------- sliding window

QWEN = changed(QWEN3_06B, {"num_hidden_layers": 2})
FULL, SLIDING = "full_attention", "sliding_attention"
WINDOWS: list[tuple[dict[str, Any], int | None]] = [
    ({}, None),
    ({"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}, 7),
    ({"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}, None),
    ({"use_sliding_window": True, "sliding_window": ..., "max_window_layers": ...}, None),
    ({"use_sliding_window": True, "sliding_window": ..., "max_window_layers": 0}, 4096),
    ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, None),
    ({"use_sliding_window": False, "sliding_window": 7, "max_window_layers": 1}, None),
    ({"layer_types": [FULL, FULL]}, None),
    ({"layer_types": [FULL, FULL], "use_sliding_window": True, "sliding_window": 7}, None),
    ({"layer_types": [SLIDING] * 2, "use_sliding_window": True, "sliding_window": 7}, 7),
]


@pytest.mark.parametrize(("changes", "window"), WINDOWS, ids=lambda x: str(x)[:70])
def test_window_read(changes, window) -> None:
    transformers = pytest.importorskip("transformers", reason="it is the oracle here")
    fields = changed(QWEN, changes)
    assert resolved(fields)["attention_window"] == window
    theirs = transformers.Qwen3Config.from_dict(copy.deepcopy(fields))
    sees = {theirs.sliding_window if kind == SLIDING else None for kind in theirs.layer_types}
    assert sees == {window}


@pytest.mark.parametrize("window", [None, 1, 7])
def test_window_written(window) -> None:
    transformers = pytest.importorskip("transformers", reason="it is the oracle here")
    config = read(QWEN).model_copy(update={"attention_window": window})
    written = config_json.write(config_json.family_of(config), config)
    theirs = transformers.Qwen3Config.from_dict(copy.deepcopy(written))
    assert {theirs.sliding_window if k == SLIDING else None for k in theirs.layer_types} == {window}
    assert resolved(written)["attention_window"] == window


# -------------------------------------------------------------------------------------- refusals

BIG = 10**400
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    (LLAMA32, {"model_type": "mistral"}, "model_type: expected one of gpt2, llama", "mistral"),
    (LLAMA32, {"hidden_act": "gelu"}, 'hidden_act: expected "silu"', "gelu"),
    (LLAMA32, {"hidden_act": None}, 'hidden_act: expected "silu"', "null"),
    (LLAMA32, {"pretraining_tp": 2}, "pretraining_tp: expected 1", "2"),
    (LLAMA32, {"is_causal": False}, "is_causal: expected true", "false"),
    (LLAMA32, {"quantization_config": {"bits": 4}}, "quantization_config: expected null", "a m"),
    (LLAMA32, {"auto_map": {"AutoModel": "x.Y"}}, "auto_map: expected null", "a mapping"),
    (LLAMA32, {"transformers_weights": "x"}, "transformers_weights: expected null", "x"),
    (LLAMA32, {"rope_interleaved": True}, "rope_interleaved: expected false", "true"),
    (LLAMA32, {"sliding_window": 64}, "sliding_window: expected null", "64"),
    (LLAMA32, {"layer_types": [SLIDING] * 16}, "layer_types: expected full_att", SLIDING),
    (QWEN25_05B, {"use_mrope": True}, "use_mrope: expected false or null", "true"),
    (LLAMA32, {"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1.0", "0.5"),
    (LLAMA32, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.rope_type: "
     "expected default or llama3", "linear"),
    (LLAMA32, {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type", "dynamic"),
    (LLAMA32, {**V5, "rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type: "
     "expected default or llama3", "yarn"),
    (LLAMA32, {"rope_scaling": {"rope_type": ["llama3"]}}, "rope_type: expected", "a list"),
    (LLAMA32, {"rope_scaling": {**LLAMA3, "type": "linear"}}, "rope_scaling.type", "linear"),
    (LLAMA32, {"rope_scaling": {**LLAMA3, "partial_rotary_factor": 0.5}}, "1.0", "0.5"),
    (LLAMA32, {"rope_scaling": {**LLAMA3, "attention_factor": 2.0}}, "rope_scaling: expected "
     "only factor, ", "attention_factor"),
    (LLAMA32, {**V5, "rope_parameters": {FULL: {"rope_theta": 5.0}}}, "only factor", FULL),
    (LLAMA32, {"rope_scaling": {**LLAMA3, "rope_theta": 9.0}}, "rope_theta: expected that of "
     "rope_scaling", "500000.0"),
    (LLAMA32, {"rope_parameters": {"rope_theta": 9.0}}, "rope_scaling: expected null", "another"),
    (LLAMA32, {"rope_scaling": [1]}, "rope_scaling: expected a mapping, or null", "a list"),
    (LLAMA32, {"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling.factor: expected", "none"),
    (LLAMA32, {"rope_scaling": {**LLAMA3, "factor": None}}, "factor: expected a number", "null"),
    (LLAMA32, {"rope_scaling": {**LLAMA3, "factor": 0.5}}, "rope_scaling.factor: expected a "
     "finite number", "0.5"),
    (LLAMA32, {"rope_scaling": {**LLAMA3, "factor": float("nan")}}, "factor: expected", "nan"),
    (LLAMA32, {"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "rope_scaling.high_freq_"
     "factor: expected more than rope_scaling.low_freq_factor (4.0)", "4.0"),
    (LLAMA32, {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 8192.5}},
     "original_max_position_embeddings: expected an integer", "8192.5"),
    (LLAMA32, {"original_max_position_embeddings": 4096}, "embeddings: expected null", "4096"),
    (LLAMA32, {"rope_theta": "1e6x"}, "rope_theta: expected a finite number", "1e6x (text)"),
    (LLAMA32, {"rope_theta": float("inf")}, "rope_theta: expected a finite number", "inf"),
    (LLAMA32, {"rope_theta": None}, "rope_theta: expected a finite number", "null"),
    (LLAMA32, {"rope_theta": BIG}, "rope_theta: expected a finite number", "a 1329-bit"),
    (LLAMA32, {"rope_theta": 0}, "rope_theta: expected a finite number", "0"),
    (LLAMA32, {"num_key_value_heads": 5}, "num_attention_heads: expected a multiple of num_key_"
     "value_heads (5)", "32"),
    (LLAMA32, {"num_key_value_heads": 0}, "num_key_value_heads: expected an integer", "0"),
    (LLAMA32, {"num_key_value_heads": 64}, "num_attention_heads: expected a multiple", "32"),
    (LLAMA32, {"head_dim": 63}, "head_dim: expected an even width", "63"),
    (LLAMA32, {"head_dim": 10**9}, "head_dim: expected an integer", "1000000000"),
    (LLAMA32, {"head_dim": ..., "num_attention_heads": 24}, "hidden_size: expected a multiple "
     "of num_attention_heads (24)", "2048"),
    (LLAMA32, {"intermediate_size": None}, "intermediate_size: expected an integer", "null"),
    (LLAMA32, {"intermediate_size": ...}, "intermediate_size: expected that of a llama", "none"),
    (LLAMA32, {"hidden_size": BIG}, "hidden_size: expected an integer", "a 1329-bit integer"),
    (LLAMA32, {"num_hidden_layers": "16"}, "num_hidden_layers: expected an integer", "16 (text)"),
    (LLAMA32, {"num_hidden_layers": 10**9}, "num_hidden_layers: expected an integer", "10000000"),
    (LLAMA32, {"rms_norm_eps": 0}, "rms_norm_eps: expected a finite number above 0", "0"),
    (LLAMA32, {"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a finite", "nan"),
    (LLAMA32, {"mlp_bias": "no"}, "mlp_bias: expected true or false", "no (text)"),
    (LLAMA32, {"tie_word_embeddings": "yes\n"}, "tie_word_embeddings: expected true", "yes\\n"),
    (QWEN, {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
     "max_window_layers: expected 0, or the number of all layers", "1"),
    (QWEN, {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": None},
     "max_window_layers: expected 0", "null"),
    (QWEN, {"use_sliding_window": True, "sliding_window": 0, "max_window_layers": 0},
     "sliding_window: expected an integer at least 1", "0"),
    (QWEN, {"use_sliding_window": "yes"}, "use_sliding_window: expected true or false", "yes"),
    (QWEN, {"layer_types": [FULL, SLIDING]}, "layer_types: expected a list of 2", "of full_"),
    (QWEN, {"layer_types": [SLIDING, SLIDING]}, "layer_types: expected full_attention", SLIDING),
    (QWEN, {"layer_types": ["chunked_attention"] * 2}, "layer_types: expected a list", "a list"),
    (QWEN, {"layer_types": [[]] * 2}, "layer_types: expected a list", "a list"),
    (QWEN, {"layer_types": [FULL]}, "layer_types: expected a list of 2", "of full_"),
    (QWEN, {"layer_types": FULL}, "layer_types: expected a list", FULL),
    (QWEN, {"vocab_size": None}, "vocab_size: expected an integer", "null"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "changes", "expected", "got"), REFUSED, ids=lambda x: str(x)[:70]
)
def test_function_changed(fields, changes, expected, got) -> None:
    """A field that changes the function is refused."""
    with pytest.raises(CheckpointError) as caught:
        config_json.read(changed(fields, changes), "config.json")
    message = str(caught.value)
    assert message.isprintable() and len(message) < 400, message
    assert message.startswith("config.json: ") and expected in message, message
    assert got in message.partition(expected)[2], message


UNWRITABLE = [
    ({"norm": "rms_norm"}, "norm: expected layer_norm (text), as GPT2LMHeadModel has"),
    (
        {"position": "rope", "qk_norm": True},
        "qk_norm: expected false, as Starcoder2ForCausalLM has",
    ),
    ({"attention_window": 8}, "attention_window: expected null, as GPT2LMHeadModel"),
    ({"n_kv_heads": 2}, "n_kv_heads: expected 4, as GPT2LMHeadModel"),
]
LLAMA = {"norm": "rms_norm", "position": "rope", "mlp": "swiglu", "bias": False}
UNWRITABLE += [
    ({**LLAMA, "mlp": "gelu"}, "mlp: expected swiglu (text), as LlamaForCausalLM has"),
    ({**LLAMA, "norm": "layer_norm"}, "norm: expected rms_norm (text), as LlamaForCausalLM has"),
    ({**LLAMA, "projection_bias": True}, "qkv_bias: expected true, as LlamaForCausalLM has"),
    ({**LLAMA, "attention_window": 8}, "attention_window: expected null, as LlamaForCausalLM"),
    ({**LLAMA, "n_heads": 3, "head_dim": 8}, "d_model: expected 258, as LlamaForCausalLM"),
    ({**LLAMA, "qk_norm": True, "mlp_bias": True}, "qk_norm: expected false, as LlamaForCausalLM"),
]


@pytest.mark.parametrize(("shape", "expected"), UNWRITABLE, ids=lambda x: str(x)[:70])
def test_family_none(shape, expected) -> None:
    with pytest.raises(ConfigError) as caught:
        config_json.family_of(ModelConfig(vocab_size=64, **shape))
    message = str(caught.value)
    assert message.startswith(expected) and message.isprintable() and len(message) < 200, message


WRITABLE = [
    ({}, "GPT2LMHeadModel"),
    ({"bias": False}, "GPT2LMHeadModel"),
    (LLAMA, "LlamaForCausalLM"),
    ({**LLAMA, "bias": True}, "LlamaForCausalLM"),
    ({**LLAMA, "qkv_bias": True, "projection_bias": True}, "LlamaForCausalLM"),
    ({**LLAMA, "mlp_bias": True, "n_kv_heads": 1, "head_dim": 6}, "LlamaForCausalLM"),
    ({**LLAMA, "qkv_bias": True}, "Qwen2ForCausalLM"),
    ({**LLAMA, "qkv_bias": True, "attention_window": 3, "head_dim": 6}, "Qwen2ForCausalLM"),
    ({**LLAMA, "qk_norm": True}, "Qwen3ForCausalLM"),
    ({**LLAMA, "qk_norm": True, "n_heads": 3, "head_dim": 8}, "Qwen3ForCausalLM"),
    ({**LLAMA, "qk_norm": True, "attention_window": 1}, "Qwen3ForCausalLM"),
    ({**LLAMA, "rope_scaling_factor": 8.0, "rope_original_length": 64}, "LlamaForCausalLM"),
    ({"position": "rope"}, "Starcoder2ForCausalLM"),
    ({"position": "rope", "bias": False, "n_kv_heads": 2}, "Starcoder2ForCausalLM"),
]


@pytest.mark.parametrize(("shape", "architecture"), WRITABLE, ids=lambda x: str(x)[:70])
def test_family_first_fitting(shape, architecture) -> None:
    """A model is written as the first family that fits."""
    config = ModelConfig(vocab_size=64, **shape)
    family = config_json.family_of(config)
    assert family.architecture == architecture
    again, expected = resolved(config_json.write(family, config)), config.resolved()
    if architecture in (
        "GPT2LMHeadModel",
        "Starcoder2ForCausalLM",
    ):  # whose biases are written as zeros
        expected |= {"bias": True, "qkv_bias": True, "projection_bias": True, "mlp_bias": True}
    expected["dtype"] = again["dtype"]
    assert again == expected


HOSTILE_VALUES = [
    None, True, False, 0, 1, -1, 3, 2**63, BIG, -BIG, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", "3", "1e5", "a\nb\x1b[31m", "x" * 10_000, [], [1], [[]], {}, {"a": {}}, ["full_attention"],
]  # fmt: skip


@pytest.mark.parametrize("name", ["Llama-3.2-1B", "Qwen3-0.6B"])
def test_any_field_any_value(name) -> None:
    """Refused in one line that names the file, or read as a shape of the family."""
    fields = PUBLISHED[name][0] | {"layer_types": None, "use_sliding_window": True}
    fields |= {"rope_parameters": None, "sliding_window": 8, "max_window_layers": 0}
    fields = changed(fields, {"sliding_window": ..., "use_sliding_window": ...})
    spoiled = [changed(fields, {field: value}) for field in fields for value in HOSTILE_VALUES]
    for inner in fields.get("rope_scaling") or ():
        for value in HOSTILE_VALUES:
            spoiled.append({**fields, "rope_scaling": {**fields["rope_scaling"], inner: value}})
    outcomes = set()
    for values in spoiled:
        try:
            family, shape = config_json.read(values, "config.json")
        except CheckpointError as wrong:
            message = str(wrong)
            assert message.startswith("config.json: ") and message.isprintable(), message
            assert len(message) < 600, message
            outcomes.add("refused")
        else:
            misfits = family.misfits(ModelConfig(**shape)).keys()
            assert misfits <= {"d_model"}  # version 5 refuses widths that version 4 reads
            outcomes.add("read")
    assert outcomes == {"refused", "read"} and len(spoiled) > 500
