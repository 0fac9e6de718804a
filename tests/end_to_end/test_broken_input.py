"""Configurations, texts and tokenizers as people get them wrong: one line, or a run."""

from __future__ import annotations

import functools
import io
import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from mantrans.cli import main
from mantrans.config import strict_yaml
from mantrans.data.dataset import prepare
from mantrans.data.tokenizer import load_tokenizer
from mantrans.errors import DataError
from mantrans.training import start
from mantrans.training.trainer import Trainer
from tests.support.fuzz import Change, changed, changes
from tests.support.processes import Processes
from tests.support.runs import GOLDEN, small

GIB = 2**30


@pytest.fixture
def two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end after two steps however long they were to be, and tokenizers are loaded once."""
    load_data = Trainer._load_data

    def shortened(self: Trainer, quiet: bool) -> None:
        load_data(self, quiet)
        self.total_steps = min(self.total_steps, 2)

    monkeypatch.setattr(Trainer, "_load_data", shortened)
    monkeypatch.setattr(start, "load_tokenizer", functools.cache(load_tokenizer))


def attempt(folder: Path) -> tuple[int, str]:
    """`mantrans train --config c.yaml` in this process: its status, and its standard error."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(said):
        patch.chdir(folder)
        status = main(["train", "--config", "c.yaml"])
    return status, said.getvalue()


