"""training.init_from: a run that goes on training a folder of transformers."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from mantrans import CustomTransformerWrapper
from mantrans.checkpoint import state_file
from mantrans.cli import main
from mantrans.config import Config, strict_yaml
from mantrans.data.tokenizer import foreign_tokenizer, load_tokenizer
from mantrans.errors import ConfigError, DataError, MantransError
from mantrans.training.summary import summary
from mantrans.training.trainer import Trainer
from tests.support import families
from tests.support.compare import assert_same_bits
from tests.support.huggingface import gpt2
from tests.support.runs import GOLDEN, outcome, small, stop_after

transformers = pytest.importorskip("transformers", reason="it makes the folder")
GOLDEN_TOKENIZER = load_tokenizer(GOLDEN / "tokenizer")
ROWS = GOLDEN_TOKENIZER.vocab_size + 7  # more than the tokenizer has tokens, as Qwen's models


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 with a tokenizer, written by transformers alone."""
    return write_pretrained(tmp_path_factory.mktemp("pretrained") / "tiny-qwen2", "qwen2")


def write_pretrained(folder: Path, case: str) -> Path:
    shape: dict[str, Any] = {"vocab_size": ROWS, "d_model": 16}
    if case == "gpt2":
        source = CustomTransformerWrapper(
            **shape, n_blocks=1, n_heads=2, d_ffn=40, max_seq_len=40, dtype=torch.float32
        )
        gpt2(source.config, torch.float32, source.model.named_parameters()).save_pretrained(folder)
    else:
        source = families.ours(case, torch.float32, "reference", **shape)
        families.theirs(source).save_pretrained(folder)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(GOLDEN_TOKENIZER.library.to_str()),
        eos_token="<|endoftext|>",
    )
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokens")


def configured(
    folder: Path, tokens: Path, pretrained: Path, unset: tuple[str, ...] = ("data.tokenizer",),
    **changes: Any,
) -> Config:  # fmt: skip
    """A run that starts from `pretrained`, with no more of the model than its dtype."""
    values = small(folder, tokens, **changes).to_dict()
    values["model"] = {"dtype": "float32", **changes.get("model", {})}
    values["data"]["max_length"] = 16
    values["training"]["init_from"] = str(pretrained)
    for name in unset:
        section, _, field = name.partition(".")
        del values[section][field]
    return Config.from_dict(values)


def train(config: Config, **options: Any) -> Trainer:
    trainer = Trainer(config, quiet=True, **options)
    trainer.run()
    return trainer


def refusal(config: Config) -> str:
    """The one line with which a start is refused, after which nothing is there that was not."""
    with pytest.raises(MantransError) as caught:
        Trainer(config, quiet=True)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 500, message
    for place in (config.training.output_dir, config.training.checkpoint_dir):
        assert not Path(place).exists()
    return message


# ------------------------------------------------------------------------------------- the start


def test_init_from_shape_weights_tokenizer(tmp_path, tokens, pretrained) -> None:
    """They are the folder's."""
    trainer = Trainer(configured(tmp_path, tokens, pretrained), quiet=True)
    expected = CustomTransformerWrapper.from_pretrained(pretrained, device="cpu")
    assert trainer.wrapper.config.resolved() == expected.config.resolved()
    assert trainer.config.model.resolved() == expected.config.resolved()
    for (name, found), (_, value) in zip(
        trainer.wrapper.model.named_parameters(), expected.model.named_parameters(), strict=True
    ):
        assert torch.equal(found, value), name
    assert trainer.tokenizer.hash == GOLDEN_TOKENIZER.hash
    assert trainer.tokenizer.vocab_size == ROWS and trainer.config.sequence_length == 16
    trainer.folders.close()


def test_init_from_first_loss(tmp_path, tokens, pretrained) -> None:
    trainer = Trainer(configured(tmp_path, tokens, pretrained), quiet=True)
    stream = trainer.dataset.validation
    ids = torch.as_tensor(stream.read(0, 64).astype("int64")).view(4, 16)
    model = transformers.AutoModelForCausalLM.from_pretrained(pretrained)
    with torch.no_grad():
        expected = model(ids, labels=ids).loss.item()
    assert trainer.wrapper.forward(ids, ids)["loss"].item() == pytest.approx(expected, rel=1e-5)
    trainer.folders.close()


