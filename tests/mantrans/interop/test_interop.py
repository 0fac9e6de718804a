"""transformers' GPT-2 format: what one side saves, the other loads as the same function.

Tolerances are those of tests/mantrans/models/test_against_transformers.py: both sides form the same
sums in other orders, 1e-10 in float64 and 1e-5 in float32. Weights are compared bit by bit: nothing
may be lost.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mantrans import CustomTransformerWrapper
from mantrans.data.tokenizer import load_tokenizer
from mantrans.errors import CheckpointError
from mantrans.interop import huggingface
from mantrans.models import GPT2
from mantrans.wrapper import shift
from tests.support.compare import assert_close, assert_same_bits
from tests.support.folders import load, refusal, rewrite_config, rewrite_weights
from tests.support.huggingface import gpt2, oriented, their_load, their_name

transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
safetensors = pytest.importorskip("safetensors", reason="files are read with it")
safetensors_torch = pytest.importorskip("safetensors.torch", reason="files are read with it")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
SHAPE = {
    "vocab_size": 61, "d_model": 24, "n_blocks": 3, "n_heads": 3, "d_ffn": 40, "max_seq_len": 20,
    "layer_norm_epsilon": 1e-3, "initializer_range": 0.3,
}  # fmt: skip
IDS = torch.randint(0, SHAPE["vocab_size"], (3, 13), generator=torch.Generator().manual_seed(1))


def build(**options: Any) -> CustomTransformerWrapper:
    """A model with weights, biases and norms large enough that every one of them matters."""
    generator = torch.Generator().manual_seed(0)
    ours = CustomTransformerWrapper(**{**SHAPE, "dtype": torch.float32, "device": "cpu", **options})
    for name, parameter in list(ours.model.named_parameters()):
        base = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        value = base + 0.2 * torch.randn(parameter.shape, generator=generator)
        ours.model.parameters.write(name, value)
    return ours


def logits_of(model: torch.nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def weights_of(ours: CustomTransformerWrapper) -> dict[str, Tensor]:
    p = ours.model.parameters
    return {name: value.clone() for name, value in p.named(p.best_weights())}


# ------------------------------------------------------------------------------ there and back


def test_their_load_remarks(tmp_path) -> None:
    """`their_load` is worth something: surplus, missing and odd things are remarks."""
    build().save_pretrained(tmp_path)
    rewrite_config(tmp_path, eos_token_id=999)
    with pytest.raises(AssertionError, match="eos_token_id"):
        their_load(tmp_path)
    rewrite_config(tmp_path, eos_token_id=None)
    rewrite_weights(tmp_path, lambda w: {"odd": w.pop("transformer.ln_f.bias"), **w})
    with pytest.raises(AssertionError, match=r"ln_f\.bias.*odd"):
        their_load(tmp_path)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("d_ffn", [40, None], ids=["n_inner", "no n_inner"])
def test_load_transformers_folder(tmp_path, dtype, tied, d_ffn) -> None:
    source = build(dtype=dtype, tie_embeddings=tied, d_ffn=d_ffn)
    theirs = gpt2(source.config, dtype, source.model.named_parameters())
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path, dtype)
    assert_same_bits(weights_of(ours), weights_of(source))
    assert_close(ours.forward(IDS)["logits"], logits_of(theirs), TOLERANCE[dtype], "logits")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("bias", [True, False], ids=["biases", "no biases"])
def test_save_transformers_loads(tmp_path, dtype, tied, bias) -> None:
    ours = build(dtype=dtype, tie_embeddings=tied, bias=bias)
    ours.save_pretrained(tmp_path / "new" / "folder")
    theirs = their_load(tmp_path / "new" / "folder")
    assert theirs.dtype == dtype
    assert_close(logits_of(theirs), ours.forward(IDS)["logits"], TOLERANCE[dtype], "logits")
    theirs.train()  # no dropout: the same function there too
    assert_close(logits_of(theirs), ours.forward(IDS)["logits"], TOLERANCE[dtype], "in training")


def test_mapping_two_layers_exchanged(tmp_path, monkeypatch) -> None:
    """Two layers of one shape exchanged: every name and shape is right, and the function wrong."""
    ours = build()
    ours.save_pretrained(tmp_path / "right")
    swapped = {**GPT2.inner, "norm_1": ("ln_2",), "norm_2": ("ln_1",)}
    monkeypatch.setitem(vars(GPT2), "inner", swapped)
    ours.save_pretrained(tmp_path / "wrong")
    expected = ours.forward(IDS)["logits"]
    assert_close(logits_of(their_load(tmp_path / "right")), expected, 1e-5)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(logits_of(their_load(tmp_path / "wrong")), expected, 1e-2)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_save_and_load_bits(tmp_path, dtype, tied) -> None:
    """The state comes back bit for bit."""
    ours = build(dtype=dtype, tie_embeddings=tied)
    ours.train_step(IDS, IDS)  # so that masters have digits that weights do not
    ours.save_pretrained(tmp_path)
    saved = safetensors_torch.load_file(tmp_path / "model.safetensors")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {x.dtype for x in saved.values()} == {wide}
    again = load(tmp_path, dtype)
    assert_same_bits(weights_of(again), weights_of(ours))
    assert torch.equal(again.model.parameters.weights, ours.model.parameters.weights)
    assert again.config == ours.config


def test_save_other_readers(tmp_path) -> None:
    """transformers 4 refuses a file without its format; aligned tensors can be mapped; and a
    vocabulary of another tokenizer has no use for GPT-2's default ids of special tokens."""
    build().save_pretrained(tmp_path)
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    n_header = (tmp_path / "model.safetensors").read_bytes()[:8]
    assert int.from_bytes(n_header, "little") % 8 == 0
    config = transformers.GPT2Config.from_pretrained(tmp_path)
    assert config.bos_token_id is None and config.eos_token_id is None
    assert config.architectures == ["GPT2LMHeadModel"]


