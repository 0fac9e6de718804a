"""GGUF files: names, values and metadata by the package's own reader, logits by transformers'."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from torch import Tensor

from mantrans import CustomTransformerWrapper
from mantrans.config import ModelConfig
from mantrans.data.tokenizer import Tokenizer, load_tokenizer
from mantrans.errors import CheckpointError, ConfigError
from mantrans.interop import gguf_file
from tests.support import families
from tests.support.compare import assert_close

gguf = pytest.importorskip("gguf", reason="the files are written and read with it")
IDS = torch.randint(0, families.V, (3, 13), generator=torch.Generator().manual_seed(1))
# transformers' reader does not read every field: qwen3's head_dim is 128 then; GPT-2 has 1024
# positions, a feed-forward width of 4 C, and the tokenizer's vocabulary.
CASES: dict[str, dict[str, Any]] = {
    "gpt2": {"max_seq_len": 1024, "d_model": 48, "n_heads": 4, "n_blocks": 2},
    "gpt2, no biases": {"max_seq_len": 1024, "d_model": 48, "n_blocks": 1, "bias": False},
    "llama": {},
    "llama, one head": {"tie_embeddings": True},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "starcoder2": {"head_dim": None},
}


def build(case: str, **options: Any) -> CustomTransformerWrapper:
    options = {**CASES.get(case, {}), **options}
    if not case.startswith("gpt2"):
        return families.ours(case, options.pop("dtype", torch.float32), "reference", **options)
    model = CustomTransformerWrapper(
        **{"vocab_size": families.V, "dtype": torch.float32, "device": "cpu", **options}
    )
    generator = torch.Generator().manual_seed(0)
    for name, parameter in list(model.model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        model.model.parameters.write(name, 0.2 * noise + ("norm" in name))
    return model


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields and the tensors of a file, as gguf's reader has them."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        t.name: torch.from_numpy(np.copy(gguf.dequantize(t.data, t.tensor_type)))
        for t in reader.tensors
    }
    return fields, tensors


@pytest.mark.parametrize(
    ("case", "tied"),
    [
        ("gpt2", True),
        pytest.param("gpt2", False, marks=pytest.mark.slow),
        pytest.param("gpt2, no biases", True, marks=pytest.mark.slow),
        ("llama", False),
        ("llama, one head", True),
        ("qwen2", True),
        ("qwen3", False),
        ("starcoder2", True),
    ],
)
def test_gguf_transformers_computes_the_same(tmp_path, case, tied) -> None:
    transformers = pytest.importorskip("transformers", reason="it reads GGUF too")
    pytest.importorskip("accelerate", reason="transformers reads GGUF with it")
    tokenizer, size = None, {}
    if case.startswith(("gpt2", "starcoder2")):  # of the latter they take V from the tokenizer
        tokenizer = load_tokenizer("tinystories_bpe_4096")
        size = {"vocab_size": tokenizer.vocab_size}
    source = build(case, tie_embeddings=tied, **size)
    source.save_gguf(tmp_path / "model.gguf", tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    with torch.no_grad():
        logits = theirs(IDS).logits
    assert_close(logits, source.forward(IDS)["logits"], 1e-5, "logits")


def test_gguf_gpt2_names_and_values(tmp_path) -> None:
    source = build("gpt2", d_ffn=40, max_seq_len=20)
    source.save_gguf(tmp_path / "a" / "model.gguf")
    _, found = read(tmp_path / "a" / "model.gguf")
    ours = dict(source.model.named_parameters())
    names = {
        "token_embd.weight": "token_embedding.weight",
        "position_embd.weight": "position_embedding.weight",
        "output_norm.weight": "final_norm.weight", "output_norm.bias": "final_norm.bias",
    }  # fmt: skip
    for i in range(2):
        for theirs, layer in {
            "attn_norm": "norm_1", "attn_qkv": "attention.qkv", "ffn_norm": "norm_2",
            "attn_output": "attention.projection", "ffn_up": "mlp.up", "ffn_down": "mlp.down",
        }.items():  # fmt: skip
            for kind in ("weight", "bias"):
                names[f"blk.{i}.{theirs}.{kind}"] = f"blocks.{i}.{layer}.{kind}"
    assert found.keys() == names.keys()
    for theirs, name in names.items():
        assert torch.equal(found[theirs], ours[name]), theirs


@pytest.mark.parametrize("case", ["llama, biases", "qwen2", "qwen3"])
def test_gguf_packed_matrices(tmp_path, case) -> None:
    """q and k of a llama have interleaved pairs, those of a Qwen halves."""
    source = build(case)
    source.save_gguf(tmp_path / "model.gguf")
    _, found = read(tmp_path / "model.gguf")
    own = dict(source.model.named_parameters())
    config, D = source.config, source.config.head_width
    H, H_kv = config.n_heads, config.key_value_heads
    order = torch.arange(D)
    if case.startswith("llama"):  # row 2i is our row i, row 2i + 1 our row i + D/2
        order = torch.tensor([i // 2 + D // 2 * (i % 2) for i in range(D)])
    kinds = ["weight", "bias"] if config.resolved()["qkv_bias"] else ["weight"]
    for kind in kinds:
        q, k, v = own[f"blocks.1.attention.qkv.{kind}"].split([H * D, H_kv * D, H_kv * D])
        for name, rows, heads in (("attn_q", q, H), ("attn_k", k, H_kv)):
            for head in range(heads):
                got = found[f"blk.1.{name}.{kind}"][head * D :][:D]
                assert torch.equal(got, rows[head * D :][:D][order]), (name, head)
        assert torch.equal(found[f"blk.1.attn_v.{kind}"], v)
    gate, up = own["blocks.0.mlp.gate_up.weight"].chunk(2)
    assert torch.equal(found["blk.0.ffn_gate.weight"], gate)
    assert torch.equal(found["blk.0.ffn_up.weight"], up)
    assert torch.equal(found["blk.0.ffn_down.weight"], own["blocks.0.mlp.down.weight"])
    assert torch.equal(found["output.weight" if not config.tie_embeddings else "token_embd.weight"],
                       own["output.weight" if not config.tie_embeddings else
                           "token_embedding.weight"])  # fmt: skip
    assert ("output.weight" in found) is not config.tie_embeddings
    assert len(found) == 2 + (not config.tie_embeddings) + config.n_blocks * len(
        [n for n in found if n.startswith("blk.0.")]
    )


SHAPE_FIELDS = {
    "context_length": 40, "embedding_length": 48, "block_count": 2, "feed_forward_length": 80,
    "vocab_size": 97, "attention.head_count": 4, "attention.head_count_kv": 2,
    "attention.key_length": 10, "attention.value_length": 10, "rope.dimension_count": 10,
    "rope.freq_base": 1e6, "attention.layer_norm_rms_epsilon": 1e-6,
}  # fmt: skip


def test_gguf_metadata(tmp_path) -> None:
    """It holds the whole shape."""
    build("qwen3", head_dim=10).save_gguf(tmp_path / "small one.gguf")
    fields, _ = read(tmp_path / "small one.gguf")
    found = {name: fields[f"qwen3.{name}"] for name in SHAPE_FIELDS}
    assert {n: pytest.approx(x) for n, x in SHAPE_FIELDS.items()} == found
    assert fields["general.architecture"] == "qwen3" and fields["general.type"] == "model"
    assert fields["general.name"] == "small one" and fields["tokenizer.ggml.model"] == "none"
    assert fields["general.file_type"] == gguf.LlamaFileType.ALL_F32
    build("gpt2", d_ffn=40, layer_norm_epsilon=1e-3).save_gguf(tmp_path / "gpt2.gguf")
    fields, _ = read(tmp_path / "gpt2.gguf")
    assert fields["gpt2.feed_forward_length"] == 40  # and not 4 C
    assert fields["gpt2.attention.layer_norm_epsilon"] == pytest.approx(1e-3)
    assert not [name for name in fields if "rope" in name or "rms" in name]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float32], ids=str)
def test_gguf_dtypes(tmp_path, dtype) -> None:
    """Matrices keep their dtype and vectors are float32."""
    source = build("llama", dtype=dtype, stochastic_rounding=dtype == torch.bfloat16)
    source.save_gguf(tmp_path / "model.gguf")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    matrix = "BF16" if dtype == torch.bfloat16 else "F32"
    assert kinds["blk.0.attn_q.weight"] == kinds["token_embd.weight"] == matrix
    assert kinds["blk.0.attn_norm.weight"] == kinds["output_norm.weight"] == "F32"
    fields, found = read(tmp_path / "model.gguf")
    expected = gguf.LlamaFileType.MOSTLY_BF16 if matrix == "BF16" else gguf.LlamaFileType.ALL_F32
    assert fields["general.file_type"] == expected
    own = dict(source.model.named_parameters())["blocks.1.mlp.down.weight"]
    assert torch.equal(found["blk.1.ffn_down.weight"], own.float())


def test_gguf_scaled_rope(tmp_path) -> None:
    """Beside the loop of llama.cpp's converter, in float64."""
    source = build("llama, scaled, tied")
    source.save_gguf(tmp_path / "model.gguf")
    _, tensors = read(tmp_path / "model.gguf")
    c, expected = source.config, []
    for i in range(0, c.head_width, 2):
        wave = 2 * math.pi * c.rope_theta ** (i / c.head_width)
        turns = c.rope_original_length / wave
        kept = (turns - c.rope_low_freq_factor) / (c.rope_high_freq_factor - c.rope_low_freq_factor)
        kept = min(max(kept, 0.0), 1.0)
        expected.append(1 / ((1 - kept) / c.rope_scaling_factor + kept))
    assert {1.0, c.rope_scaling_factor} < {round(x, 12) for x in expected}
    assert_close(tensors["rope_freqs.weight"], torch.tensor(expected), 1e-6, "factors")