@pytest.mark.parametrize(
    "case",
    [
        "qwen2",
        *(
            pytest.param(x, marks=pytest.mark.slow)
            for x in ("gpt2", "llama, scaled, tied", "qwen3")
        ),
    ],
)
def test_init_from_export(tmp_path, tokens, case) -> None:
    """The whole way: a folder of theirs, 50 steps, the command, their classes and pipeline."""
    pretrained = write_pretrained(tmp_path / "pretrained", case)
    trainer = train(configured(tmp_path, tokens, pretrained, max_steps=50, save_every=50))
    assert trainer.progress.best_loss < 4.6  # it began at more than 5
    latest = tmp_path / "checkpoints" / "small" / "latest.pt"
    out = tmp_path / "out"
    assert main(["export", "--checkpoint", str(latest), "--output", str(out)]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    before = transformers.AutoModelForCausalLM.from_pretrained(pretrained)
    assert type(theirs) is type(before)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ids = tokenizer("One day, a little girl", return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == trainer.tokenizer.encode("One day, a little girl")
    with torch.no_grad():
        logits, before = theirs(ids).logits, before(ids).logits
    ours = trainer.wrapper.forward(ids)["logits"]
    assert (logits - ours).abs().max() < 1e-4 < (before - ours).abs().max()
    run = transformers.pipeline("text-generation", model=str(out))
    [found] = run("One day", max_new_tokens=8, do_sample=False)
    expected = trainer.wrapper.generate(
        [trainer.tokenizer.encode("One day")],
        max_length=len(trainer.tokenizer.encode("One day")) + 8,
        temperature=0,
        eos_token_id=trainer.tokenizer.eot_id,
    )[0]
    assert found["generated_text"] == trainer.tokenizer.decode(expected.tolist())
    assert_recorded(trainer, latest, pretrained)


def assert_recorded(trainer: Trainer, latest: Path, pretrained: Path) -> None:
    """What the run began with, in its checkpoint, its report and its config."""
    report = json.loads((trainer.directory / "report.json").read_text())
    origin = state_file.load(latest)["init_from"]
    assert origin == report["run"]["init_from"] and origin["folder"] == str(pretrained)
    config = json.loads((pretrained / "config.json").read_text())
    assert [origin["architecture"]] == config["architectures"]
    digest = hashlib.sha256((pretrained / "model.safetensors").read_bytes()).hexdigest()
    assert origin["sha256"].keys() == {"config.json", "model.safetensors"}
    assert origin["sha256"]["model.safetensors"] == digest
    saved = Config.load(trainer.directory / "config.yaml")
    assert saved.training.init_from == saved.data.tokenizer == str(pretrained)
    assert saved.model.d_model == 16 and saved.model.vocab_size == ROWS


# ------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize(
    "given", ["the first config", pytest.param("the checkpoint's config", marks=pytest.mark.slow)]
)
def test_init_from_resumed(tmp_path, tokens, pretrained, given) -> None:
    """A resumed run needs no folder and is exact."""
    folder = shutil.copytree(pretrained, tmp_path / "folder")
    (tmp_path / "whole").mkdir(), (tmp_path / "parts").mkdir()
    train(configured(tmp_path / "whole", tokens, folder))
    config = configured(tmp_path / "parts", tokens, folder)
    stopped = Trainer(config, quiet=True)
    stop_after(stopped, 5)
    stopped.run()
    shutil.rmtree(folder)
    first = tmp_path / "first.yaml"
    first.write_text(strict_yaml.dump(config.model_dump(exclude_unset=True)))
    latest = tmp_path / "parts" / "checkpoints" / "small" / "latest.pt"
    if given == "the checkpoint's config":
        config = Config.from_dict(state_file.load(latest)["config"])
    train(config, resume="latest")
    assert_same_bits(outcome(tmp_path / "parts"), outcome(tmp_path / "whole"))
    for command in (
        ["generate", "--checkpoint", str(latest), "--prompt", "One", "--max-length", "9"],
        ["evaluate", "--checkpoint", str(latest), "--max-batches", "1"],
        ["evaluate", "--checkpoint", str(latest), "--max-batches", "1", "--config", str(first)],
    ):
        assert main(command) == 0


# -------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"d_model": 32}, "model.d_model: expected 16, as "),
        ({"norm": "layer_norm"}, "model.norm: expected rms_norm (text), as "),
        ({"vocab_size": 300}, f"model.vocab_size: expected {ROWS}, as "),
        ({"qkv_bias": False}, "model.qkv_bias: expected true, as "),
        ({"max_seq_len": 16}, "model.max_seq_len: expected 40, as "),
    ],
)
def test_init_from_shape_clash(tmp_path, tokens, pretrained, model, expected) -> None:
    message = refusal(configured(tmp_path, tokens, pretrained, model=model))
    assert message.startswith(expected) and str(pretrained) in message, message


