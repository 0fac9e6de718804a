"""Names and numbers inside files: used, or refused in a line; never a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mantrans import CustomTransformerWrapper
from mantrans.config import Config, strict_yaml
from mantrans.data.tokenizer import SHIPPED, load_tokenizer
from mantrans.errors import CheckpointError, ConfigError, DataError, MantransError
from mantrans.evaluation.coherence import NotScored, parse_scores
from mantrans.interop.huggingface import INDEX, WEIGHTS
from mantrans.records import JsonLines, read_records
from mantrans.report.page import TEMPLATES, Run, number, page
from mantrans.report.svg import Curve, Figure
from mantrans.training.trainer import Trainer
from tests.support.runs import checkpoints, finish, small

DEEP = "[" * 200_000


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A model in transformers' format, whose weights an index names."""
    pytest.importorskip("safetensors")
    model = CustomTransformerWrapper(30, 16, 1, 2, 24, 8, device="cpu", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "part.safetensors")
    return tmp_path


# ------------------------------------------------------------------------------ names in files


@pytest.mark.promise("names and links")
@pytest.mark.parametrize(
    "name",
    [
        "x" * 255, "x" * 256, "x" * 300, "x" * 5000, "é" * 200, "", ".", "..", "a/b", "../part",
        "/etc/passwd", "a\\b", "nul\0", "line\nbreak", "\ud800", "folder", "loop", "absent", 5,
        None, [], {}, True, 1e400,
    ],
    ids=lambda name: repr(name)[:20],
)  # fmt: skip
def test_index_names_other_files(saved: Path, name: Any) -> None:
    """An index names only readable files of its folder."""
    (saved / "folder").mkdir()
    (saved / "loop").symlink_to("loop")
    for names in ({"a": name}, {"a": "part.safetensors", "b": name}):
        (saved / INDEX).write_text(json.dumps({"weight_map": names}))
        with pytest.raises(CheckpointError) as refused:
            CustomTransformerWrapper.from_pretrained(saved)
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 800
    (saved / INDEX).write_text(json.dumps({"weight_map": {"a": "part.safetensors"}}))
    CustomTransformerWrapper.from_pretrained(saved, device="cpu")


@pytest.mark.promise("odd numbers in files")
@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000, "a\0b", "\udcff", "\n", "~nobody", " "])
def test_readers_impossible_name(tmp_path, name: str) -> None:
    """A name that no file can have is refused by every reader."""
    path = str(tmp_path / name)
    readers: list[Callable[[], object]] = [
        lambda: CustomTransformerWrapper.from_pretrained(path),
        lambda: CustomTransformerWrapper.from_checkpoint(path),
        lambda: load_tokenizer(path),
        lambda: Config.load(path),
        lambda: Run.load(Path(path)),
    ]
    for read in readers:
        with pytest.raises(MantransError) as refused:
            read()
        assert "\n" not in str(refused.value)


# ------------------------------------------------------------------------------ deep and huge JSON

HUGE = [
    DEEP,
    '{"a":' * 100_000,
    "1" * 5000,
    '{"step": ' + "9" * 5000 + "}",
    "nan",
    '"',
    "\0",
    "\ud800",
]


@pytest.mark.promise("odd numbers in files")
@pytest.mark.parametrize("line", HUGE, ids=lambda line: line[:9])
def test_records_malformed(tmp_path: Path, line: str) -> None:
    """They are passed over."""
    path, good = tmp_path / "metrics.jsonl", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    lines = [json.dumps(good[0]), line, json.dumps(good[1])]
    path.write_bytes("\n".join([*lines, ""]).encode("utf-8", "surrogatepass"))
    assert [r for r in read_records(path) if "loss" in r] == good
    assert page(Run.load(tmp_path))
    records = JsonLines(path, resume_step=1)
    records.append({"step": 2, "loss": 0.5})
    records.close()
    assert [r["loss"] for r in read_records(path)] == [2.0, 0.5]