@pytest.mark.promise("Auto classes")
def test_save_tokenizer(tmp_path) -> None:
    """`Auto` classes need nothing but the folder; our own tokens of a text are theirs."""
    tokenizer = load_tokenizer(Path(__file__).parents[2] / "golden/tokenizer")
    ours = build(vocab_size=tokenizer.vocab_size)
    ours.save_pretrained(tmp_path, tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "Once upon a time, Mia’s cat said “no”.\n"
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text and len(theirs) == tokenizer.vocab_size
    assert theirs.eos_token_id == tokenizer.eot_id and theirs.model_max_length == 20
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.eos_token_id == tokenizer.eot_id == model.generation_config.eos_token_id
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["n_ctx"] == fields["n_positions"] == 20
    assert load_tokenizer(tmp_path).hash == tokenizer.hash
    assert_same_bits(weights_of(load(tmp_path)), weights_of(ours))


@pytest.mark.parametrize("wrong", ["small", "text", 3])
def test_save_other_tokenizer(tmp_path, wrong) -> None:
    """A tokenizer that is not the model's is refused, and nothing is written."""
    other = load_tokenizer(Path(__file__).parents[2] / "golden/tokenizer")
    with pytest.raises(ValueError, match=r"^tokenizer: expected one of 61 tokens"):
        build().save_pretrained(tmp_path / "new", other if wrong == "small" else wrong)
    assert not (tmp_path / "new").exists()


def test_save_without_masters(tmp_path) -> None:
    """Weights without masters keep their dtype."""
    ours = build(dtype=torch.bfloat16, stochastic_rounding=True)
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert their_load(tmp_path).dtype == torch.bfloat16
    again = load(tmp_path, torch.bfloat16, stochastic_rounding=True)
    assert_same_bits(weights_of(again), weights_of(ours))


def test_save_without_biases(tmp_path) -> None:
    """A model without biases comes back with zeros."""
    ours = build(bias=False, dtype=torch.float64)
    ours.save_pretrained(tmp_path)
    again = load(tmp_path, torch.float64)
    assert again.config.bias and not ours.config.bias
    found, expected = weights_of(again), weights_of(ours)
    biases = {name: found.pop(name) for name in found.keys() - expected.keys()}
    assert len(biases) == 6 * SHAPE["n_blocks"] + 1 and not any(x.any() for x in biases.values())
    assert_same_bits(found, expected)
    assert_close(again.forward(IDS)["logits"], ours.forward(IDS)["logits"], 1e-10, "logits")


@pytest.mark.parametrize("file_dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_load_dtype_default(tmp_path, file_dtype) -> None:
    """The dtype is float32 unless another is given."""
    source = build()
    theirs = gpt2(source.config, torch.float32, source.model.named_parameters()).to(file_dtype)
    theirs.save_pretrained(tmp_path)
    ours = CustomTransformerWrapper.from_pretrained(tmp_path, device="cpu")
    assert ours.dtype == torch.float32
    assert_close(ours.forward(IDS)["logits"], logits_of(theirs.float()), 1e-5, "logits")
    automatic = CustomTransformerWrapper.from_pretrained(tmp_path, device="cpu", dtype="auto")
    assert automatic.dtype in (torch.float32, torch.bfloat16)


def test_load_keywords(tmp_path) -> None:
    """Keywords reach the class but do not change the shape."""
    build().save_pretrained(tmp_path)
    ours = load(tmp_path, backend="reference", optimizer="adamw", recompute="block")
    assert ours.get_model_info()["backend"] == "reference" and ours.optimizer_name == "adamw"
    with pytest.raises(TypeError, match="d_model"):
        load(tmp_path, d_model=48)


# ---------------------------------------------------------------------------- forms of a folder


def test_load_sharded(tmp_path) -> None:
    source = build()
    theirs = gpt2(source.config, torch.float32, source.model.named_parameters())
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_bits(weights_of(load(tmp_path)), weights_of(source))


def test_load_names_without_prefix(tmp_path) -> None:
    """As in OpenAI's own gpt2 repository, whose config.json lacks the later fields."""
    source = build(d_ffn=None)
    source.save_pretrained(tmp_path)
    rewrite_weights(tmp_path, strip_prefix)
    rewrite_config(
        tmp_path, n_inner=..., scale_attn_weights=..., add_cross_attention=..., n_ctx=20,
        scale_attn_by_inverse_layer_idx=..., tie_word_embeddings=..., dtype=..., attn_pdrop=0.1,
    )  # fmt: skip
    ours = load(tmp_path)
    assert_same_bits(weights_of(ours), weights_of(source))


def strip_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    masks = {}
    for i in range(SHAPE["n_blocks"]):
        masks[f"h.{i}.attn.bias"] = torch.ones(1, 1, 20, 20, dtype=torch.uint8)
        masks[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    return {**masks, **{name.removeprefix("transformer."): x for name, x in tensors.items()}}


def test_load_tied_copy(tmp_path) -> None:
    """A copy of the tied embedding is ignored."""
    source = build()
    source.save_pretrained(tmp_path)
    rewrite_weights(
        tmp_path, lambda w: {**w, "lm_head.weight": w["transformer.wte.weight"].clone()}
    )
    assert_same_bits(weights_of(load(tmp_path)), weights_of(source))


def test_load_gelu_name(tmp_path) -> None:
    """The other name of the same GELU."""
    source = build()
    source.save_pretrained(tmp_path)
    rewrite_config(tmp_path, activation_function="gelu_pytorch_tanh")
    expected = logits_of(their_load(tmp_path))
    assert_close(load(tmp_path).forward(IDS)["logits"], expected, 1e-5, "logits")


def test_load_links(tmp_path) -> None:
    """Links into another folder as in the hub's cache."""
    source = build()
    source.save_pretrained(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "snapshot" / name).symlink_to(Path("..") / "blobs" / name)
    assert_same_bits(weights_of(load(tmp_path / "snapshot")), weights_of(source))


# --------------------------------------------------------------------- training and generation


def test_load_gradients(tmp_path) -> None:
    """All but the keys' bias, whose gradient is zero by mathematics and rounding noise in fact."""
    source = build(dtype=torch.float64, tie_embeddings=False)
    theirs = gpt2(source.config, torch.float64, source.model.named_parameters())
    theirs.save_pretrained(tmp_path)
    logits = theirs(IDS).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), shift(IDS).flatten()).backward()
    parameters = dict(theirs.named_parameters())
    ours = load(tmp_path, torch.float64)
    ours.accumulate_gradients(IDS, shift(IDS))
    for name, gradient in ours.model.named_gradients():
        expected = oriented(name, parameters[their_name(name)].grad)
        if name.endswith("qkv.bias"):
            gradient, expected = (torch.cat([*x.chunk(3)][::2]) for x in (gradient, expected))
        assert_close(gradient, expected, 1e-10, name)


def test_load_one_step(tmp_path) -> None:
    """One step after a round trip is the step without."""
    ours = build(optimizer="adamw", dtype=torch.bfloat16)
    ours.save_pretrained(tmp_path)
    again = load(tmp_path, torch.bfloat16, optimizer="adamw")
    assert ours.train_step(IDS, IDS) == again.train_step(IDS, IDS)
    assert_same_bits(weights_of(again), weights_of(ours))


def test_generate_greedy(tmp_path) -> None:
    ours = build(dtype=torch.float64)
    ours.save_pretrained(tmp_path)
    prompt = IDS[:, :4]
    mask = torch.ones_like(prompt)
    found = ours.generate(prompt, max_length=20, temperature=0)
    expected = their_load(tmp_path).generate(
        prompt, attention_mask=mask, max_length=20, do_sample=False
    )
    assert torch.equal(found, expected)
    assert torch.equal(load(tmp_path, torch.float64).generate(prompt, 20, temperature=0), found)


# -------------------------------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is right, to be copied and spoiled."""
    folder = tmp_path_factory.mktemp("interop") / "saved"
    build().save_pretrained(folder)
    return folder


FIELDS = [
    ({"model_type": "gptj"}, "model_type: expected one of gpt2, llama, qwen2, qwen3", "got gptj"),
    ({"model_type": ["gpt2"]}, "model_type: expected one of gpt2, llama", "got a list"),
    ({"model_type": ...}, "model_type: expected one of gpt2, llama", "got none"),
    ({"activation_function": "relu"}, 'activation_function: expected "gelu_new"', "got relu"),
    ({"activation_function": "gelu"}, '"gelu_pytorch_tanh"', "got gelu"),
    (
        {"activation_function": ["gelu_new"]},
        'activation_function: expected "gelu_new"',
        "got a list",
    ),
    ({"scale_attn_weights": False}, "scale_attn_weights: expected true", "got false"),
    ({"scale_attn_by_inverse_layer_idx": True}, "layer_idx: expected false", "got true"),
    ({"add_cross_attention": True}, "add_cross_attention: expected false", "got true"),
    ({"n_embd": ...}, "n_embd: expected that of a gpt2 model", "got none"),
    ({"n_embd": "24"}, "n_embd: expected an integer", "24 (text)"),
    ({"n_embd": 25}, "n_embd: expected a multiple of n_head (3)", "got 25"),
    ({"n_layer": 10**9}, "n_layer: expected an integer", "at most 1024, got 1000000000"),
    ({"n_head": 0}, "n_head: expected an integer at least 1", "got 0"),
    ({"vocab_size": None}, "vocab_size: expected an integer", "got null"),
    ({"n_positions": 2.5}, "n_positions: expected an integer", "got 2.5"),
    ({"n_inner": -4}, "n_inner: expected an integer at least 1", "got -4"),
    ({"layer_norm_epsilon": 0}, "layer_norm_epsilon: expected a finite number above 0", "got 0"),
    ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon: expected a finite", "got nan"),
    ({"tie_word_embeddings": "yes\n"}, "embeddings: expected true or false", "got yes\\n"),
]


@pytest.mark.parametrize(("changes", "expected", "got"), FIELDS, ids=lambda x: str(x)[:40])
def test_load_other_fields(saved, tmp_path, changes, expected, got) -> None:
    """Fields of another model are refused."""
    folder = shutil.copytree(saved, tmp_path / "copy")
    rewrite_config(folder, **changes)
    message = refusal(folder)
    assert message.startswith(str(folder / "config.json")) and expected in message, message
    assert got in message.partition(expected)[2], message


WTE, LN, QKV = "transformer.wte.weight", "transformer.h.1.ln_1.bias", "h.0.attn.c_attn.weight"
TENSORS = [
    (
        "missing",
        lambda w: {k: v for k, v in w.items() if k != LN},
        "config.json, got no h.1.ln_1.bias",
    ),
    ("surplus", lambda w: {**w, "h.3.ln_1.bias": w[LN]}, "tensor h.3.ln_1.bias: expected only"),
    ("newline", lambda w: {**w, "a\nb": w[LN]}, "tensor a\\nb: expected only"),
    ("twice", lambda w: {**w, "h.1.ln_1.bias": w[LN]}, "ln_1.bias: expected once, got twice"),
    (
        "short",
        lambda w: {**w, LN: w[LN][:7]},
        f"{LN}: expected shape (24,), as config.json says, got (7,)",
    ),
    (
        "transposed",
        lambda w: {**w, f"transformer.{QKV}": w[f"transformer.{QKV}"].T},
        f"{QKV}: expected shape (24, 72), as config.json says, got (72, 24)",
    ),
    (
        "rows",
        lambda w: {**w, WTE: w[WTE][:60]},
        "expected shape (61, 24), as config.json says, got (60, 24)",
    ),
    (
        "integers",
        lambda w: {**w, LN: w[LN].to(torch.int8)},
        f"{LN}: expected dtype F64, F32, F16, BF16, got I8",
    ),
]


@pytest.mark.parametrize(("change", "found"), [t[1:] for t in TENSORS], ids=[t[0] for t in TENSORS])
def test_load_other_tensors(saved, tmp_path, change, found) -> None:
    folder = shutil.copytree(saved, tmp_path / "copy")
    rewrite_weights(folder, change)
    assert found in refusal(folder)


def test_load_config_disagrees(saved, tmp_path) -> None:
    """A config that asks for terabytes is refused by what the file holds, before any is taken."""
    folder = shutil.copytree(saved, tmp_path / "copy")
    rewrite_config(folder, n_embd=65_535, n_layer=1024, n_inner=2**20)
    assert "expected shape" in refusal(folder)
    shutil.copy(saved / "config.json", folder)
    rewrite_config(folder, tie_word_embeddings=False)
    assert "got no lm_head.weight" in refusal(folder)


def test_load_tied_differs(saved, tmp_path) -> None:
    """transformers 5 would leave it untied, with a warning: another function than ours."""
    folder = shutil.copytree(saved, tmp_path / "copy")
    rewrite_weights(folder, lambda w: {**w, "lm_head.weight": w[WTE] + 1})
    assert "tie_word_embeddings: expected false, got true: lm_head.weight differs" in refusal(
        folder
    )


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")


def write(name: str, text: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(text)


def index(text: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        os.rename(folder / "model.safetensors", folder.parent / "elsewhere.safetensors")
        (folder / "model.safetensors.index.json").write_text(text)

    return spoil


def shard(name: Any) -> Callable[[Path], None]:
    return index(json.dumps({"weight_map": {"wte.weight": name}}))


FOLDERS: list[tuple[Callable[[Path], Any], str]] = [
    (shutil.rmtree, "copy: expected a folder with config.json and model.safetensors, got no"),
    (lambda f: (f / "config.json").unlink(), "config.json: expected a JSON file, got no such file"),
    (write("config.json", b"{"), "config.json: expected a JSON object, got other text"),
    (write("config.json", b"\xff\xfe\xfd"), "config.json: expected a JSON object, got other text"),
    (write("config.json", b"[" * 100_000), "config.json: expected a JSON object, got other text"),
    (
        write("config.json", b'{"n_embd": ' + b"9" * 9999 + b"}"),
        "config.json: expected a JSON object, got other text",
    ),
    (write("config.json", b"[]"), "config.json: expected a JSON object, got a list"),
    (write("config.json", b" " * (5 << 20)), "config.json: expected at most 4 MiB, got more"),
    (
        lambda f: (f / "model.safetensors").unlink(),
        "expected model.safetensors or model.safetensors.index.json, got",
    ),
    (
        only_a_pickle,
        "pytorch_model.bin: expected model.safetensors, got a pickle, which may run code",
    ),
    (write("model.safetensors", b""), "model.safetensors: expected an intact safetensors file"),
    (write("model.safetensors", b"PK\x03\x04" * 99), "model.safetensors: expected an intact"),
    (index("{"), "index.json: expected a JSON object, got other text"),
    (index("{}"), "weight_map: expected a mapping from tensors to files, got null"),
    (index('{"weight_map": {}}'), "got no wte.weight"),
    (shard("gone.safetensors"), "gone.safetensors: expected the file"),
    (
        shard("../elsewhere.safetensors"),
        "file name in the same folder, got ../elsewhere.safetensors",
    ),
    (shard("/etc/passwd"), "file name in the same folder, got /etc/passwd"),
    (shard("..\\elsewhere.safetensors"), "file name in the same folder, got ..\\elsewhere"),
    (shard(".."), "file name in the same folder, got .."),
    (shard(""), "file name in the same folder, got"),
    (shard("a\0b"), "file name in the same folder, got a\\x00b"),
    (shard(["x"]), "file name in the same folder, got a list"),
    (shard("config.json"), "config.json: expected an intact safetensors file"),
    (lambda f: os.mkfifo(f / "pipe") or shard("pipe")(f), "pipe: expected the file"),
]


@pytest.mark.parametrize(("spoil", "found"), FOLDERS, ids=[found[:60] for _, found in FOLDERS])
def test_load_broken_folder(saved, tmp_path, spoil, found) -> None:
    folder = shutil.copytree(saved, tmp_path / "copy")
    spoil(folder)
    assert found in refusal(folder)


def test_load_damaged_header(saved, tmp_path) -> None:
    """Cut anywhere, or with any byte of the header changed: refused in one line, or harmless."""
    folder = shutil.copytree(saved, tmp_path / "copy")
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    n_header = 8 + int.from_bytes(whole[:8], "little")
    for end in (0, 7, 8, 100, n_header, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert "model.safetensors: expected an intact" in refusal(folder)
    outcomes = set()
    for place in [*range(8), *range(8, n_header, 41)]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x21]) + whole[place + 1 :])
        try:
            load(folder)
            outcomes.add("loaded")
        except CheckpointError as wrong:
            assert str(wrong).isprintable()
            outcomes.add(re.sub(r".*: (expected an intact|tensor).*", r"\1", str(wrong)))
    assert outcomes >= {"expected an intact", "tensor"}


def test_load_package_missing(saved, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert "package safetensors (pip install" in refusal(saved)


# --------------------------------------------------------------------------------- full disks


def test_save_failed(saved, tmp_path, monkeypatch) -> None:
    folder = shutil.copytree(saved, tmp_path / "copy")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    calls = iter(range(9))

    def full(file, data) -> None:
        if next(calls) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface, "write_all", full)
    with pytest.raises(CheckpointError) as caught:
        build(tie_embeddings=False).save_pretrained(folder)
    message = str(caught.value)
    assert message.isprintable() and message.startswith(str(folder / "model.safetensors"))
    assert "No space left on device" in message
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("path", ["file", "file/below", "nul\0"])
def test_save_impossible_place(tmp_path, path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not be written") as caught:
        build().save_pretrained(tmp_path / path)
    assert str(caught.value).isprintable()


def test_save_needs_no_package(tmp_path, monkeypatch) -> None:
    for name in ("safetensors", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    build().save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_save_changes_nothing(tmp_path) -> None:
    ours = build(bias=False)
    before = weights_of(ours)
    ours.save_pretrained(tmp_path)
    assert_same_bits(weights_of(ours), before)
