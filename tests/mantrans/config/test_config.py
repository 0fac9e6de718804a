"""Configurations: what is read back is what was written; what is wrong is said in one line."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mantrans.config import DATASETS, Config, ModelConfig, TrainingConfig, strict_yaml
from mantrans.config.__main__ import reference, schema
from mantrans.data import registry
from mantrans.errors import ConfigError
from tests.support.fuzz import FIELDS, VALUES, Change, changed, changes

ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
VALID: dict[str, dict[str, Any]] = {
    "model": {"d_model": 64, "n_heads": 4, "max_seq_len": 128},
    "data": {"dataset": "builtin-stories", "max_length": 64},
    "training": {"max_steps": 10, "warmup_steps": 2, "experiment_name": "trial"},
    "evaluation": {"generation_prompts": ["Once"], "top_k": 5},
}


def refusal(values: Any, **changes: Any) -> str:
    """The message with which `values`, its fields changed ("section__field"), are refused."""
    values = copy.deepcopy(values)
    for name, value in changes.items():
        section, field = name.split("__")
        values[section][field] = value
    with pytest.raises(ConfigError) as caught:
        Config.from_dict(values, "c.yaml")
    message = str(caught.value)
    assert message.isprintable() and len(message) < 1500
    return message


def test_shipped_configs_promised() -> None:
    """The shipped configurations are the promised ones."""
    names = {"quickstart", "tinystories", "tinystories_custom_tokenizer"}
    assert {path.stem for path in CONFIGS} >= names | {
        "tiny-textbooks-small",
        "gpt2-124m",
        "tinystories-33m",
    }
    model = Config.load(next(p for p in CONFIGS if p.stem == "tinystories")).model
    shape = (model.d_model, model.n_blocks, model.n_heads, model.d_ffn, model.max_seq_len)
    assert shape == (256, 4, 4, 512, 256)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_round_trip(path: Path, tmp_path: Path) -> None:
    """A shipped configuration survives a round trip."""
    config = Config.load(path)
    config.save(tmp_path / "saved.yaml")
    assert Config.load(tmp_path / "saved.yaml") == config
    assert Config.from_dict(config.to_dict()) == config
    assert config.training.experiment_name == path.stem


def test_defaults_resolved() -> None:
    """Defaults are resolved where they are asked for."""
    config = Config.from_dict({"training": {"num_epochs": 1, "gradient_accumulation_steps": 3}})
    assert config.model.d_ffn is None and config.model.feed_forward_width == 4 * 256
    assert config.sequence_length == config.model.max_seq_len
    assert config.tokens_per_step == 16 * 3 * 256
    assert TrainingConfig(warmup_ratio=0.1).warmup(50) == 5
    assert TrainingConfig(warmup_steps=7).warmup(50) == 7
    assert TrainingConfig().warmup(50) == 0


def test_load_unknown_names() -> None:
    """Unknown names are answered with the nearest."""
    assert "did you mean training.learning_rate?" in refusal(VALID, training__learning_rat=1e-3)
    assert "did you mean training.batch_size?" in refusal(VALID, model__batch_size=1)
    assert "did you mean model?" in refusal({"modle": {}})
    assert "did you mean model.d_model?" in refusal({"d_model": 64})
    assert "did you mean 'cosine'?" in refusal(VALID, training__lr_decay="cosin")
    assert "expected a section (model, data, training, evaluation)" in refusal({"zzz": 1})


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        (
            "training__seed",
            True,
            "expected an integer at least 0 and at most 9223372036854775807, got true",
        ),
        ("model__d_model", 64.0, "an integer at least 1"),
        ("model__d_model", "64", "an integer at least 1"),
        ("model__d_model", 0, "at least 1"),
        ("model__d_model", None, "got null"),
        ("model__bias", 1, "true or false"),
        ("training__learning_rate", float("nan"), "got nan"),
        ("training__learning_rate", float("inf"), "got inf"),
        ("training__learning_rate", 10**400, "a finite number above 0"),
        ("training__learning_rate", "fast", "got fast (text)"),
        ("training__beta2", 1.0, "below 1"),
        ("training__experiment_name", "../../etc", "a letter or digit, then"),
        ("training__experiment_name", "a/b", "a letter or digit, then"),
        ("training__experiment_name", "latest.pt", "not ending in .pt"),
        ("training__experiment_name", "a\n", "a letter or digit, then"),
        ("data__cache_dir", "a\0b", "one line of text"),
        ("training__device", "tpu", "auto, cpu, cuda or cuda:N"),
        ("evaluation__generation_prompts", "Once", "a list of texts"),
        (
            "evaluation__generation_prompts",
            ["Once", 3],
            "a list of texts, none empty, got 3 as item 2",
        ),
        ("evaluation__generation_prompts", ["\ud800"], "a list of texts"),
        ("model__n_heads", 5, "a multiple of model.n_heads (5)"),
        ("data__max_length", 129, "at most model.max_seq_len (128)"),
        ("data__dataset", "local", "a file or folder, since data.dataset is local"),
        ("data__path", "text.txt", "local, since data.path is given"),
        ("training__num_epochs", 3, "expected null, since training.max_steps is given, got 3"),
        ("training__max_steps", None, "steps, since training.num_epochs is null, got null"),
        ("training__warmup_ratio", 0.1, "expected null, since training.warmup_steps is given"),
        ("training__warmup_steps", 11, "at most 10, the steps of the run"),
        ("training__min_learning_rate", 1.0, "at most training.learning_rate"),
    ],
)
def test_field_wrong_value(field: str, value: Any, accepted: str) -> None:
    """A wrong value is named with what is accepted."""
    message = refusal(VALID, **{field: value})
    assert message.startswith("c.yaml: ") and accepted in message
    assert field.split("__")[1] in message or "n_heads" in message


LOCAL = {"dataset": "local", "path": "a.txt"}


def test_validation_split_exclusive(tmp_path: Path) -> None:
    """A validation text and a share held out exclude each other."""
    assert Config.from_dict({**VALID, "data": LOCAL}).data.share_held_out == 0.05
    own = {**VALID, "data": {**LOCAL, "val_path": "b.txt"}}
    assert Config.from_dict(Config.from_dict(own).to_dict()).data.val_path == "b.txt"
    both = "validation_fraction: expected null, since data.val_path is given, got 0.1"
    assert both in refusal(own, data__validation_fraction=0.1)
    assert "dataset: expected local, since data.val_path is given" in refusal(
        VALID, data__val_path="b.txt"
    )
    share = {**VALID, "data": {**LOCAL, "validation_fraction": 0.2}}
    data = Config.from_dict(share, "c.yaml", ["data.val_path=b.txt"]).data
    assert (data.val_path, data.validation_fraction) == ("b.txt", None)
    data = Config.from_dict(own, "c.yaml", ["data.validation_fraction=0.3"]).data
    assert (data.val_path, data.validation_fraction) == (None, 0.3)
    with pytest.raises(ConfigError, match="validation_fraction: expected null"):
        Config.from_dict(share, "c.yaml", ["data.val_path=b", "data.validation_fraction=0.3"])


OF_ITS_SET = {"subset_size": 80, "val_subset_size": 4, "text_field": "body"}


@pytest.mark.promise("what is used is said")
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_own_text_under_shipped_config(path: Path) -> None:
    """One's own text is used whole under any shipped configuration."""
    sets = ["data.dataset=local", "data.path=a.txt"]
    data = Config.load(path, sets).data
    assert (data.subset_size, data.val_subset_size, data.text_field) == (None, None, None)
    for wanted in (["data.subset_size=7", *sets], [*sets, "data.subset_size=7"]):
        data = Config.load(path, wanted).data
        assert (data.subset_size, data.val_subset_size, data.path) == (7, None, "a.txt")


