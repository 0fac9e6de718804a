"""A patched Llama beside the unpatched one in transformers' Trainer: 20 steps of AdamW.

`pytest -s -m slow tests/mantrans/patch/test_trainer.py` prints the table. Both start with the same
bits and see the same batches; float32 differs from the first step on in its last digits, and AdamW
divides a gradient by its size, which lets the difference of a small one grow.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mantrans import patch
from tests.mantrans.patch.test_patch import made
from tests.support.compare import relative_error

pytest.importorskip("accelerate", reason="the Trainer needs it")
STEPS, T = 20, 24


def rows(n: int) -> list[dict[str, Tensor]]:
    """Counting up by a step of each row's own: easy to learn. The first labels are ignored."""
    found = []
    for i in range(n):
        ids = (torch.arange(T) * (1 + i % 3) + i) % 97
        found.append({"input_ids": ids, "labels": ids.where(torch.arange(T) > 2, -100)})
    return found


def trained(model: Any, folder: Path) -> list[dict[str, float]]:
    """Its log of each step: loss and gradient norm."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=4,
        gradient_accumulation_steps=2, learning_rate=3e-3, lr_scheduler_type="constant",
        max_grad_norm=1.0, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
        disable_tqdm=True, seed=5,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows(64))
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


@pytest.mark.slow
def test_trainer_patched_beside_unpatched(tmp_path: Path) -> None:
    """Losses of every step, gradient norms, and all weights after the last."""
    model, put = made("llama")
    other = put(copy.deepcopy(model))
    start = {n: p.clone() for n, p in model.state_dict().items()}
    plain, ours = trained(model, tmp_path / "plain"), trained(other, tmp_path / "patched")
    print("| step | loss | patched | gradient norm | patched |")
    print("|" + "---|" * 5)
    for i, (a, b) in enumerate(zip(plain, ours, strict=True), 1):
        numbers = (a["loss"], b["loss"], a["grad_norm"], b["grad_norm"])
        print(f"| {i} | " + " | ".join(f"{float(x):.7f}" for x in numbers) + " |")
    patch.unpatch(other)
    theirs, found = model.state_dict(), other.state_dict()
    errors = {n: relative_error(found[n] - start[n], theirs[n] - start[n]) for n in theirs}
    worst = max(errors, key=errors.__getitem__)
    print(f"largest relative difference of what 20 steps changed: {errors[worst]:.1e}, of {worst}")
    assert len(plain) == STEPS and plain[-1]["loss"] < 0.8 * plain[0]["loss"]
    for a, b in zip(plain, ours, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert float(b["grad_norm"]) == pytest.approx(float(a["grad_norm"]), rel=1e-3)
    assert errors[worst] < 1e-3