@pytest.mark.promise("odd numbers in files")
@pytest.mark.parametrize("text", HUGE, ids=lambda text: text[:9])
def test_files_malformed(tmp_path, saved, text: str) -> None:
    """They are refused in a line."""
    raw = text.encode("utf-8", "surrogatepass")
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "manifest.json"):
        (tokenizer / name).write_bytes((SHIPPED / "tinystories_bpe_4096" / name).read_bytes())
    (tmp_path / "metrics.jsonl").write_text("")

    def refused(file: Path, kind: type[Exception], read: Callable[[], object]) -> None:
        before = file.read_bytes() if file.exists() else None
        file.write_bytes(raw)
        with pytest.raises(kind) as error:
            read()
        assert "\n" not in str(error.value) and len(str(error.value)) < 800
        file.unlink() if before is None else file.write_bytes(before)

    from_folder = lambda: CustomTransformerWrapper.from_pretrained(saved)  # noqa: E731
    refused(saved / INDEX, CheckpointError, from_folder)
    refused(saved / "config.json", CheckpointError, from_folder)
    refused(tokenizer / "tokenizer.json", DataError, lambda: load_tokenizer(tokenizer))
    refused(tokenizer / "manifest.json", DataError, lambda: load_tokenizer(tokenizer))
    (tokenizer / "merges.txt").write_text("")
    (tokenizer / "tokenizer.json").unlink()
    refused(tokenizer / "vocab.json", DataError, lambda: load_tokenizer(tokenizer))
    refused(tmp_path / "c.yaml", ConfigError, lambda: Config.load(tmp_path / "c.yaml"))
    refused(tmp_path / "report.json", MantransError, lambda: Run.load(tmp_path))
    with pytest.raises(NotScored):
        parse_scores(text, 1)
    with pytest.raises(ConfigError):
        Config.from_dict(strict_yaml.parse("{}", "x"), "x", [f"model.d_model={text}"])


# ------------------------------------------------------------------------------ numbers in files

ANY_NUMBER = st.floats() | st.sampled_from(
    [5e-324, 1e-310, 2.2e-308, 1e-100, 1e-99, 1e99, 1e100, 1.7e308, -5e-324, 0, 10**400]
)
RECORD = st.fixed_dictionaries(
    {"step": st.integers(0, 10**12) | st.integers(0, 9)},
    optional={
        name: ANY_NUMBER
        for name in ("loss", "validation_loss", "learning_rate", "grad_norm", "tokens", "skipped",
                     "tokens_per_second")
    },
)  # fmt: skip


@pytest.mark.promise("odd numbers in files")
@given(st.lists(ANY_NUMBER, min_size=1, max_size=6), st.booleans(), st.booleans())
@settings(max_examples=80, deadline=None)
def test_figure_any_numbers(values: list, log: bool, from_zero: bool) -> None:
    points = [(step, number(value)) for step, value in enumerate(values)]
    drawn = Figure("Loss", "", [Curve("a", points)], log=log, from_zero=from_zero)
    content = TEMPLATES.get_template("figure.html").module.figure(drawn)
    assert "nan" not in content and "inf" not in content.replace("info", "")


@pytest.mark.promise("odd numbers in files")
@given(st.lists(RECORD, min_size=1, max_size=5), st.dictionaries(st.sampled_from(
    ["loss", "perplexity", "tokens", "bytes", "bits_per_byte"]), ANY_NUMBER))  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_report_any_numbers(tmp_path_factory, records: list, report: dict) -> None:
    folder = tmp_path_factory.mktemp("run")
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines)
    (folder / "timings.jsonl").write_text(lines)
    (folder / "report.json").write_text(json.dumps(report))
    run = Run.load(folder)
    assert page(run, [run]).endswith("</html>")


# ------------------------------------------------------------------------------ another function


@pytest.mark.promise("another function")
@pytest.mark.parametrize(
    ("field", "value"), [("n_heads", 4), ("layer_norm_epsilon", 1e-3), ("bias", False)]
)
def test_resume_another_function(tmp_path, field: str, value: Any) -> None:
    config = small(tmp_path, tmp_path / "tokens", max_steps=4)
    finish(config)
    latest = checkpoints(tmp_path) / "latest.pt"
    before = latest.read_bytes()
    was = getattr(config.model, field)
    setattr(config.model, field, value)
    shown = {True: "true", False: "false"}
    expected = shown.get(was, str(was)) if isinstance(was, bool) else str(was)
    with pytest.raises(CheckpointError, match=rf"^{field}: expected {expected}.*got ") as refused:
        Trainer(config, resume="latest", quiet=True)
    assert "\n" not in str(refused.value) and latest.read_bytes() == before
