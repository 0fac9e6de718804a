"""A resumed run reads the tokens that it began with, in the batches that it began with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from mantrans.checkpoint import state_file
from mantrans.cli import main
from mantrans.config import Config
from mantrans.data.loader import RULE
from mantrans.errors import CheckpointError, ConfigError
from mantrans.training.trainer import Trainer
from tests.support.runs import GOLDEN, checkpoints, small


@pytest.fixture
def begun(tmp_path: Path) -> Config:
    """A run of two steps on a text of its own."""
    shutil.copy(GOLDEN / "stories.txt", tmp_path / "text.txt")
    config = local(tmp_path)
    Trainer(config, quiet=True).run()
    return config


def local(folder: Path, **training: Any) -> Config:
    data = {"path": str(folder / "text.txt"), **training.pop("data", {})}
    lengths = {"max_steps": 2, **training}
    return small(folder, folder / "tokens", eval_every=2, save_every=2, data=data, **lengths)


def latest(folder: Path) -> dict[str, Any]:
    return state_file.load(checkpoints(folder) / "latest.pt")


def replace_text(folder: Path) -> str:
    """Other text under the same name; what the refusal says of it."""
    file = folder / "text.txt"
    file.write_text(file.read_text().replace("a", "o"))
    return "the text has changed"


def other_subset(folder: Path) -> str:
    return "data.subset_size None → 9"


@pytest.mark.promise("other tokens")
@pytest.mark.parametrize("change", [replace_text, other_subset])
def test_resume_other_tokens(
    tmp_path: Path, begun: Config, change: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tokens other than the checkpoint's are refused."""
    said = change(tmp_path)
    data = {"subset_size": 9} if change is other_subset else {}
    config = local(tmp_path, data=data, max_steps=4)
    before = latest(tmp_path)["data"]
    with pytest.raises(
        CheckpointError, match=r"expected the checkpoint.s .* train tokens"
    ) as error:
        Trainer(config, resume="latest", quiet=True)
    assert said in str(error.value) and "--allow-other-data" in str(error.value)
    config.save(tmp_path / "c.yaml")
    resume = ["train", "--config", str(tmp_path / "c.yaml"), "--resume", "latest"]
    assert main(resume) == 2
    assert latest(tmp_path)["data"] == before
    capsys.readouterr()
    assert main([*resume, "--allow-other-data"]) == 0
    assert "train tokens instead of the checkpoint's" in capsys.readouterr().err
    assert latest(tmp_path)["data"]["train"] != before["train"]


def test_resume_other_validation_text(tmp_path: Path, begun: Config) -> None:
    """A loss of another validation text is not the best."""
    replace_text(tmp_path)
    config = local(tmp_path, max_steps=4)
    trainer = Trainer(config, resume="latest", quiet=True, allow_other_data=True)
    assert (trainer.progress.step, trainer.progress.best_loss) == (2, float("inf"))
    trainer.folders.close()


@pytest.mark.promise("other tokens")
def test_resume_renamed_tokens(tmp_path: Path, begun: Config) -> None:
    """The same tokens under another name are the same."""
    (tmp_path / "moved").mkdir()
    (tmp_path / "text.txt").rename(tmp_path / "moved" / "other.txt")
    config = local(tmp_path, data={"path": str(tmp_path / "moved" / "other.txt")}, max_steps=3)
    trainer = Trainer(config, resume="latest", quiet=True)
    assert trainer.progress.step == 2 and trainer.loader.rule == RULE
    trainer.folders.close()


@pytest.mark.promise("every token")
@pytest.mark.parametrize("length", ["max_steps", "num_epochs"])
def test_resume_without_token_record(tmp_path: Path, length: str) -> None:
    """The text has few windows, so that the second rule has one more of them than the first."""
    (tmp_path / "text.txt").write_text("A mouse ran home to eat. " * 3)
    lengths = {"max_steps": None, length: 20, "warmup_steps": 0, "batch_size": 1}
    config = local(tmp_path, model={"max_seq_len": 32}, **lengths)
    trainer = Trainer(config, quiet=True)
    assert trainer.loader.rule == 2 and trainer.loader.n_windows == 2
    trainer.run()
    state = latest(tmp_path)
    assert state.pop("data")["batches"] == 2
    state["progress"]["step"] = 4
    state_file.save(tmp_path / "old.pt", state)
    resumed = Trainer(config, resume=str(tmp_path / "old.pt"), quiet=True)
    assert resumed.loader.rule == 1 and resumed.loader.n_windows == 1
    assert resumed.total_steps == 20
    resumed.run()
    assert latest(tmp_path)["data"]["batches"] == 1
    again = Trainer(config, resume="latest", quiet=True)
    assert again.loader.rule == 1
    again.folders.close()


@pytest.mark.parametrize("changes", [{"batches": 3}, {"batches": "x"}, {"train": 4}, {"train": {}}])
def test_resume_odd_token_record(tmp_path: Path, begun: Config, changes: dict[str, Any]) -> None:
    state = latest(tmp_path)
    state["data"] |= changes
    state_file.save(tmp_path / "odd.pt", state)
    with pytest.raises(CheckpointError) as error:
        Trainer(begun, resume=str(tmp_path / "odd.pt"), quiet=True)
    assert str(error.value).isprintable() and "odd.pt" in str(error.value)


@pytest.mark.promise("warm-up and decay")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup_steps": 5000}, r"training\.warmup_steps: expected at most \d+, the steps of"),
        (
            {"lr_decay": "wsd", "decay_fraction": 0.9, "warmup_steps": 100},
            r"training\.decay_fraction: expected at most 0\.\d+, the rest of the run after warm-up",
        ),
    ],
)
def test_schedule_longer_than_epochs(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """As with max_steps, once the length of the data is known."""
    shutil.copy(GOLDEN / "stories.txt", tmp_path / "text.txt")
    for length in (1, 2):
        config = local(tmp_path, max_steps=None, num_epochs=length, **changes)
        with pytest.raises(ConfigError, match=message):
            Trainer(config, quiet=True)
    config = local(tmp_path, max_steps=None, num_epochs=100, **changes)
    Trainer(config, quiet=True).folders.close()