def test_init_from_same_shape(tmp_path, tokens, pretrained) -> None:
    shape = {"d_model": 16, "n_kv_heads": 2, "d_ffn": 80, "bias": False, "initializer_range": 0.5}
    Trainer(configured(tmp_path, tokens, pretrained, model=shape), quiet=True).folders.close()


def test_init_from_command_line(tmp_path, tokens, pretrained) -> None:
    """And the file's tokenizer, but not what other overrides say, before it or after it."""
    small(tmp_path, tokens).save(tmp_path / "c.yaml")
    mine = ["data.max_length=16", f"training.init_from={pretrained}"]
    found = Config.load(tmp_path / "c.yaml", mine)
    assert found.model.model_fields_set == {"dtype"} and found.model.dtype == "float32"
    assert "tokenizer" not in found.data.model_fields_set and found.training.batch_size == 4
    for overrides in (["model.d_model=64", *mine], [*mine, "model.d_model=64"]):
        assert refusal(Config.load(tmp_path / "c.yaml", overrides)).startswith("model.d_model: exp")
    Trainer(found, quiet=True).folders.close()
    found.with_model(found.model.model_dump() | {"vocab_size": 9}, "x").save(tmp_path / "d.yaml")
    again = Config.load(tmp_path / "d.yaml", [mine[1]])  # the same folder: nothing is replaced
    assert "d_model" in again.model.model_fields_set
    assert (
        "d_model"
        in Config.load(tmp_path / "c.yaml", ["training.init_from=null"]).model.model_fields_set
    )


def test_init_from_longer_sequences(tmp_path, tokens, pretrained) -> None:
    """Longer sequences than the folder has positions are refused."""
    config = configured(tmp_path, tokens, pretrained)
    config.data.max_length = 41
    assert refusal(config).startswith("data.max_length: expected at most the 40 positions of ")


def test_init_from_other_tokenizer(tmp_path, tokens, pretrained) -> None:
    """It is refused; the same one is not."""
    same = configured(tmp_path, tokens, pretrained, unset=())
    trainer = Trainer(same, quiet=True)
    assert trainer.tokenizer.vocab_size == ROWS
    trainer.folders.close()
    other = {"data": {"tokenizer": "tinystories_bpe_4096"}}
    message = refusal(configured(tmp_path / "new", tokens, pretrained, unset=(), **other))
    assert message.startswith(f"data.tokenizer: expected that of {pretrained} (")
    assert "got tinystories_bpe_4096 (4,096 tokens" in message


def spoil(folder: Path, name: str, change: Callable[[dict], Any]) -> None:
    fields = json.loads((folder / name).read_text())
    change(fields)
    (folder / name).write_text(json.dumps(fields))


def not_finite(folder: Path) -> None:
    torch_files = pytest.importorskip("safetensors.torch")
    tensors = torch_files.load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    torch_files.save_file(tensors, folder / "model.safetensors")


HOSTILE: list[tuple[str, Callable[[Path], Any], str]] = [
    (
        "no folder",
        shutil.rmtree,
        "expected a folder with config.json and model.safetensors, got no",
    ),
    ("no weights", lambda f: (f / "model.safetensors").unlink(), "expected model.safetensors or"),
    (
        "cut weights",
        lambda f: (f / "model.safetensors").write_bytes(b"\x08" + bytes(99)),
        "model.safetensors: expected an intact safetensors file",
    ),
    ("NaN", not_finite, "expected finite weights in float32, got NaN or infinity in final_norm.w"),
    (
        "another model",
        lambda f: spoil(f, "config.json", lambda c: c.update(model_type="bert\n")),
        "model_type: expected one of gpt2, llama, qwen2, qwen3, starcoder2, got bert\\n",
    ),
    (
        "no tokenizer",
        lambda f: (f / "tokenizer.json").unlink(),
        "expected tokenizer.json, or vocab",
    ),
    (
        "broken tokenizer",
        lambda f: (f / "tokenizer.json").write_text('{"model": 3}'),
        "tokenizer.json cannot be used",
    ),
    (
        "more tokens than rows",
        lambda f: spoil(
            f,
            "tokenizer.json",
            lambda t: t["added_tokens"].extend(
                {**t["added_tokens"][0], "id": i + ROWS - 7, "content": f"<|{i}|>"}
                for i in range(9)
            ),
        ),
        f"data.tokenizer: expected {ROWS:,} tokens, as ",
    ),
]


@pytest.mark.parametrize(
    ("change", "expected"), [h[1:] for h in HOSTILE], ids=[h[0] for h in HOSTILE]
)
@pytest.mark.promise("refused starts")
def test_init_from_hostile_folder(tmp_path, tokens, pretrained, change, expected) -> None:
    """A hostile folder is refused before anything is created."""
    folder = shutil.copytree(pretrained, tmp_path / "copy")
    change(folder)
    assert expected in refusal(configured(tmp_path, tokens, folder))