@pytest.mark.promise("any configuration")
@pytest.mark.parametrize("examples", [60, pytest.param(3000, marks=pytest.mark.slow)])
def test_config_file_mutated(
    tmp_path: Path, tokens: Path, two_steps: None, examples: int, record_property: Callable
) -> None:
    """From the file on the disk to the end of a run of two steps. A traceback fails the test: only
    the command line's own errors are turned into a line and a status."""
    counts = {0: 0, 2: 0}

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(changes())
    def one(wanted: list[Change]) -> None:
        base = small(tmp_path, tokens, max_steps=2, warmup_steps=1).to_dict()
        base["training"] |= {"output_dir": "runs", "checkpoint_dir": "checkpoints"}
        base["evaluation"]["max_generation_length"] = 36
        text = strict_yaml.dump(changed(base, wanted))
        (tmp_path / "c.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
        status, said = attempt(tmp_path)
        counts[status] += 1
        assert "Traceback" not in said
        if status == 2:
            assert said.splitlines()[-1].startswith("error: "), said

    one()
    assert min(counts.values()) > examples // 20
    record_property("configurations", sum(counts.values()))
    record_property("valid runs", counts[0])
    record_property("refused in one line", counts[2])
    record_property("tracebacks", 0)


HUGE = {
    "model.d_model": 65_536, "model.n_blocks": 1_024, "model.d_ffn": 1_048_576,
    "model.max_seq_len": 2**20, "training.batch_size": 2**20,
    "training.gradient_accumulation_steps": 2**20, "training.outlier_window": 10**6,
    "training.log_every": 10**5, "training.max_steps": 10**12, "training.num_epochs": 10**6,
    "training.keep_checkpoints": 10**6, "evaluation.batch_size": 2**20,
    "evaluation.max_generation_length": 2**20, "data.subset_size": 10**12,
}  # fmt: skip


IN_SHORT = ("model.d_model", "training.batch_size")


@pytest.mark.promise("any configuration")
@pytest.mark.parametrize(
    "field", [pytest.param(f, marks=[pytest.mark.slow] * (f not in IN_SHORT)) for f in HUGE]
)
def test_config_huge_values(tmp_path: Path, tokens: Path, processes: Processes, field: str) -> None:
    """The largest value that each field accepts, in a process that may have 16 GiB: training
    begins, and is still on its way when it is killed a moment later, or one line says what it
    lacks."""
    config = small(tmp_path, tokens, max_steps=8, warmup_steps=0, outlier_z_score=3.0)
    config.save(tmp_path / "c.yaml")
    child = processes.start(
        "--config", "c.yaml", "--set", f"{field}={HUGE[field]}", cwd=tmp_path,
        limits={"RLIMIT_AS": 16 * GIB},
    )  # fmt: skip
    child.wait_for("error: ", "Traceback", "steps of")
    time.sleep(0.3)
    child.kill()
    ended = child.wait()
    assert ended.status in (0, -signal.SIGKILL) or ended.is_one_line_error, ended.text
    assert "Traceback" not in ended.text


@pytest.mark.promise("any configuration")
@pytest.mark.parametrize("value", ["a\0b", "\ud800", "x" * 300, "", " ", "/dev/null/x", "/proc/x"])
@pytest.mark.parametrize(
    "field",
    ["data.path", "data.cache_dir", "data.tokenizer", "training.output_dir",
     "training.checkpoint_dir"],
)  # fmt: skip
def test_config_impossible_paths(
    tmp_path: Path, tokens: Path, two_steps: None, field: str, value: str
) -> None:
    section, name = field.split(".")
    values = small(tmp_path, tokens, max_steps=2).to_dict()
    values[section][name] = value
    (tmp_path / "c.yaml").write_text(strict_yaml.dump(values))
    status, said = attempt(tmp_path)
    assert "Traceback" not in said
    assert status == 0 or said.splitlines()[-1].startswith("error: ")


# ---------------------------------------------------------------------------------------- texts


def with_jsonl(*lines: str) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


GOOD = "Once upon a time there was a cat.\n<|endoftext|>\n" * 60
TEXTS: dict[str, tuple[str, bytes, bool]] = {
    "empty": ("a.txt", b"", False),
    "one byte": ("a.txt", b"x", False),
    "white space only": ("a.txt", b" \n\t\r\n" * 500, False),
    "not UTF-8": ("a.txt", GOOD.encode() + b"\xff\xfe", False),
    "UTF-16": ("a.txt", GOOD.encode("utf-16"), False),
    "ends inside a character": ("a.txt", GOOD.encode() + "é".encode()[:1], False),
    "byte order mark": ("a.txt", b"\xef\xbb\xbf" + GOOD.encode(), True),
    "CRLF": ("a.txt", GOOD.replace("\n", "\r\n").encode(), True),
    "NUL": ("a.txt", GOOD.replace("cat", "c\0t").encode(), True),
    "one line of 2 MB": ("a.txt", b"word " * 400_000, True),
    "no space at all": ("a.txt", b"x" * 400_000, True),
    "only separators": ("a.txt", b"<|endoftext|>" * 1000, False),
    "no document ends": ("a.txt", b"Once upon a time there was a cat. " * 100, True),
    "JSONL, some lines broken": (
        "a.jsonl",
        with_jsonl('{"text": "A cat sat on a mat."}', "{", "[1]", '{"t": 1}') * 100,
        True,
    ),
    "JSONL, all lines broken": ("a.jsonl", b"{\n" * 50, False),
    "JSONL, nested deep": ("a.jsonl", b"[" * 100_000, False),
    "JSONL, half a surrogate pair": ("a.jsonl", b'{"text": "\\ud800 cat"}\n' * 50, False),
    "JSONL, no line": ("a.jsonl", b"", False),
    "no Parquet": ("a.parquet", b"PAR1" + b"\0" * 100, False),
    "another kind": ("a.docx", GOOD.encode(), False),
}  # fmt: skip


@pytest.mark.promise("odd text")
@pytest.mark.parametrize("name", TEXTS)
def test_text_file_any(tmp_path: Path, name: str) -> None:
    """It is learned from, or refused in one line."""
    file, raw, is_good = TEXTS[name]
    (tmp_path / file).write_bytes(raw)
    config = small(tmp_path, tmp_path / "cache", data={"path": str(tmp_path / file)})
    tokenizer = load_tokenizer(config.data.tokenizer)
    prepared = functools.partial(prepare, config.data, tokenizer,
                                 cache_dir=tmp_path / "cache")  # fmt: skip
    if is_good:
        data = prepared()
        assert len(data.train) > 40 and len(data.validation) > 0
        assert ("rows skipped" in str(data.notes)) == ("broken" in name)
        return
    with pytest.raises(DataError) as refused:
        prepared()
    assert "\n" not in str(refused.value)
    assert not any(path.is_dir() for path in (tmp_path / "cache").glob("*"))


@pytest.mark.promise("odd text")
@pytest.mark.slow
def test_text_line_of_100_megabytes(tmp_path: Path, record_property: Callable) -> None:
    with (tmp_path / "a.txt").open("wb") as file:
        for _ in range(100):
            file.write(b"once upon a time there was a mouse " * 30_000)
    config = small(tmp_path, tmp_path / "cache", data={"path": str(tmp_path / "a.txt")})
    tokenizer = load_tokenizer(config.data.tokenizer)
    data = prepare(config.data, tokenizer, cache_dir=tmp_path / "cache", quiet=True)
    assert data.train.n_bytes + data.validation.n_bytes > 100 * 10**6
    record_property("bytes in one line", data.train.n_bytes + data.validation.n_bytes)


@pytest.mark.promise("odd text")
@pytest.mark.parametrize("setting", ["skip", "refuse"])
def test_text_broken_lines(tmp_path: Path, setting: str, capsys) -> None:
    """Skipped or refused, as set."""
    lines = ['{"text": "A cat sat on a mat."}', "{", '{"text": "The dog ran home."}'] * 40
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    data = {"path": str(tmp_path / "a.jsonl"), "on_broken_lines": setting}
    config = small(tmp_path, tmp_path / "cache", data=data)
    tokenizer = load_tokenizer(config.data.tokenizer)
    prepared = functools.partial(prepare, config.data, tokenizer,
                                 cache_dir=tmp_path / "cache")  # fmt: skip
    if setting == "skip":
        prepared()
        assert "40 of 120 rows skipped; the first: not JSON (a.jsonl, line 2)" in (
            capsys.readouterr().err
        )
    else:
        with pytest.raises(DataError, match=r"a\.jsonl, line 2: not JSON"):
            prepared()


# ----------------------------------------------------------------------------------- tokenizers


def changed_tokenizers() -> Iterator[tuple[str, Callable[[dict], None]]]:
    def missing(content: dict) -> None:
        del content["model"]["vocab"]["a"]

    def extra(content: dict) -> None:
        content["model"]["vocab"]["extra"] = 300

    def twice(content: dict) -> None:
        content["model"]["vocab"]["extra"] = 5

    def special(content: dict) -> None:
        content["added_tokens"].append(
            {**content["added_tokens"][0], "id": 257, "content": "<pad>"}
        )

    def no_end(content: dict) -> None:
        content["added_tokens"] = []
        content["model"]["vocab"].pop("<|endoftext|>", None)

    def negative(content: dict) -> None:
        content["model"]["vocab"]["a"] = -1

    def beyond(content: dict) -> None:
        content["model"]["vocab"]["a"] = 2**40

    for function in (missing, extra, twice, special, no_end, negative, beyond):
        yield function.__name__, function


@pytest.mark.promise("wrong tokenizer")
@pytest.mark.parametrize(("name", "change"), list(changed_tokenizers()))
def test_tokenizer_missing_or_extra_tokens(
    tmp_path: Path, tokens: Path, processes: Processes, name: str, change: Callable
) -> None:
    shutil.copytree(GOLDEN / "tokenizer", tmp_path / "tokenizer")
    file = tmp_path / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    config = small(tmp_path, tokens, data={"tokenizer": "tokenizer"})
    config.save(tmp_path / "c.yaml")
    ended = processes.run("--config", "c.yaml", cwd=tmp_path)
    assert ended.is_one_line_error and "tokenizer.json cannot be used" in ended.text, ended.text


@pytest.mark.promise("wrong tokenizer")
def test_tokenizer_one_token_more(tmp_path: Path, tokens: Path, processes: Processes) -> None:
    """One token more, all in order: a good tokenizer, but not the one of the checkpoint."""
    config = small(tmp_path, tokens, max_steps=2)
    config.save(tmp_path / "c.yaml")
    assert processes.run("--config", "c.yaml", cwd=tmp_path).status == 0
    ended = processes.run(
        "--config", "c.yaml", "--resume", "latest", "--set", "data.tokenizer=tinystories_bpe_4096",
        cwd=tmp_path,
    )  # fmt: skip
    assert ended.is_one_line_error and "data.tokenizer: expected" in ended.text
