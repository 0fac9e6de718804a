"""Runs of Llama's and Qwen's models: continued only by their own, diagnosed as a GPT-2's are."""

from __future__ import annotations

from pathlib import Path

import pytest

from mantrans.errors import CheckpointError, MantransError
from mantrans.training.trainer import Trainer
from tests.support.runs import MODELS, finish, small


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
