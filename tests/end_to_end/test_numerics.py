"""NaN and infinity in weights, gradients or loss: nothing is updated, everything is told."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mantrans.checkpoint import state_file
from mantrans.errors import MantransError
from mantrans.records import read_records
from mantrans.training.trainer import Trainer
from tests.support.compare import assert_same_bits
from tests.support.runs import (
    checkpoints,
    finish,
    metrics_file,
    outcome,
    poison,
    small,
    stop_after,
)

PLACES = ["weights", "gradients", "loss"]
VALUES = [math.nan, math.inf, -math.inf]


def optimizer_bits(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Copies of all that an update changes."""
    parameters, optimizer = trainer.wrapper.model.parameters, trainer.wrapper.optimizer
    state = {"weights": parameters.weights, "updates": parameters.updates, **optimizer.state()}
    if parameters.master is not None:
        state["master"] = parameters.master
    return {name: tensor.clone() for name, tensor in state.items()}


@pytest.mark.promise("NaN and infinity")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("where", PLACES)
def test_step_not_finite(
    tmp_path: Path, tokens: Path, dtype: str, where: str, capsys, record_property: Callable
) -> None:
    """NaN, +inf and -inf in turn at steps 4, 7 and 10: three skipped, none of them in a row."""
    config = small(tmp_path, tokens, log_every=1, model={"dtype": dtype}, max_consecutive_skips=2)
    trainer = Trainer(config)
    bad = dict(zip((4, 7, 10), VALUES, strict=True))
    for step, value in bad.items():
        poison(trainer, range(step - 1, step), where, value)
    run = trainer.train_step.run
    unchanged = []

    def compared(step: int, rate: float) -> None:
        before = optimizer_bits(trainer)
        run(step, rate)
        after = optimizer_bits(trainer)
        if all(torch.equal(before[name], after[name]) for name in before):
            unchanged.append(step + 1)

    trainer.train_step.run = compared
    trainer.run()
    assert unchanged == list(bad)
    assert trainer.progress.skipped == 3
    records = [r for r in read_records(metrics_file(tmp_path)) if "loss" in r]
    assert [r["skipped"] for r in records] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    said = capsys.readouterr().err
    for step in bad:
        assert f"step {step} was skipped: nan_" in said
    record_property("bad steps", 3)
    record_property("updates from them", 0)


@pytest.mark.promise("too many skips")
@pytest.mark.parametrize("where", PLACES)
def test_max_consecutive_skips_reached(tmp_path: Path, tokens: Path, where: str) -> None:
    """From step 6 on every step is bad: the third stops the run, whose checkpoints are good."""
    config = small(tmp_path, tokens, log_every=1, max_consecutive_skips=3)
    with pytest.raises(MantransError) as stopped:
        finish(config, lambda trainer: poison(trainer, range(5, 12), where, math.nan))
    assert "3 steps in a row not finite" in str(stopped.value)
    assert "the last good checkpoint is" in str(stopped.value)
    state = state_file.load(checkpoints(tmp_path) / "latest.pt")
    assert all(weight.isfinite().all() for weight in state["parameters"].values())
    trainer = finish(config, resume="latest")
    assert trainer.progress.step == 12


@pytest.mark.promise("too many skips")
def test_max_consecutive_skips_after_resume(tmp_path: Path, tokens: Path) -> None:
    """Stopped after the second of three bad steps: the first one after the resume is the third."""
    config = small(tmp_path, tokens, log_every=1, max_consecutive_skips=3)

    def prepared(trainer: Trainer) -> None:
        poison(trainer, range(5, 12), "loss", math.nan)
        stop_after(trainer, 7)

    finish(config, prepared)
    with pytest.raises(MantransError, match="step 8: 3 steps in a row"):
        finish(config, prepared, resume="latest")


@pytest.mark.promise("too many skips")
def test_last_step_not_finite(tmp_path: Path, tokens: Path) -> None:
    """A skipped step leaves good weights behind: they are the run's result."""
    config = small(tmp_path, tokens, log_every=1)
    finish(config, lambda trainer: poison(trainer, range(11, 12), "gradients", math.nan))
    state = state_file.load(checkpoints(tmp_path) / "latest.pt")
    assert state["progress"]["step"] == 12 and state["progress"]["skipped"] == 1


@pytest.mark.promise("too many skips")
@pytest.mark.parametrize("end", ["last step", "signal"])
def test_checkpoint_broken_weights(tmp_path: Path, tokens: Path, end: str) -> None:
    """They never replace a good checkpoint."""
    config = small(tmp_path, tokens, log_every=1)

    def prepared(trainer: Trainer) -> None:
        run = trainer.train_step.run

        def breaking(step: int, rate: float) -> None:
            run(step, rate)
            if step == 9:
                trainer.wrapper.model.parameters.weights[7] = math.nan

        trainer.train_step.run = breaking
        if end == "signal":
            stop_after(trainer, 11)

    with pytest.raises(MantransError, match="weights are not finite and are not saved"):
        finish(config, prepared)
    state = state_file.load(checkpoints(tmp_path) / "latest.pt")
    assert state["progress"]["step"] == 8


@pytest.mark.promise("--debug-nan")
@pytest.mark.parametrize(
    ("layer", "name"),
    [
        ("norm_1", r"blocks\.1\.norm_1"),
        ("norm_2", r"is blocks\.1\.mlp\.x, right after blocks\.1\.norm_2"),
    ],
)
def test_debug_nan_first_layer(tmp_path: Path, tokens: Path, layer: str, name: str) -> None:
    config = small(tmp_path, tokens, log_every=1, model={"n_blocks": 3})
    trainer = Trainer(config, debug_nan=True, quiet=True)
    norm = getattr(trainer.wrapper.model.blocks[1], layer)
    forward = norm.forward

    def broken(x, branch=None):
        y, saved = forward(x, branch)
        return (y * math.nan if trainer.progress.step >= 2 else y), saved

    norm.forward = broken
    with pytest.raises(MantransError, match=f"step 3: 1 step in a row.*{name}"):
        trainer.run()


@pytest.mark.promise("outlier guard")
def test_outlier_guard_after_resume(
    tmp_path: Path, tokens: Path, record_property: Callable
) -> None:
    """Its window is in the checkpoint: interrupted just before an outlier, it refuses it too."""
    settings = {"outlier_z_score": 4.0, "outlier_window": 8, "log_every": 1}

    def spike(trainer: Trainer) -> None:
        poison(trainer, range(10, 11), "loss", 3.0)

    finish(small(tmp_path / "unbroken", tokens, **settings), spike)
    config = small(tmp_path / "broken", tokens, **settings)

    def stopped(trainer: Trainer) -> None:
        spike(trainer)
        stop_after(trainer, 10)

    finish(config, stopped)
    resumed = finish(config, spike, resume="latest")
    assert resumed.progress.skipped == 1 and resumed.progress.not_finite_in_a_row == 0
    assert_same_bits(outcome(tmp_path / "broken"), outcome(tmp_path / "unbroken"))
    record_property("outliers refused", 1)


@pytest.mark.promise("outlier guard")
def test_outlier_window_changed(tmp_path: Path, tokens: Path, capsys) -> None:
    """A setting may be changed between two parts of a run."""
    settings = {"outlier_z_score": 4.0, "outlier_window": 8}
    finish(small(tmp_path, tokens, **settings), lambda trainer: stop_after(trainer, 5))
    settings["outlier_window"] = 16
    trainer = Trainer(small(tmp_path, tokens, **settings), resume="latest")
    assert "outlier_window" in capsys.readouterr().err
    assert trainer.guard is not None and trainer.guard.count == 0
    trainer.run()
