"""A run on a GPU that was stopped and resumed leaves, bit for bit, what an unbroken one leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mantrans.config import Config
from tests.support.compare import assert_same_bits
from tests.support.runs import finish, outcome, small, stop_after

pytestmark = pytest.mark.gpu

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation, documents, guard": {
        "gradient_accumulation_steps": 2, "outlier_z_score": 0.5, "outlier_window": 8,
        "data": {"attend_across_documents": False},
    },
    "stochastic rounding, eager": {"stochastic_rounding": True, "compile_step": False},
}  # fmt: skip


@pytest.mark.promise("resumed on a GPU")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_resume_equals_unbroken(
    device: torch.device, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """A resumed run has the bits of an unbroken one."""

    def config(folder: str) -> Config:
        model = {"d_model": 128, "n_heads": 2, "max_seq_len": 64, "dtype": "bfloat16"}
        options = {**settings, "data": dict(settings.get("data", {}))}
        return small(
            tmp_path / folder, tmp_path / "tokens", **options, model=model, device=str(device)
        )

    finish(config("unbroken"))
    for stop in (1, 7):
        folder = f"stopped after {stop}"
        finish(config(folder), lambda trainer, stop=stop: stop_after(trainer, stop))
        resumed = finish(config(folder), resume="latest", check_kernels=False)
        assert resumed.progress.step == resumed.total_steps
        assert_same_bits(outcome(tmp_path / folder), outcome(tmp_path / "unbroken"), folder)
