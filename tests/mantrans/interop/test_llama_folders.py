"""Folders of transformers' Llama, Qwen2, Qwen3 and StarCoder2: what one side saves the other loads.

Weights are compared bit by bit. The logits of float32 agree to 1e-5; in float64 transformers rounds
to float32 inside, so that 1e-5 is asked there too (tests/mantrans/models has the exact oracle).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mantrans import CustomTransformerWrapper
from mantrans.data.tokenizer import load_tokenizer
from mantrans.errors import CheckpointError
from tests.support import families
from tests.support.compare import assert_close, assert_same_bits
from tests.support.folders import load, refusal, rewrite_config, rewrite_weights
from tests.support.huggingface import their_load

transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
safetensors_torch = pytest.importorskip("safetensors.torch", reason="files are read with it")
IDS = torch.randint(0, families.V, (3, 13), generator=torch.Generator().manual_seed(1))


def ours(case: str, dtype: torch.dtype = torch.float32, **options: Any) -> CustomTransformerWrapper:
    return families.ours(case, dtype, "reference", **options)


def weights_of(model: CustomTransformerWrapper) -> dict[str, Tensor]:
    p = model.model.parameters
    return {name: value.clone() for name, value in p.named(p.best_weights())}


def logits_of(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


# ------------------------------------------------------------------------------ there and back

FAST = (
    "llama, scaled, tied",
    "llama, biases",
    "qwen2, window",
    "qwen3, window, biases",
    "starcoder2",
)
CASES = [
    case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in families.CASES
]


@pytest.mark.parametrize("case", CASES)
def test_load_transformers_folder(tmp_path, case) -> None:
    source = ours(case)
    theirs = families.theirs(source)
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    found = load(tmp_path)
    assert found.config.resolved() == source.config.resolved()
    assert_same_bits(weights_of(found), weights_of(source))
    assert_close(found.forward(IDS)["logits"], logits_of(theirs), 1e-5, "logits")


@pytest.mark.parametrize("case", CASES)
def test_save_transformers_loads(tmp_path, case) -> None:
    source = ours(case)
    source.save_pretrained(tmp_path)
    theirs = their_load(tmp_path)
    assert type(theirs).__name__ == families.family_of(source.config).architecture
    assert_close(logits_of(theirs), source.forward(IDS)["logits"], 1e-5, "logits")
    assert_same_bits(weights_of(load(tmp_path)), weights_of(source))


@pytest.mark.parametrize("case", ["llama, biases", "qwen2, window", "qwen3"])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64], ids=["f16", "bf16", "f64"]
)
def test_load_any_dtype(tmp_path, case, dtype) -> None:
    source = ours(case)
    theirs = families.theirs(source).to(dtype)
    theirs.save_pretrained(tmp_path)
    expected = families.weights(source, theirs)
    assert {value.dtype for value in expected.values()} == {dtype}
    found = weights_of(load(tmp_path, torch.float64))
    assert_same_bits(found, {name: value.double() for name, value in expected.items()})


def test_load_mixed_dtypes(tmp_path) -> None:
    source = ours("llama")
    source.save_pretrained(tmp_path)
    q, k = (f"model.layers.1.self_attn.{x}_proj.weight" for x in "qk")
    rewrite_weights(tmp_path, lambda w: {**w, q: w[q].bfloat16(), k: w[k].half()})
    found, expected = weights_of(load(tmp_path)), weights_of(source)
    rows = 4 * 12
    packed = expected["blocks.1.attention.qkv.weight"]
    packed[:rows] = packed[:rows].bfloat16().float()
    packed[rows : rows + 24] = packed[rows : rows + 24].half().float()
    assert_same_bits(found, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["f64", "bf16"])
def test_save_and_load_bits(tmp_path, dtype) -> None:
    """The state comes back bit for bit."""
    source = ours("qwen3, window, biases", dtype)
    source.train_step(IDS, IDS)  # so that masters have digits that weights do not
    source.save_pretrained(tmp_path)
    again = load(tmp_path, dtype, backend="reference")
    assert_same_bits(weights_of(again), weights_of(source))
    assert again.config.resolved() == source.config.resolved()
    assert source.train_step(IDS, IDS) == again.train_step(IDS, IDS)


def test_load_names_without_prefix(tmp_path) -> None:
    """As transformers saved Llama before version 4.32, and as its inner model is saved."""
    source = ours("llama")
    source.save_pretrained(tmp_path)
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(6) for i in (0, 1)}
    rewrite_weights(
        tmp_path, lambda w: {n.removeprefix("model."): x for n, x in {**w, **frequencies}.items()}
    )
    assert_same_bits(weights_of(load(tmp_path)), weights_of(source))


def test_generate_greedy(tmp_path) -> None:
    source = ours("qwen3")
    source.save_pretrained(tmp_path)
    prompt = IDS[:, :4]
    expected = their_load(tmp_path).generate(
        prompt, attention_mask=torch.ones_like(prompt), max_length=20, do_sample=False
    )
    assert torch.equal(load(tmp_path).generate(prompt, max_length=20, temperature=0), expected)


@pytest.mark.promise("Auto classes")
@pytest.mark.parametrize(
    "case",
    ["gpt2", "llama", *(pytest.param(x, marks=pytest.mark.slow) for x in ("qwen2", "qwen3"))],
)
def test_pipeline_with_tokenizer(tmp_path, case) -> None:
    """The text of a greedy continuation is ours, and `Auto` classes need nothing but the folder."""
    tokenizer = load_tokenizer("tinystories_bpe_4096")
    size = {"vocab_size": tokenizer.vocab_size}
    if case == "gpt2":
        source = CustomTransformerWrapper(**size, d_model=32, n_blocks=1, dtype=torch.float32)
    else:
        source = ours(case, **size)
    source.save_pretrained(tmp_path, tokenizer)
    run = transformers.pipeline("text-generation", model=str(tmp_path))
    text = "Once upon a time"
    [found] = run(text, max_new_tokens=6, do_sample=False)
    ids = source.generate(
        [tokenizer.encode(text)], max_length=len(tokenizer.encode(text)) + 6, temperature=0,
        eos_token_id=tokenizer.eot_id,
    )[0]  # fmt: skip
    assert found["generated_text"] == tokenizer.decode(ids.tolist())
    ids = torch.tensor([tokenizer.encode(text)])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (
        transformers.AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == ids[0].tolist()
    )
    assert theirs.generation_config.eos_token_id == tokenizer.eot_id
    with torch.no_grad():
        assert_close(theirs(ids).logits, source.forward(ids)["logits"], 1e-5, "logits")


# -------------------------------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of two blocks that is right, to be copied and spoiled."""
    folder = tmp_path_factory.mktemp("llama") / "saved"
    ours("qwen3", tie_embeddings=True).save_pretrained(folder)
    return folder


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q, K = (f"model.layers.1.self_attn.{x}_proj.weight" for x in "qk")
UP, NORM = "model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_norm.weight"
TENSORS: list[tuple[str, Callable[[dict], dict], str]] = [
    ("missing part", lambda w: without(w, K), "config.json, got no layers.1.self_attn.k_proj"),
    ("missing norm", lambda w: without(w, NORM), "got no layers.1.self_attn.q_norm.weight"),
    ("packed", lambda w: {**without(w, UP), UP.replace("up", "gate_up"): w[UP]}, "gate_up_proj"),
    ("surplus block", lambda w: {**w, Q.replace(".1.", ".2."): w[Q]}, "expected only the tensors"),
    ("bias of none", lambda w: {**w, Q.replace("weight", "bias"): w[Q][:, 0]}, "expected only"),
    ("quantized", lambda w: {**w, Q + "_scale": w[Q][:, 0]}, "expected only the tensors"),
    ("adapter", lambda w: {**w, "base_model." + Q: w[Q]}, "expected only the tensors"),
    ("newline", lambda w: {**w, "a\nb": w[NORM]}, "tensor a\\nb: expected only"),
    ("twice", lambda w: {**w, Q.removeprefix("model."): w[Q]}, "expected once, got twice"),
    ("transposed", lambda w: {**w, K: w[K].T}, "shape (20, 48), as config.json says, got (48, 20)"),
    ("heads for keys", lambda w: {**w, K: w[Q]}, "expected shape (20, 48), as config.json says"),
    ("one norm a head", lambda w: {**w, NORM: w[NORM].repeat(4)}, "shape (10,), as config.json"),
    ("no dimension", lambda w: {**w, NORM: w[NORM][0]}, "shape (10,), as config.json says, got ()"),
    ("empty", lambda w: {**w, K: w[K][:0]}, "expected shape (20, 48), as config.json says, got (0"),
    ("rows", lambda w: {**w, EMBED: w[EMBED][:-1]}, "expected shape (97, 48), as config.json says"),
    ("integers", lambda w: {**w, K: w[K].to(torch.int8)}, "expected dtype F64, F32, F16, BF16"),
    ("eighths", lambda w: {**w, K: w[K].to(torch.float8_e4m3fn)}, "expected dtype F64, F32, F16"),
    (
        "copy differs",
        lambda w: {**w, HEAD: w[EMBED] + 1},
        "tie_word_embeddings: expected false, got",
    ),
    (
        "copy of rows",
        lambda w: {**w, HEAD: w[EMBED][1:]},
        "expected shape (97, 48), as config.json",
    ),
    ("copy in bf16", lambda w: {**w, HEAD: w[EMBED].bfloat16()}, "tie_word_embeddings: expected f"),
]