def test_init_from_mistake(tmp_path, tokens, capsys) -> None:
    """A mistake ends the command in one line."""
    config = small(tmp_path, tokens)
    config.save(tmp_path / "c.yaml")
    arguments = ["--set", "training.init_from=nowhere", "--config", str(tmp_path / "c.yaml")]
    assert main(["train", *arguments]) == 2
    assert capsys.readouterr().err == (
        "error: nowhere: expected a folder with config.json and model.safetensors, got no such "
        "folder; nothing is downloaded\n"
    )


def test_init_from_summary(tmp_path, tokens, pretrained) -> None:
    """It is of the folder's shape."""
    found = summary(configured(tmp_path, tokens, pretrained))
    wrapper = CustomTransformerWrapper.from_pretrained(pretrained, device="cpu")
    assert f"{wrapper.count_parameters():,}" in found
    with pytest.raises(ConfigError, match=r"model\.n_blocks: expected 2"):
        summary(configured(tmp_path, tokens, pretrained, model={"n_blocks": 5}))


# ---------------------------------------------------------------------------- foreign tokenizers


def changed_tokenizer(folder: Path, change: Callable[[dict], Any]) -> Path:
    content = json.loads(GOLDEN_TOKENIZER.library.to_str())
    change(content)
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def added(content: dict[str, Any], text: str, **changes: Any) -> None:
    token = {**content["added_tokens"][0], "content": text, "id": GOLDEN_TOKENIZER.vocab_size}
    content["added_tokens"].append({**token, **changes})


def as_llama3(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    if "<|endoftext|>" in vocabulary:
        vocabulary["<|end_of_text|>"] = vocabulary.pop("<|endoftext|>")
    content["added_tokens"][0]["content"] = "<|end_of_text|>"


@pytest.mark.parametrize(
    "change",
    [
        lambda c: added(c, "<|im_start|>"),
        lambda c: added(c, "<think>", special=False, normalized=False),
        lambda c: c.update(normalizer={"type": "NFC"}),
        as_llama3,
    ],
    ids=["special", "not special", "NFC", "end of text"],
)
def test_foreign_tokenizer_additions(tmp_path, change) -> None:
    """But a text is never read as a special token, and data.tokenizer is as strict as before."""
    folder = changed_tokenizer(tmp_path / "own", change)
    found = foreign_tokenizer(folder)
    text = "a <|im_start|> b <|endoftext|> c <|end_of_text|> <think> d"
    ids = found.encode(text)
    assert found.decode(ids) == text and found.eot_id not in ids
    special = found.library.token_to_id("<|im_start|>")
    assert special is None or special not in ids
    assert found.eot_id == GOLDEN_TOKENIZER.eot_id
    with pytest.raises(DataError):
        load_tokenizer(folder)


def test_foreign_tokenizer_nfc(tmp_path) -> None:
    found = foreign_tokenizer(
        changed_tokenizer(tmp_path / "nfc", lambda c: c.update(normalizer={"type": "NFC"}))
    )
    assert found.hash != GOLDEN_TOKENIZER.hash and found.decode(found.encode("e\u0301")) == "\u00e9"


@pytest.mark.parametrize(
    "change",
    [
        lambda c: added(c, "<s>", special=False, normalized=False, lstrip=True),
        lambda c: c.update(normalizer={"type": "Lowercase"}),
        lambda c: c["pre_tokenizer"].update(add_prefix_space=True),
        lambda c: c["model"]["vocab"].pop("!"),
    ],
    ids=["takes spaces", "lower case", "prefix space", "no byte"],
)
def test_foreign_tokenizer_restores_text(tmp_path, change) -> None:
    """A foreign tokenizer still restores texts."""
    with pytest.raises(DataError) as caught:
        foreign_tokenizer(changed_tokenizer(tmp_path / "own", change))
    assert str(caught.value).isprintable()


def test_foreign_tokenizer_padding_ids() -> None:
    """Padding ids stand for no text."""
    padded = GOLDEN_TOKENIZER.padded(ROWS)
    assert padded.vocab_size == len(padded.token_bytes) == ROWS
    assert not padded.token_bytes[GOLDEN_TOKENIZER.vocab_size :].any()
    ids = GOLDEN_TOKENIZER.encode("abc")
    assert padded.encode("abc") == ids and padded.decode([*ids, ROWS - 1, *ids]) == "abcabc"
    with pytest.raises(DataError):
        padded.decode([ROWS])
    assert GOLDEN_TOKENIZER.vocab_size == ROWS - 7