# ------------------------------------------------------------------------------------- tokenizers


def bpe(pre_tokenizer: tokenizers.pre_tokenizers.PreTokenizer) -> tokenizers.Tokenizer:
    """A byte-level tokenizer of two merges."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "ab", "abc"])}
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("a", "b"), ("ab", "c")]))
    library.pre_tokenizer = pre_tokenizer
    library.decoder = tokenizers.decoders.ByteLevel()
    library.add_special_tokens(["<|endoftext|>"])
    return library


def test_gguf_tokenizer(tmp_path) -> None:
    tokenizer = load_tokenizer("tinystories_bpe_4096")
    build("qwen2", vocab_size=tokenizer.vocab_size).save_gguf(tmp_path / "model.gguf", tokenizer)
    fields, _ = read(tmp_path / "model.gguf")
    tokens = [tokenizer.library.id_to_token(i) for i in range(tokenizer.vocab_size)]
    assert fields["tokenizer.ggml.tokens"] == tokens
    types = fields["tokenizer.ggml.token_type"]
    assert types[tokenizer.eot_id] == gguf.TokenType.CONTROL
    assert types.count(gguf.TokenType.NORMAL) == len(types) - 1
    merges = json.loads(tokenizer.library.to_str())["model"]["merges"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in merges]
    assert fields["tokenizer.ggml.merges"] == merges
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == "gpt-2"
    ids = ("bos_token_id", "eos_token_id")
    assert {fields[f"tokenizer.ggml.{x}"] for x in ids} == {tokenizer.eot_id}
    assert fields["tokenizer.ggml.add_bos_token"] is False


@pytest.mark.slow
def test_gguf_transformers_same_tokens(tmp_path) -> None:
    """Transformers makes the same tokens from the file."""
    transformers = pytest.importorskip("transformers", reason="it reads GGUF too")
    tokenizer = load_tokenizer("tinystories_bpe_4096")
    build("qwen2", vocab_size=tokenizer.vocab_size).save_gguf(tmp_path / "model.gguf", tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    text = "Once upon a time, there was a cat 12345."
    assert theirs(text)["input_ids"] == tokenizer.encode(text)


PRE = tokenizers.pre_tokenizers
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KNOWN = {
    "gpt-2": PRE.ByteLevel(add_prefix_space=False),
    "smollm": PRE.Sequence(
        [PRE.Digits(individual_digits=True), PRE.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": PRE.Sequence(
        [
            PRE.Split(tokenizers.Regex(LLAMA3), "isolated"),
            PRE.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
    "qwen2": PRE.Sequence(
        [
            PRE.Split(tokenizers.Regex(LLAMA3.replace("{1,3}", "")), "isolated"),
            PRE.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}
UNKNOWN = {
    "Digits": PRE.Sequence([PRE.Digits(), PRE.ByteLevel(add_prefix_space=False)]),
    "ByteLevel": PRE.ByteLevel(add_prefix_space=True),
    "bytes": PRE.ByteLevel(add_prefix_space=False, use_regex=False),
    "Split": PRE.Sequence(
        [
            PRE.Split(tokenizers.Regex(LLAMA3), "removed"),
            PRE.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_gguf_pre_tokenizer_name(name) -> None:
    """It is llama.cpp's."""
    assert gguf_file.pre_tokenizer(json.loads(bpe(KNOWN[name]).to_str())) == name


