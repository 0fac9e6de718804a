"""Files that a stranger made: read as data or refused, in little time and memory."""

from __future__ import annotations

import copy
import os
import pickle
import random
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mantrans.checkpoint import state_file
from mantrans.cli import main
from mantrans.config import Config
from mantrans.errors import CheckpointError, MantransError
from mantrans.training.trainer import Trainer
from mantrans.wrapper import CustomTransformerWrapper
from tests.support.processes import EVALUATE, TRAIN, Ended, Processes
from tests.support.runs import NAME, checkpoints, finish, small, stop_after

ROOT = Path(__file__).parents[2]
GIB = 2**30


class Bomb:
    """Unpickling this makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return (open, (str(self.mark), "w"))


@pytest.fixture
def stopped(tmp_path: Path, tokens: Path) -> Config:
    """A run of 12 steps that was stopped after 5, and its config.yaml."""
    config = small(tmp_path, tokens, outlier_z_score=4.0, outlier_window=8)
    finish(config, lambda trainer: stop_after(trainer, 5))
    config.save(tmp_path / "config.yaml")
    return config


@pytest.mark.promise("code in a checkpoint")
@pytest.mark.parametrize("how", ["torch.save", "pickle", "pickle in zip"])
def test_commands_pickle_with_code(
    tmp_path: Path, processes: Processes, stopped: Config, how: str
) -> None:
    """A pickle that runs code is refused by every command."""
    mark, evil = tmp_path / "executed", tmp_path / "evil.pt"
    if how == "torch.save":
        torch.save({"progress": Bomb(mark)}, evil)
    elif how == "pickle":
        evil.write_bytes(pickle.dumps({"progress": Bomb(mark)}))
    else:
        with zipfile.ZipFile(evil, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({"progress": Bomb(mark)}))
    for command, arguments in (
        (TRAIN, ["--config", "config.yaml", "--resume", "evil.pt"]),
        (EVALUATE, ["--checkpoint", "evil.pt"]),
        ("mantrans.cli:main convert", ["evil.pt", "new.pt"]),
    ):
        ended = processes.run(*arguments, cwd=tmp_path, main=command)
        assert ended.is_one_line_error and "evil.pt" in ended.text, ended.text
    assert not mark.exists() and not (tmp_path / "new.pt").exists()


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of keys to everything inside nested dictionaries and sequences."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list | tuple):
            yield from places(inner, (*path, key))


ODDITIES: list[Any] = [
    None, True, -1, 0, 2**70, 1.5, float("nan"), float("inf"), "", "x", "../../x", [], {}, [[]],
    {"x": 1}, torch.zeros(()), torch.zeros(3, 5), torch.full((8, 2), float("nan")),
]  # fmt: skip


def mutated(state: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """A copy with one thing removed or replaced by something odd, anywhere in it."""
    state = copy.deepcopy(state)
    path = chance.choice(list(places(state)))
    inside: Any = state
    for key in path[:-1]:
        if isinstance(inside[key], tuple):
            inside[key] = list(inside[key])
        inside = inside[key]
    if chance.random() < 0.3:
        del inside[path[-1]]
    else:
        inside[path[-1]] = chance.choice(ODDITIES)
    return state


@pytest.mark.promise("claims of a file")
@pytest.mark.parametrize("trials", [25, pytest.param(1500, marks=pytest.mark.slow)])
def test_resume_odd_state(
    tmp_path: Path, stopped: Config, trials: int, record_property: Callable
) -> None:
    """Intact to the last bit, but written by somebody who changed one value in it: the resumed run
    goes on, or one line says that it cannot."""
    state = state_file.load(checkpoints(tmp_path) / "latest.pt")
    chance = random.Random(trials)
    refused = 0
    for _ in range(trials):
        state_file.save(tmp_path / "odd.pt", mutated(state, chance))
        try:
            trainer = Trainer(stopped, resume=str(tmp_path / "odd.pt"), quiet=True)
            stop_after(trainer, trainer.progress.step + 1)
            trainer.run()
        except MantransError as error:
            assert "\n" not in str(error)
            refused += 1
    assert trials // 4 < refused
    record_property("odd states", trials)
    record_property("of them refused", refused)
    record_property("tracebacks", 0)


@pytest.mark.promise("claims of a file")
@pytest.mark.parametrize("trials", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_evaluate_odd_state(
    tmp_path: Path, stopped: Config, trials: int, capsys, record_property: Callable
) -> None:
    """It is used or refused."""
    state = state_file.load(checkpoints(tmp_path) / "latest.pt")
    chance = random.Random(trials)
    refused = 0
    for _ in range(trials):
        state_file.save(tmp_path / "odd.pt", mutated(state, chance))
        arguments = ["--checkpoint", str(tmp_path / "odd.pt"), "--max-batches", "1", "--config"]
        status = main(["evaluate", *arguments, str(tmp_path / "config.yaml")])
        printed = capsys.readouterr().err.splitlines()
        assert status in (0, 2)
        if status == 2:
            assert printed[-1].startswith("error: ")
            refused += 1
    record_property("odd states", trials)
    record_property("of them refused", refused)
    record_property("tracebacks", 0)


@pytest.mark.promise("claims of a file")
@pytest.mark.parametrize("trials", [60, pytest.param(1500, marks=pytest.mark.slow)])
def test_load_checkpoint_odd_state(
    tmp_path: Path, stopped: Config, trials: int, record_property: Callable
) -> None:
    """from_checkpoint builds a model that runs, or says why not; load_checkpoint, where it refuses,
    leaves the model and its moments as they were."""
    state = state_file.load(checkpoints(tmp_path) / "latest.pt")
    own = CustomTransformerWrapper.from_state_dict(state)
    buffers = [
        own.model.parameters.weights,
        *own.optimizer.state().values(),
        own.model.parameters.updates,
    ]
    chance = random.Random(trials)
    refused = 0
    for _ in range(trials):
        state_file.save(tmp_path / "odd.pt", mutated(state, chance))
        try:
            model = CustomTransformerWrapper.from_checkpoint(tmp_path / "odd.pt")
            model.forward(torch.zeros(1, 4, dtype=torch.int64))
        except MantransError as error:
            assert "\n" not in str(error)
            refused += 1
        before = [buffer.clone() for buffer in buffers]
        try:
            own.load_checkpoint(tmp_path / "odd.pt")
        except MantransError as error:
            assert "\n" not in str(error)
            assert all(map(torch.equal, before, buffers))
    assert trials // 8 < refused
    record_property("odd states", trials)
    record_property("of them refused", refused)
    record_property("tracebacks", 0)


@pytest.mark.promise("claims of a file")
def test_checkpoint_claims_more_than_it_holds(
    tmp_path: Path, processes: Processes, stopped: Config
) -> None:
    """The description says 48 billion weights; the file has a few thousand."""
    state = state_file.load(checkpoints(tmp_path) / "latest.pt")
    state["model_config"] |= {"d_model": 65_536, "n_heads": 1, "n_blocks": 1}
    state_file.save(tmp_path / "huge.pt", state)
    ended = processes.run(
        "--checkpoint", "huge.pt", "--config", "config.yaml", cwd=tmp_path, main=EVALUATE,
        limits={"RLIMIT_AS": 8 * GIB},
    )  # fmt: skip
    assert ended.is_one_line_error and "expected shape" in ended.text
    with pytest.raises(CheckpointError, match=r"token_embedding\.weight: expected shape"):
        CustomTransformerWrapper.from_checkpoint(tmp_path / "huge.pt")


@pytest.mark.promise("wrong tokenizer")
def test_token_ids_beyond_vocabulary(tmp_path: Path, processes: Processes, stopped: Config) -> None:
    """A checkpoint whose tables have 100 rows, with the name of a tokenizer of 257 tokens."""
    state = state_file.load(checkpoints(tmp_path) / "latest.pt")
    state["model_config"]["vocab_size"] = 100
    for tensors in (state["parameters"], *state["optimizer_state"].values()):
        for name, tensor in tensors.items():
            if tensor.shape[0] == 257:
                tensors[name] = tensor[:100].clone()
    state_file.save(tmp_path / "short.pt", state)
    for command, arguments in (
        (TRAIN, ["--resume", "short.pt"]),
        (EVALUATE, ["--checkpoint", "short.pt"]),
    ):
        ended = processes.run(*arguments, "--config", "config.yaml", cwd=tmp_path, main=command)
        assert ended.is_one_line_error and "100" in ended.text, ended.text


@pytest.mark.promise("names and links")
@pytest.mark.parametrize(
    "override",
    [
        f"training.experiment_name={name}"
        for name in ("../evil", "/tmp/evil", "a/b", "..", ".", "a\\b", "", "x.pt", "~", "a\0b")
    ]
    + [f"data.tokenizer={name}" for name in ("../x", "a/../../b", "..", "/../etc", "x\0")],
)
def test_paths_leaving_folder(
    tmp_path: Path,
    stopped: Config,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    override: str,
) -> None:
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    status = main(["train", "--config", "config.yaml", "--set", override])
    ended = Ended(status, capsys.readouterr().err)
    assert ended.is_one_line_error, ended.text
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.promise("alias bombs and code")
def test_config_yaml_alias_bomb(
    tmp_path: Path, processes: Processes, record_property: Callable
) -> None:
    """Ten billion values if it were expanded; the process may not take 1 GiB more than it has."""
    bomb = ['a0: &a0 ["x","x","x","x","x","x","x","x","x","x"]']
    bomb += [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    (tmp_path / "bomb.yaml").write_text("\n".join(bomb))
    limits = {"RLIMIT_AS": 8 * GIB, "RLIMIT_CPU": 10}
    ended = processes.run("--config", "bomb.yaml", cwd=tmp_path, limits=limits)
    assert ended.is_one_line_error and "aliases" in ended.text
    record_property("seconds of CPU allowed", limits["RLIMIT_CPU"])


# ---------------------------------------------------------------------------- the source itself


SOURCES = [ROOT / "mantrans", ROOT / "kernels", *ROOT.glob("*.py")]
# All but the last two are refused by ruff, with the rules in pyproject.toml.
DANGERS = [
    "eval(x)", "exec(x)", "yaml.load(f, Loader=L)", "torch.load(p)", "pickle.loads(b)",
    "subprocess.run(c, shell=True)", "from torch import load as read", "np.load(f)",
    "yaml.UnsafeLoader", "os.system(c)", "marshal.loads(b)", "torch.jit.load(p)",
    "runpy.run_path(p)",
    "trust_remote_code=True", "allow_pickle=True",
]  # fmt: skip


def ruff(*arguments: object, source: str = "") -> str:
    pytest.importorskip("ruff")
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise"]
    done = subprocess.run(
        [*command, *map(str, arguments)], cwd=ROOT, input=source, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    return done.stdout


@pytest.mark.promise("alias bombs and code")
def test_source_runs_nothing_read(record_property: Callable) -> None:
    """But for the converter of a user's own files, which reads pickles as data."""
    assert ruff(*SOURCES) == "All checks passed!\n"
    files = [path for source in SOURCES for path in [source, *source.rglob("*.py")]]
    texts = {path: path.read_text(encoding="utf-8") for path in files if path.is_file()}
    allowed = [path.name for path, text in texts.items() if re.search(r"noqa: (S\d|TID)", text)]
    assert allowed == ["convert.py"] and len(texts) > 100
    assert not [path for path, text in texts.items() if any(word in text for word in DANGERS[-2:])]
    record_property("source files", len(texts))


@pytest.mark.promise("alias bombs and code")
def test_source_rules_find_dangers() -> None:
    modules = ["marshal", "os", "pickle", "runpy", "subprocess", "numpy as np", "torch", "yaml"]
    lines = [*(f"import {module}" for module in modules), *DANGERS[:-2]]
    found = ruff("--stdin-filename", "mantrans/danger.py", "-", source="\n".join(lines))
    numbers = re.findall(r"danger\.py:(\d+):\d+: (?:S|TID)\d", found)
    assert {lines[int(number) - 1] for number in numbers} == set(DANGERS[:-2])


@pytest.mark.promise("names and links")
def test_checkpoint_folder_planted_link(tmp_path: Path, tokens: Path, stopped: Config) -> None:
    """Somebody's file at the end of a planted link keeps its content: names are replaced, not
    written through."""
    precious = tmp_path / "precious.txt"
    precious.write_text("mine")
    folder = checkpoints(tmp_path)
    for name in ("latest.pt", "step_00000012.pt", f"../../runs/{NAME}/report.json"):
        (folder / name).unlink(missing_ok=True)
        os.symlink(precious, folder / name)
    finish(stopped, resume=str(folder / "step_00000005.pt"))
    assert precious.read_text() == "mine"
