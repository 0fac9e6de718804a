"""What needs memory beside a captured step is tried once, right after the capture.

Without a GPU the graph is a direct call, and a lack of memory is PyTorch's own exception.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mantrans.errors import ConfigError
from mantrans.training import ending, rehearsal, saving
from mantrans.training import step as step_module
from mantrans.training.trainer import Trainer
from tests.support.compare import assert_same_bits
from tests.support.runs import checkpoints, outcome, small


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokens")


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch, tokens: Path) -> Callable[..., Trainer]:
    """A small run whose step is captured."""
    monkeypatch.setattr(step_module, "cuda_graph", lambda function: function)

    def build(folder: Path, **settings: Any) -> Trainer:
        trainer = Trainer(small(folder, tokens, **settings), quiet=True)
        trainer.train_step.capture = True
        return trainer

    return build


def no_memory(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")


PLACES = [
    (rehearsal, "measure_stream", "evaluation.batch_size: expected validation", " with 4; make it"),
    (saving, "all_finite", "training.batch_size: expected the check of a save", " with 4; make it"),
    (step_module.TrainStep, "compute", "training.recheck_every: expected a second computation",
     " with 3; set it to null"),
]  # fmt: skip


@pytest.mark.promise("memory")
@pytest.mark.parametrize(("where", "name", "field", "advice"), PLACES)
def test_rehearse_no_memory(
    tmp_path: Path, captured, monkeypatch: pytest.MonkeyPatch, where: Any, name: str, field: str,
    advice: str,
) -> None:  # fmt: skip
    """Said before the first step, not at the first validation or save."""
    trainer = captured(tmp_path, recheck_every=3)
    before = trainer.wrapper.model.parameters.weights.clone()
    monkeypatch.setattr(where, name, no_memory)
    with pytest.raises(ConfigError) as refusal:
        trainer.run()
    said = str(refusal.value)
    assert said.startswith(f"{field} to fit beside the captured step, got out of memory on cpu")
    assert advice in said and "\n" not in said
    assert trainer.progress.step == 0 and not list(checkpoints(tmp_path).glob("*.pt"))
    assert torch.equal(before, trainer.wrapper.model.parameters.weights)


def test_rehearse_other_errors(tmp_path: Path, captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bugs stay what they are."""
    trainer = captured(tmp_path)
    monkeypatch.setattr(rehearsal, "measure_stream", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.run()


def test_rehearse_once(
    tmp_path: Path, tokens: Path, captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One batch, once, and the run is the same; the graph is gone when samples are drawn."""
    batches: list[int | None] = []
    measure, evaluate = rehearsal.measure_stream, ending.evaluate
    monkeypatch.setattr(
        rehearsal, "measure_stream",
        lambda *a, max_batches: batches.append(max_batches) or measure(*a, max_batches=max_batches),
    )  # fmt: skip
    trainer = captured(tmp_path / "captured")

    def evaluate_without_graph(*arguments: Any, **keywords: Any) -> Any:
        assert trainer.train_step.replay is None
        return evaluate(*arguments, **keywords)

    monkeypatch.setattr(ending, "evaluate", evaluate_without_graph)
    trainer.run()
    assert batches == [1]
    monkeypatch.undo()
    Trainer(small(tmp_path / "eager", tokens), quiet=True).run()
    assert_same_bits(outcome(tmp_path / "captured"), outcome(tmp_path / "eager"))