@pytest.mark.parametrize("name", UNKNOWN)
def test_gguf_pre_tokenizer_other(tmp_path, name) -> None:
    """It is refused, and nothing is written."""
    tokenizer = Tokenizer(bpe(UNKNOWN[name]), name, "x") if name in ("Digits", "bytes") else None
    if tokenizer is None:
        with pytest.raises(ConfigError, match=rf"^tokenizer: expected .*got another \({name}"):
            gguf_file.pre_tokenizer(json.loads(bpe(UNKNOWN[name]).to_str()))
        return
    model = build("llama", vocab_size=tokenizer.vocab_size)
    with pytest.raises(ConfigError, match=rf"llama.cpp knows as gpt-2, .* got another \({name}"):
        model.save_gguf(tmp_path / "new" / "model.gguf", tokenizer)
    assert not (tmp_path / "new").exists()


# -------------------------------------------------------------------------------------- refusals

STARCODER2 = {"norm": "layer_norm", "mlp": "gelu", "bias": True}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"qkv_bias": True, "attention_window": 4}, "attention_window: expected null, since llama.cpp"),
    ({"qk_norm": True, "qkv_bias": True, "projection_bias": True}, "qkv_bias: expected false, sin"),
    ({"qk_norm": True, "rope_scaling_factor": 2.0}, "rope_scaling_factor: expected null, since"),
    ({"mlp": "gelu"}, "mlp: expected swiglu (text), as LlamaForCausalLM has"),
    ({"qkv_bias": True, "head_dim": 32}, "head_dim: expected d_model / n_heads (64), since llama."),
    ({**STARCODER2, "head_dim": 32}, "head_dim: expected d_model / n_heads (64), since llama."),
    (
        {**STARCODER2, "n_heads": 3, "head_dim": 84},  # 256 / 3 is no integer
        "head_dim: expected d_model / n_heads (85.3333), since llama.cpp",
    ),
    (
        {**STARCODER2, "rope_scaling_factor": 2.0},
        "rope_scaling_factor: expected null, since llama.",
    ),
]


