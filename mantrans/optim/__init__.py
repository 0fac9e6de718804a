"""Optimizers over the flat buffers, one file each; schedules; guards that can refuse a step."""

from __future__ import annotations

from typing import Any

from mantrans.config import TrainingConfig
from mantrans.optim.adamw import AdamW
from mantrans.optim.optimizer import Optimizer
from mantrans.optim.sgd import SGD

OPTIMIZERS: dict[str, type[Optimizer]] = {"sgd": SGD, "adamw": AdamW}

__all__ = ["OPTIMIZERS", "SGD", "AdamW", "Optimizer", "options"]


def options(training: TrainingConfig) -> dict[str, Any]:
    """The keywords of a run's optimizer."""
    names = ["weight_decay", "max_grad_norm"]
    if training.optimizer == "adamw":
        names += ["beta1", "beta2", "epsilon"]
    return {name: getattr(training, name) for name in names}
