"""Optimizers over the flat buffers, one file each; schedules; guards that can refuse a step."""

from __future__ import annotations

from typing import Any

from mantrans.config import TrainingConfig
from mantrans.optim.adamw import AdamW
from mantrans.optim.muon import Muon
from mantrans.optim.optimizer import Optimizer
from mantrans.optim.sgd import SGD

OPTIMIZERS: dict[str, type[Optimizer]] = {"sgd": SGD, "adamw": AdamW, "muon": Muon}

__all__ = ["OPTIMIZERS", "SGD", "AdamW", "Muon", "Optimizer", "options"]


def options(training: TrainingConfig) -> dict[str, Any]:
    """The keywords of a run's optimizer."""
    names = ["weight_decay", "max_grad_norm"]
    if training.optimizer != "sgd":
        names += ["beta1", "beta2", "epsilon"]
    found = {name: getattr(training, name) for name in names}
    if training.optimizer == "muon":
        found |= {
            "momentum": training.muon_momentum,
            "scale": training.muon_scale,
            "rate_ratio": training.muon_rate_ratio,
        }
    return found