@pytest.mark.parametrize(("shape", "expected"), REFUSED, ids=[e[:30] for _, e in REFUSED])
def test_gguf_refuses(tmp_path, shape, expected) -> None:
    """What llama.cpp does not compute is refused."""
    llama = {"norm": "rms_norm", "position": "rope", "mlp": "swiglu", "bias": False}
    config = ModelConfig(vocab_size=64, **{**llama, **shape})
    with pytest.raises(ConfigError) as caught:
        gguf_file.save(tmp_path / "new" / "model.gguf", config, {})
    assert str(caught.value).startswith(expected) and str(caught.value).isprintable()
    assert not (tmp_path / "new").exists()


def test_gguf_package_missing(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"m\.gguf: needs the package gguf \(pip install"):
        build("llama").save_gguf(tmp_path / "m.gguf")


@pytest.mark.parametrize("path", ["file/below.gguf", "nul\0", "folder"])
def test_gguf_impossible_place(tmp_path, path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match="could not be written") as caught:
        build("llama").save_gguf(tmp_path / path)
    assert str(caught.value).isprintable()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_gguf_failed_save(tmp_path, monkeypatch) -> None:
    (tmp_path / "m.gguf").write_bytes(b"before")

    def full(self, tensor, *rest) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        build("llama").save_gguf(tmp_path / "m.gguf")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("m.gguf", b"before")]