def test_subset_of_other_dataset() -> None:
    """What a file says of its dataset holds for that one alone."""
    own = {**VALID, "data": {**LOCAL, **OF_ITS_SET, "val_path": "v.txt", "max_length": 32}}
    for sets in ([], ["data.dataset=local"], ["data.path=b.txt"], ["training.seed=3"]):
        data = Config.from_dict(own, "c.yaml", sets).data.model_dump()
        assert OF_ITS_SET.items() <= data.items()
    data = Config.from_dict(own, "c.yaml", ["data.dataset=tinystories"]).data
    assert data == Config.from_dict({**VALID, "data": {"dataset": "tinystories"}}).data.model_copy(
        update={"max_length": 32}
    )
    unnamed = {**VALID, "data": {"subset_size": 80}}  # of the default dataset
    for name, size in (("builtin-stories", 80), ("tinystories", None)):
        assert Config.from_dict(unnamed, "", [f"data.dataset={name}"]).data.subset_size == size


@pytest.mark.parametrize(
    "field",
    ["data.path", "data.val_path", "data.cache_dir", "training.output_dir",
     "training.checkpoint_dir"],
)  # fmt: skip
def test_path_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    """A tilde is the home folder in every path."""
    monkeypatch.setenv("HOME", str(tmp_path))
    section, name = field.split(".")
    values = {**VALID, "data": dict(LOCAL)}
    values[section] = {**values[section], name: "~/x"}
    for config in (
        Config.from_dict(values),
        Config.from_dict({**VALID, "data": LOCAL}, "", [f"{field}=~/x"]),
    ):
        assert getattr(getattr(config, section), name) == str(tmp_path / "x")
        assert Config.from_dict(config.to_dict()) == config
    values[section][name] = "~nobody-of-this-name/x"
    with pytest.raises(ConfigError, match=r"expected a known user after ~ .*, got ~nobody"):
        Config.from_dict(values)


