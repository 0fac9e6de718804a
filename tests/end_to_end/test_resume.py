"""A run that was interrupted leaves, bit for bit, what an unbroken one leaves."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mantrans.config import Config
from mantrans.records import read_records
from mantrans.training.trainer import Trainer
from tests.support.compare import assert_same_bits
from tests.support.runs import (
    MODELS,
    checkpoints,
    finish,
    metrics_file,
    outcome,
    poison,
    small,
    stop_after,
)

# Two epochs of about six steps. The fourth step's gradient and the fifth's loss are not finite, and
# an outlier comes when the guard's window has just filled up.
SETTINGS: dict[str, Any] = {
    "gradient_accumulation_steps": 2, "batch_size": 4, "num_epochs": 2, "max_steps": None,
    "data": {"subset_size": 2, "val_subset_size": 1}, "outlier_z_score": 4.0, "outlier_window": 8,
}  # fmt: skip


def with_bad_steps(trainer: Trainer) -> None:
    poison(trainer, range(3, 4), "gradients", math.inf)
    poison(trainer, range(4, 5), "loss", math.nan)
    poison(trainer, range(10, 11), "loss", 3.0)


@pytest.mark.promise("interrupted anywhere")
@pytest.mark.parametrize(
    ("name", "dtype", "recompute", "every", "optimizer"),
    [
        ("gpt2", "float32", "none", 3, "adamw"),
        ("gpt2", "bfloat16", "none", 4, "adamw"),
        ("qwen3", "bfloat16", "none", 5, "adamw"),
        pytest.param("gpt2", "bfloat16", "none", 3, "muon", marks=pytest.mark.slow),
        pytest.param("llama", "float32", "block", 1, "muon", marks=pytest.mark.slow),
        pytest.param("gpt2", "float32", "none", 1, "adamw", marks=pytest.mark.slow),
        pytest.param("gpt2", "bfloat16", "none", 1, "adamw", marks=pytest.mark.slow),
        pytest.param("llama", "float32", "gelu", 1, "adamw", marks=pytest.mark.slow),
        pytest.param("qwen2", "bfloat16", "block", 1, "adamw", marks=pytest.mark.slow),
        pytest.param("qwen3", "float64", "none", 1, "adamw", marks=pytest.mark.slow),
    ],
)
def test_resume_any_step(
    tmp_path: Path,
    tokens: Path,
    name: str,
    dtype: str,
    recompute: str,
    every: int,
    optimizer: str,
    record_property: Callable,
) -> None:
    """Accumulation, an epoch's end, two steps skipped in a row, an outlier: all in one run,
    stopped after every step in turn and resumed. Qwen's and Llama's keep documents apart."""

    def config(folder: Path) -> Config:
        data = SETTINGS["data"] | {"attend_across_documents": name == "gpt2"}
        settings = SETTINGS | {"data": data, "recompute": recompute, "optimizer": optimizer}
        return small(folder, tokens, **settings, model={**MODELS[name], "dtype": dtype})

    unbroken = finish(config(tmp_path / "unbroken"), with_bad_steps)
    total = unbroken.total_steps
    expected = outcome(tmp_path / "unbroken")
    assert expected["latest.pt"]["progress"]["skipped"] == 3 and total > 11
    epochs = {r["epoch"] for r in read_records(metrics_file(tmp_path / "unbroken")) if "loss" in r}
    assert len(epochs) >= 2
    stops = range(1, total, every)
    for stop in stops:
        folder = tmp_path / f"stopped_{stop}"

        def prepared(trainer: Trainer, stop: int = stop) -> None:
            with_bad_steps(trainer)
            stop_after(trainer, stop)

        finish(config(folder), prepared)
        resumed = finish(config(folder), with_bad_steps, resume="latest")
        assert resumed.progress.step == total
        assert_same_bits(outcome(folder), expected, f"stopped after {stop}")
    record_property("places of interruption", len(stops))
    record_property("bits that differ", 0)


@pytest.mark.promise("interrupted anywhere")
def test_resume_many_times(tmp_path: Path, tokens: Path, record_property: Callable) -> None:
    """Stopped after each single step: twelve processes' worth of runs make one run."""
    finish(small(tmp_path / "unbroken", tokens))
    config = small(tmp_path / "broken", tokens)
    for stop in range(1, 13):
        finish(
            config, lambda trainer, stop=stop: stop_after(trainer, stop),
            resume="latest" if stop > 1 else None,
        )  # fmt: skip
    assert_same_bits(outcome(tmp_path / "broken"), outcome(tmp_path / "unbroken"))
    record_property("interruptions", 11)


@pytest.mark.promise("resumed from best.pt or a finished run")
def test_resume_best(tmp_path: Path, tokens: Path, record_property: Callable) -> None:
    """best.pt is of step 6; the run went on to 8, and what it wrote after 6 is taken back."""
    finish(small(tmp_path / "unbroken", tokens))
    config = small(tmp_path / "broken", tokens)
    finish(config, lambda trainer: stop_after(trainer, 8))
    best = checkpoints(tmp_path / "broken") / "best.pt"
    resumed = Trainer(config, resume=str(best), quiet=True)
    assert resumed.progress.step == 6
    resumed.run()
    assert_same_bits(outcome(tmp_path / "broken"), outcome(tmp_path / "unbroken"))
    record_property("steps taken again", 2)


@pytest.mark.promise("resumed from best.pt or a finished run")
def test_resume_finished_run(tmp_path: Path, tokens: Path) -> None:
    """A finished run can be resumed."""
    config = small(tmp_path, tokens)
    finish(config)
    before = outcome(tmp_path)
    finish(config, resume="latest")
    assert_same_bits(outcome(tmp_path), before)


@pytest.mark.promise("every step on record once")
def test_records_after_resume(tmp_path: Path, tokens: Path) -> None:
    """Every step and every validation is on record once."""
    config = small(tmp_path, tokens, log_every=1)
    finish(config, lambda trainer: stop_after(trainer, 7))
    finish(config, resume="latest")
    records = read_records(metrics_file(tmp_path))
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 13))
    assert [r["step"] for r in records if "validation_loss" in r] == [6, 12]