def without(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {n: x for n, x in tensors.items() if n != name}


@pytest.mark.parametrize(("change", "found"), [t[1:] for t in TENSORS], ids=[t[0] for t in TENSORS])
def test_load_other_tensors(saved, tmp_path, change, found) -> None:
    folder = shutil.copytree(saved, tmp_path / "copy")
    rewrite_weights(folder, change)
    assert found in refusal(folder)


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"num_attention_heads": 8}, "o_proj.weight: expected shape (48, 80), as config.json says"),
    ({"num_key_value_heads": 4}, "k_proj.weight: expected shape (40, 48), as config.json says"),
    ({"head_dim": ...}, "expected shape (128,), as config.json says"),
    (
        {"hidden_size": 65_535, "num_hidden_layers": 1024, "head_dim": 8192, "layer_types": ...},
        "expected shape",
    ),
    ({"num_attention_heads": 65_536, "num_key_value_heads": 65_536}, "expected shape (655360, 48)"),
    ({"num_hidden_layers": 1}, "layer_types: expected a list of 1, all the same, got 2 of full_"),
    (
        {"num_hidden_layers": 1, "layer_types": ...},
        "layers.1.input_layernorm.weight: expected only",
    ),
    ({"attention_bias": True}, "got no layers.0.self_attn.q_proj.bias"),
    ({"model_type": "qwen2"}, "self_attn.k_norm.weight: expected only the tensors of config.json"),
    ({"model_type": "gpt2"}, "n_positions: expected that of a gpt2 model, got none"),
    ({"tie_word_embeddings": False}, "got no lm_head.weight"),
    ({"vocab_size": 2**24}, "expected shape (16777216, 48)"),
    ({"vocab_size": 2**62}, "vocab_size: expected an integer at least 1 and at most 16777216"),
    ({"rope_theta": float("nan")}, "rope_theta: expected a finite number above 1"),
    ({"rms_norm_eps": float("inf")}, "rms_norm_eps: expected a finite number above 0"),
]