def test_model_shape_source_names() -> None:
    """A network alone is checked under the names of its source."""
    shape = {"d_model": 25, "n_heads": 3, "vocab_size": 9}
    with pytest.raises(
        ConfigError, match=r"^x: width: expected a multiple of heads \(3\), got 25$"
    ):
        ModelConfig.complete(shape, "x", {"d_model": "width", "n_heads": "heads"})
    with pytest.raises(ConfigError, match=r"^x: size: expected an integer at least 1, got null$"):
        ModelConfig.complete({}, "x", {"vocab_size": "size"})
    with pytest.raises(ConfigError, match=r"^x: expected a field, got n_hed; did you mean n_heads"):
        ModelConfig.complete({"n_hed": 3}, "x")


def test_assignment_checked() -> None:
    """A checked configuration stays one when a field is assigned."""
    config = Config.from_dict(VALID)
    config.model.vocab_size = 300
    for field, value in (("vocab_size", "300"), ("n_heads", 5), ("n_head", 4)):
        with pytest.raises(ValidationError):
            setattr(config.model, field, value)


def test_datasets_have_sources() -> None:
    assert set(DATASETS) == {"builtin-stories", "local", *registry.HUB_SETS}


def test_generated_files_current() -> None:
    """By `python -m mantrans.config --schema > configs/schema.json`, and so the page."""
    found, page = schema(), reference()
    assert (ROOT / "configs/schema.json").read_text() == found
    assert (ROOT / "docs/configuration.md").read_text() == page
    for _, field in FIELDS:
        assert f'\n        "{field}": {{' in found and f"\n| `{field}` | " in page


def test_fields_without_torch() -> None:
    code = "import sys, mantrans.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_sections_contradicting() -> None:
    rounding = {**VALID, "model": {**VALID["model"], "dtype": "float32"}}
    assert "model.dtype is float32" in refusal(rounding, training__stochastic_rounding=True)
    wsd = {**VALID["training"], "lr_decay": "wsd", "decay_fraction": 0.9, "warmup_steps": 5}
    assert "the rest of the run after warm-up" in refusal({**VALID, "training": wsd})


