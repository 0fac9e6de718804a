"""A run's name: a second run keeps the first, --resume finds it, refusals leave no trace."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from mantrans.checkpoint import state_file
from mantrans.cli import main
from mantrans.config import Config
from mantrans.errors import MantransError
from mantrans.records import read_records
from mantrans.training import trainer as trainer_module
from mantrans.training.lock import run_lock
from mantrans.training.trainer import Trainer
from tests.support.compare import assert_same_bits
from tests.support.runs import GOLDEN, finish, outcome, small, stop_after


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokens")


@pytest.fixture
def here(tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in, with config.yaml: folders as short as a user's."""
    monkeypatch.chdir(tmp_path)
    config(tokens).save(tmp_path / "config.yaml")
    return tmp_path


def config(tokens: Path, **training: Any) -> Config:
    return small(Path(), tokens, **{"max_steps": 6, "eval_every": 3, "save_every": 2, **training})


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# ------------------------------------------------------------------------------- a second run


@pytest.mark.promise("a second run of a name")
def test_run_second_of_a_name(here: Path, tokens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It keeps the first whole."""
    for number in range(3):
        before = [files(here / top / "small") for top in ("runs", "checkpoints")]
        assert main(["train", "--config", "config.yaml", "--set", f"training.seed={number}"]) == 0
        said = capsys.readouterr().err
        if number:
            assert [
                files(here / top / f"small.{number}") for top in ("runs", "checkpoints")
            ] == before
            note = f"the earlier run of this name is kept: runs/small.{number} and "
            assert said.count(note + f"checkpoints/small.{number}") == 1
        else:
            assert "earlier run" not in said
    for seed, name in enumerate(("small.1", "small.2", "small")):
        state = state_file.load(here / "checkpoints" / name / "best.pt")
        assert state["config"]["training"]["seed"] == seed
    assert not list(here.rglob(".*.lock"))


@pytest.mark.promise("a second run of a name")
@pytest.mark.parametrize("shared", [False, True], ids=["two folders", "one folder for both"])
def test_run_number_free_in_both_folders(here: Path, tokens: Path, shared: bool) -> None:
    places = {"output_dir": "all", "checkpoint_dir": "all"} if shared else {}
    finish(config(tokens, **places))
    (here / ("all" if shared else "runs") / "small.1").mkdir()
    (here / ("all" if shared else "checkpoints") / "small.2").write_text("somebody's")
    with run_lock(here / ("all" if shared else "runs") / "small.3"):  # that name is being used
        finish(config(tokens, **places))
    moved = here / ("all" if shared else "checkpoints") / "small.4"
    assert (moved / "latest.pt").exists()


def test_run_links_above(here: Path, tokens: Path) -> None:
    """They follow the first run."""
    finish(config(tokens))
    Trainer(config(tokens), quiet=True).folders.close()
    for name in ("latest.pt", "best.pt"):
        assert os.readlink(here / "checkpoints" / name) == f"small.1/{name}"
        assert state_file.load(here / "checkpoints" / name)["progress"]["step"] in (3, 6)


def test_run_never_saved(here: Path, tokens: Path) -> None:
    """A start that died before its first record leaves nothing worth a number."""
    trainer = Trainer(config(tokens), quiet=True)
    trainer.logger.close()
    trainer.folders.close()
    finish(config(tokens))
    assert [path.name for path in (here / "runs").iterdir()] == ["small"]


@pytest.mark.promise("a second run of a name")
@pytest.mark.parametrize("count", ["1", "2"])
def test_run_restarted_by_torchrun(
    here: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, count: str
) -> None:
    """It goes on."""
    finish(config(tokens, output_dir="a", checkpoint_dir="a"))
    expected = files(here / "a" / "small")["metrics.jsonl"]
    finish(config(tokens), lambda trainer: stop_after(trainer, 4))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
    trainer = finish(config(tokens))
    assert trainer.progress.step == 6
    assert (here / "runs" / "small" / "metrics.jsonl").read_bytes() == expected
    assert not (here / "runs" / "small.1").exists()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    finish(config(tokens))
    assert (here / "runs" / "small.1").exists()


# ---------------------------------------------------------------------------------- a refusal


REFUSED: dict[str, Any] = {
    "a file of text that is absent": {"data": {"path": "absent.txt"}},
    "a tokenizer that is absent": {"data": {"tokenizer": "absent"}},
    "too large": {"batch_size": 2**20, "model": {"max_seq_len": 2**14}},
    "no such device": {"device": "cuda:99"},
    "more warm-up than steps": {"num_epochs": 1, "max_steps": None, "warmup_steps": 10**9},
}


@pytest.mark.promise("refused starts")
@pytest.mark.parametrize("settings", REFUSED.values(), ids=REFUSED)
def test_run_refused_start(here: Path, tokens: Path, settings: dict[str, Any]) -> None:
    """Without an earlier run no folder and no lock; with one, nothing is moved."""
    settings = {
        **settings,
        "data": {"path": str(GOLDEN / "stories.txt"), **settings.get("data", {})},
    }
    with pytest.raises(MantransError):
        Trainer(config(tokens, **settings), quiet=True)
    assert [path.name for path in here.iterdir()] == ["config.yaml"]
    finish(config(tokens))
    before = files(here)
    with pytest.raises(MantransError):
        Trainer(config(tokens, **settings), quiet=True)
    assert files(here) == before


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.promise("refused starts")
def test_resume_refused_before_tokenizing(
    here: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resume is refused before anything is tokenized."""
    finish(config(tokens))
    shutil.copy("checkpoints/small/latest.pt", "damaged.pt")
    damaged(here / "damaged.pt")
    state = state_file.load("checkpoints/small/latest.pt")
    state_file.save("model.pt", {k: v for k, v in state.items() if k != "progress"})
    state_file.save("other.pt", state | {"tokenizer": {**state["tokenizer"], "hash": "0" * 64}})
    before = files(here)

    def tokenizing(*_: object, **__: object) -> None:
        raise AssertionError("it tokenizes")

    monkeypatch.setattr(trainer_module, "prepare", tokenizing)
    wider = config(tokens, model={"d_model": 32})
    larger = config(tokens, batch_size=2**20, model={"max_seq_len": 2**14})
    for resume, settings in (
        ("absent.pt", None), ("absent", None), ("damaged.pt", None), ("model.pt", None),
        ("other.pt", None), ("latest", wider), ("latest", larger), ("", None), ("  ", None),
        (str(tokens), None),
    ):  # fmt: skip
        with pytest.raises(MantransError) as refusal:
            Trainer(settings or config(tokens), resume=resume, quiet=True)
        assert "\n" not in str(refusal.value)
    assert files(here) == before


# ------------------------------------------------------------------------------------ --resume


FORMS = (
    "small", "runs/small", "checkpoints/small", "checkpoints/small/latest.pt",
    "checkpoints/latest.pt", "latest",
)  # fmt: skip


@pytest.mark.promise("--resume")
@pytest.mark.parametrize("form", FORMS)
def test_resume_any_name(
    here: Path, tokens: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    """Nothing but --resume: the settings, --set included, are those that it was begun with."""
    begun = ["--set", "training.learning_rate=0.01", "--set", "training.seed=3"]
    ours = config(tokens, learning_rate=0.01, seed=3, output_dir="other", checkpoint_dir="other2")
    finish(ours)
    finish(Config.load("config.yaml", begun[1::2]), lambda trainer: stop_after(trainer, 4))
    arguments = ["train", "--resume", form]
    if form == "latest":  # of the experiment that is named
        arguments += ["--set", "training.experiment_name=small"]
    assert main(arguments) == 0
    said = capsys.readouterr().err
    assert "at step 4" in said and "changed since" not in said
    expected, found = (files(here / top / "small") for top in ("other", "runs"))
    assert found["metrics.jsonl"] == expected["metrics.jsonl"]
    assert_same_bits(
        state_file.load("checkpoints/small/latest.pt")["parameters"],
        state_file.load("other2/small/latest.pt")["parameters"],
    )


@pytest.mark.promise("--resume")
def test_resume_moved_run(here: Path, tokens: Path) -> None:
    """Under its new name, and in folders of other names: never over the one with its old name."""
    finish(config(tokens, max_steps=4))
    finish(config(tokens))
    ours = files(here / "checkpoints" / "small")
    shutil.copytree("checkpoints/small.1", "elsewhere/small.1")
    for form, place in (("small.1", "checkpoints"), ("elsewhere/small.1", "elsewhere")):
        assert main(["train", "--resume", form, "--set", "training.max_steps=5"]) == 0
        assert state_file.load(f"{place}/small.1/latest.pt")["progress"]["step"] == 5
    assert files(here / "checkpoints" / "small") == ours


@pytest.mark.promise("a second run of a name")
def test_resume_checkpoint_of_another_run(here: Path, tokens: Path) -> None:
    """`small` from `other`'s weights is a new `small`: the one there moves away as ever."""
    finish(config(tokens))
    finish(config(tokens, experiment_name="other", max_steps=4))
    before = files(here / "checkpoints" / "small")
    trainer = finish(config(tokens), resume="checkpoints/other/latest.pt")
    assert trainer.progress.step == 6
    assert files(here / "checkpoints" / "small.1") == before
    assert next(r["step"] for r in read_records(here / "runs/small/metrics.jsonl")) == 5


@pytest.mark.promise("order of checkpoints")
def test_resume_older_checkpoint(
    here: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From an older checkpoint the records and the rest are right."""
    finish(config(tokens))
    expected = outcome(here)
    before = {path.read_bytes() for path in (here / "checkpoints" / "small").glob("*.pt")}
    assert main(["train", "--resume", "checkpoints/small/step_00000004.pt"]) == 0
    note = "checkpoints saved after checkpoints/small/step_00000004.pt moved to "
    assert note + "checkpoints/small/abandoned.1" in capsys.readouterr().err
    assert_same_bits(outcome(here), expected)
    assert before <= {path.read_bytes() for path in (here / "checkpoints" / "small").rglob("*.pt")}


@pytest.mark.promise("--resume")
@pytest.mark.parametrize(
    ("first", "then", "said"),
    [
        ({"lr_decay": "cosine"}, {"max_steps": 12}, True),
        ({"lr_decay": "linear"}, {"max_steps": 12}, True),
        ({"lr_decay": "constant"}, {"max_steps": 12}, False),
        ({"lr_decay": "constant"}, {"max_steps": 12, "learning_rate": 1e-3}, True),
        ({"lr_decay": "cosine", "stop": 4}, {}, False),
        ({"lr_decay": "cosine", "stop": 4}, {"max_steps": 12}, True),
        ({"lr_decay": "cosine", "max_steps": None, "num_epochs": 1}, {"num_epochs": 2}, True),
        ({"lr_decay": "cosine"}, {}, False),
    ],
)
def test_resume_learning_rate_jump(
    here: Path, tokens: Path, capsys: pytest.CaptureFixture[str],
    first: dict[str, Any], then: dict[str, Any], said: bool,
) -> None:  # fmt: skip
    """It is announced."""
    stop = first.pop("stop", None) if "stop" in (first := dict(first)) else None
    begun = config(tokens, **first, data={"subset_size": 6})
    finish(begun, lambda trainer: stop_after(trainer, stop) if stop else None)
    values = begun.to_dict()
    values["training"] |= then
    trainer = Trainer(Config.from_dict(values), resume="latest")
    trainer.logger.close()
    trainer.folders.close()
    [*notes] = re.findall(
        r"note: the learning rate goes on at (\S+); .* at (\S+)", capsys.readouterr().err
    )
    assert bool(notes) == said
    if said:
        now, was = map(float, notes[0])
        assert now == pytest.approx(trainer.learning_rate(trainer.progress.step), rel=0.01)
        logged = read_records(here / "runs" / "small" / "metrics.jsonl")
        if not stop:
            assert was == pytest.approx(
                [r for r in logged if "loss" in r][-1]["learning_rate"], rel=0.01
            )
