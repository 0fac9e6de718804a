"""Runs of Llama's and Qwen's models: interrupted, killed, diagnosed, reported as a GPT-2's are."""

from __future__ import annotations

import math
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mantrans.config import Config
from mantrans.errors import CheckpointError, MantransError
from mantrans.records import read_records
from mantrans.training.trainer import Trainer
from tests.support.compare import assert_same_bits
from tests.support.processes import Processes
from tests.support.runs import (
    checkpoints,
    finish,
    metrics_file,
    outcome,
    poison,
    small,
    stop_after,
)

LLAMA: dict[str, Any] = {"norm": "rms_norm", "position": "rope", "mlp": "swiglu", "bias": False}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, "n_kv_heads": 1, "rope_scaling_factor": 8.0, "rope_original_length": 16},
    "qwen2": {**LLAMA, "qkv_bias": True, "attention_window": 5, "tie_embeddings": False},
    "qwen3": {**LLAMA, "qk_norm": True, "head_dim": 12, "n_kv_heads": 1},
}
SETTINGS: dict[str, Any] = {"gradient_accumulation_steps": 2, "outlier_z_score": 4.0}


def with_bad_steps(trainer: Trainer) -> None:
    poison(trainer, range(3, 4), "gradients", math.inf)
    poison(trainer, range(4, 5), "loss", math.nan)


@pytest.mark.promise("interrupted anywhere")
@pytest.mark.parametrize(
    ("name", "dtype", "recompute", "stops"),
    [
        ("qwen3", "bfloat16", "none", (2, 7)),
        pytest.param("llama", "float32", "gelu", range(1, 12), marks=pytest.mark.slow),
        pytest.param("qwen2", "bfloat16", "block", range(1, 12), marks=pytest.mark.slow),
        pytest.param("qwen3", "float64", "none", range(1, 12), marks=pytest.mark.slow),
    ],
)
def test_resume_interrupted(
    tmp_path: Path, tokens: Path, name: str, dtype: str, recompute: str, stops: Any,
    record_property: Callable,
) -> None:  # fmt: skip
    """With accumulation, documents kept apart and two steps skipped: the same bits at the end."""

    def config(folder: Path) -> Config:
        model = {**MODELS[name], "dtype": dtype}
        data = {"attend_across_documents": False}
        return small(folder, tokens, **SETTINGS, recompute=recompute, model=model, data=data)

    unbroken = finish(config(tmp_path / "unbroken"), with_bad_steps)
    expected = outcome(tmp_path / "unbroken")
    assert expected["latest.pt"]["progress"]["skipped"] == 2
    losses = [r["loss"] for r in read_records(metrics_file(tmp_path / "unbroken")) if "loss" in r]
    assert losses[-1] < losses[0]
    for stop in stops:
        folder = tmp_path / f"stopped_{stop}"

        def prepared(trainer: Trainer, stop: int = stop) -> None:
            with_bad_steps(trainer)
            stop_after(trainer, stop)

        finish(config(folder), prepared)
        resumed = finish(config(folder), with_bad_steps, resume="latest")
        assert resumed.progress.step == unbroken.total_steps
        assert_same_bits(outcome(folder), expected, f"stopped after {stop}")
    record_property("places of interruption", len(stops))


@pytest.mark.promise("killed at random")
@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_resume_after_random_kills(
    tmp_path: Path, tokens: Path, processes: Processes, name: str, record_property: Callable
) -> None:
    """SIGKILL twelve times, each followed by `--resume latest`; then the run comes to its end."""

    def config_in(folder: Path) -> None:
        settings = {"max_steps": 24, "save_every": 3, "eval_every": 12, "log_every": 2}
        folder.mkdir(parents=True, exist_ok=True)
        small(folder, tokens, **settings, model=MODELS[name]).save(folder / "config.yaml")

    def start(folder: Path) -> Any:
        resume = ["--resume", "latest"] if any(checkpoints(folder).glob("*.pt")) else []
        return processes.start("--config", "config.yaml", *resume, cwd=folder)

    for folder in ("unbroken", "timed"):  # the first run ever takes longer
        config_in(tmp_path / folder)
        begun = time.monotonic()
        assert start(tmp_path / folder).wait().status == 0
        duration = time.monotonic() - begun
    expected = outcome(tmp_path / "unbroken")
    rng = random.Random(name)
    kills = finished = 0
    while kills < 12 or finished == 0:
        folder = tmp_path / f"run_{finished}"
        config_in(folder)
        child = start(folder)
        if kills < 12:
            time.sleep(rng.uniform(0.0, 0.8 * duration))
            child.kill()
        ended = child.wait()
        if ended.status == 0:
            assert_same_bits(outcome(folder), expected)
            finished += 1
            continue
        assert ended.status == -signal.SIGKILL, ended.text
        kills += 1
    record_property("kills", kills)


def test_resume_another_architecture(tmp_path: Path, tokens: Path) -> None:
    """The refusal is one line that names the field, before any step."""
    finish(small(tmp_path, tokens, max_steps=4, model=MODELS["qwen3"]))
    for model, field in (
        ({**MODELS["qwen3"], "qk_norm": False}, "qk_norm"),
        ({**MODELS["qwen3"], "attention_window": 3}, "attention_window"),
        ({}, "n_kv_heads"),
    ):
        with pytest.raises(CheckpointError) as refused:
            finish(small(tmp_path, tokens, max_steps=8, model=model), resume="latest")
        text = str(refused.value)
        assert f"{field}: expected " in text and "as in the checkpoint" in text
        assert "\n" not in text


def test_train_overflowing_gain(tmp_path: Path, tokens: Path) -> None:
    """A gain of a head norm that overflows: the first value that is not finite is attention's."""

    def broken(trainer: Trainer) -> None:
        weights = dict(trainer.wrapper.model.named_parameters())
        for who in "qk":
            weights[f"blocks.0.attention.{who}_norm.weight"][:] = 3e30

    config = small(tmp_path, tokens, max_steps=4, model=MODELS["qwen3"], max_consecutive_skips=1)
    with pytest.raises(MantransError) as stopped:
        finish(config, broken)
    assert "blocks.0.attention.out, right after blocks.0.attention." in str(stopped.value)