def test_numbers_as_written(tmp_path: Path) -> None:
    """Numbers may be written as people write them."""
    path = tmp_path / "c.yaml"
    path.write_text(
        "training: {max_steps: 10, learning_rate: 3e-4, beta1: '9e-1', weight_decay: 1}"
    )
    training = Config.load(path).training
    assert (training.learning_rate, training.beta1, training.weight_decay) == (3e-4, 0.9, 1.0)
    assert type(training.weight_decay) is float


def test_overrides_alternatives(tmp_path: Path) -> None:
    """Overrides replace fields and their alternatives."""
    path = tmp_path / "c.yaml"
    path.write_text("training:\n  max_steps: 10\n  warmup_steps: 2\ndata:\n")
    sets = ["training.num_epochs=2", "training.warmup_ratio=0.5", "training.experiment_name=2024"]
    sets += ["evaluation.generation_prompts=[a, b c]", "data.max_length="]
    config = Config.load(path, sets)
    assert Config.from_dict(Config.load(path).to_dict(), "a checkpoint", sets) == config
    assert (config.training.max_steps, config.training.num_epochs) == (None, 2)
    assert (config.training.warmup_steps, config.training.warmup_ratio) == (None, 0.5)
    assert config.training.experiment_name == "2024"
    assert config.evaluation.generation_prompts == ["a", "b c"]
    assert config.data.max_length is None


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.learning_rat=1", "did you mean training.learning_rate?"),
        ("nothing", "expected section.field=value"),
        ("model=3", "expected section.field=value"),
        ("model.d_model=wide", "--set model.d_model=wide: expected an integer at least 1"),
        ("model.d_model=[1", "expected plain YAML"),
        ("model.d_model=&a 3", "anchors and aliases"),
        ("model.d_model=!!python/object/apply:os.system [ls]", "tags"),
        ("trainig.seed=3", "did you mean training?"),
    ],
)
def test_override_wrong(tmp_path: Path, override: str, expected: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("training: {max_steps: 10}")
    with pytest.raises(ConfigError) as caught:
        Config.load(path, [override])
    assert expected in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty"),
        (b" \n\n", "empty"),
        (b"# only a comment\n", "expected the sections model, data, training, evaluation"),
        (b"\xff\xfe\x00", "byte 0xff in position 0"),
        (b"- a\n- b\n", "evaluation, got a list"),
        (b"model: 3\n", "model: expected a mapping of its fields, got 3"),
        (b"model: {d_model: 8, d_model: 9}", "'d_model' is given twice"),
        (b"model: &a {d_model: 8}\ndata: *a", "anchors and aliases"),
        (b"model: !!python/object:os.x {}", "tags"),
        (b"model: {d_model: !!int '8'}", "tags"),
        (b"model: {[a]: 8}", "a key must be plain text"),
        (b"model: {? {a: b} : 8}", "a key must be plain text"),
        (b"model: {d_model: 8", "line 1"),
        (b"a: \x07", "expected plain YAML"),
        (b"[" * 60_000, "nested too deep"),
        (b"[" + b"a," * 20_000 + b"]", "evaluation, got a list"),
        (b"x" * (strict_yaml.MAX_BYTES + 1), "too large"),
        (b"model: {d_model: " + b"9" * 60_000 + b"}", "expected an integer"),
        (b"--- {}\n--- {}", "expected plain YAML"),
    ],
)
def test_load_broken_file(tmp_path: Path, content: bytes, expected: str) -> None:
    """A broken file is refused in one line."""
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    start = time.process_time()
    with pytest.raises(ConfigError) as caught:
        Config.load(path)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value) and str(caught.value).isprintable()
    assert time.process_time() - start < 5


