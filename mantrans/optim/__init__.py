"""Optimizers over the flat buffers, one file each; schedules; guards that can refuse a step."""

from __future__ import annotations

from mantrans.optim.adamw import AdamW
from mantrans.optim.optimizer import Optimizer
from mantrans.optim.sgd import SGD

OPTIMIZERS: dict[str, type[Optimizer]] = {"sgd": SGD, "adamw": AdamW}

__all__ = ["OPTIMIZERS", "SGD", "AdamW", "Optimizer"]