@pytest.mark.parametrize(("changes", "found"), CONFIGS, ids=[str(c)[:50] for c, _ in CONFIGS])
def test_load_other_config(saved, tmp_path, changes, found) -> None:
    """Absurd sizes are refused by what the file holds, before any memory is taken."""
    folder = shutil.copytree(saved, tmp_path / "copy")
    rewrite_config(folder, **changes)
    assert found in refusal(folder)


def test_load_shards_sharing_tensor(saved, tmp_path) -> None:
    """An index of shards that share a tensor is refused."""
    folder = shutil.copytree(saved, tmp_path / "copy")
    os.rename(folder / "model.safetensors", folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {Q: "a.safetensors", K: "b.safetensors"}})
    )
    assert "b.safetensors: tensor" in (message := refusal(folder)) and "got twice" in message


def test_load_pickle_only(saved, tmp_path) -> None:
    folder = shutil.copytree(saved, tmp_path / "copy")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert "pytorch_model.bin: expected model.safetensors, got a pickle" in refusal(folder)


def test_save_into_sharded_folder(tmp_path) -> None:
    """llama.cpp's converter would take its files for more of ours."""
    source = ours("llama")
    families.theirs(source).save_pretrained(tmp_path, max_shard_size="40KB")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=r"got model\.safetensors\.index\.json; choose"):
        source.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