def test_load_unreadable(tmp_path: Path) -> None:
    """What is not a readable file is refused."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "none.yaml", tmp_path / "loop"):
        with pytest.raises(ConfigError, match=r"cannot be read \(.*\); expected a YAML file"):
            Config.load(path)
    for name in ("a\0b", "x" * 5000):
        with pytest.raises(ConfigError, match="cannot be read"):
            Config.load(name)


def test_load_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(b"\xef\xbb\xbftraining:\r\n  max_steps: 10\r\n")
    assert Config.load(path).training.max_steps == 10


@pytest.mark.promise("alias bombs and code")
def test_load_alias_bomb(tmp_path: Path) -> None:
    """An alias bomb ends at once and in little memory."""
    bomb = 'a0: &a0 ["x","x","x","x","x","x","x","x","x","x"]\n'
    for level in range(1, 12):
        bomb += f"a{level}: &a{level} [{','.join([f'*a{level - 1}'] * 10)}]\n"
    path = tmp_path / "c.yaml"
    path.write_text(bomb)
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(ConfigError, match="anchors and aliases"):
        Config.load(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert time.process_time() - start < 1 and peak < 4 << 20


@pytest.mark.promise("any configuration")
@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)
@given(changes())
@example([("value", "training", "seed", True)])
@example([("top", "", "", None)])
@example([("top", "", "", {None: None})])
def test_config_mutated(wanted: list[Change]) -> None:
    """Valid means: it round-trips through a dictionary and through YAML to an equal one."""
    values = changed(copy.deepcopy(VALID), wanted)
    try:
        config = Config.from_dict(values, "c.yaml")
    except ConfigError as error:
        message = str(error)
        assert message.startswith("c.yaml: ") and message.isprintable() and len(message) < 1500
        return
    assert Config.from_dict(config.to_dict()) == config
    text = strict_yaml.dump(config.to_dict())
    assert Config.from_dict(strict_yaml.parse(text, "dumped")) == config
    assert config.model.head_dim or config.model.d_model % config.model.n_heads == 0
    assert config.model.n_heads % config.model.key_value_heads == 0
    assert config.training.init_from or config.sequence_length <= config.model.max_seq_len


MARKS = ["  ", "- ", ": ", "? ", "| ", "> ", "<<", "---", "\\u", "&a ", "*a", "!!int "]
WORDS = ["model", "training:", "max_steps: 10", "3e-4", ".nan"]
PIECES = st.sampled_from([*"{}[]\n\t#,@%\"'", *MARKS, *WORDS])


@pytest.mark.promise("any configuration")
@settings(max_examples=300, deadline=None, database=None)
@given(st.lists(PIECES | st.text(max_size=3), max_size=25).map("".join))
def test_load_any_text(text: str) -> None:
    """Any text is YAML or refused in one line."""
    try:
        Config.from_dict(strict_yaml.parse(text, "c.yaml"), "c.yaml")
    except ConfigError as error:
        assert str(error).startswith("c.yaml:") and str(error).isprintable()


@pytest.mark.promise("any configuration")
@settings(max_examples=250, deadline=None, database=None)
@given(st.text(max_size=60).filter(lambda text: "=" not in text), VALUES)
def test_override_any(tmp_path_factory: pytest.TempPathFactory, key: str, value: Any) -> None:
    """Any override is applied or refused in one line."""
    path = tmp_path_factory.getbasetemp() / "small.yaml"
    path.write_text("training: {max_steps: 10}")
    for override in (key, f"{key}={value!r}", f"training.seed={value!r}", f"model.dtype={key}"):
        try:
            Config.load(path, [override])
        except ConfigError as error:
            assert str(error).isprintable()


def test_max_consecutive_skips_old_name() -> None:
    """It was max_nan_count in the first runs: files, checkpoints and --set may still say so."""
    old = {"training": {"max_nan_count": 3, "max_steps": 1}}
    assert Config.from_dict(old).training.max_consecutive_skips == 3
    replaced = Config.from_dict({"training": {"max_steps": 1}}, "", ["training.max_nan_count=4"])
    assert replaced.training.max_consecutive_skips == 4
    old["training"]["max_consecutive_skips"] = 4
    with pytest.raises(ConfigError, match="got max_nan_count"):
        Config.from_dict(old)
