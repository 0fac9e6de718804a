"""Learning-rate schedules."""

from __future__ import annotations

import math

from mantrans.config import TrainingConfig
from mantrans.config.arguments import Rate, Steps, checked, field
from mantrans.config.section import Share


@checked(
    step=Steps,
    total_steps=Steps,
    peak=Rate,
    minimum=Rate,
    warmup_steps=Steps,
    decay=field(TrainingConfig, "lr_decay"),
    decay_fraction=Share,
)
def scheduled_learning_rate(
    step: int,
    total_steps: int,
    peak: float,
    *,
    minimum: float = 0.0,
    warmup_steps: int = 0,
    decay: str = "cosine",
    decay_fraction: float = 0.2,
) -> float:
    """The learning rate of step 0 .. total_steps - 1.

    It rises linearly to `peak` over warmup_steps, then
      constant  stays there
      linear    falls linearly to `minimum` at the last step
      cosine    falls along half a cosine to `minimum` (Loshchilov & Hutter 2017)
      wsd       stays, then falls linearly over the last `decay_fraction` of all steps
                (warm-up, stable, decay: Hu et al. 2024)
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    start = warmup_steps
    if decay == "wsd":
        start = max(start, total_steps - round(decay_fraction * total_steps))
    if decay == "constant" or step < start:
        return peak
    progress = min(1.0, (step - start) / max(1, total_steps - 1 - start))
    share = 0.5 * (1 + math.cos(math.pi * progress)) if decay == "cosine" else 1 - progress
    return minimum + (peak - minimum) * share


def rate(training: TrainingConfig, step: int, total_steps: int) -> float:
    """The learning rate of a step, counted from 0, in a run of `total_steps`."""
    return scheduled_learning_rate(
        step,
        total_steps,
        training.learning_rate,
        minimum=training.min_learning_rate,
        warmup_steps=training.warmup(total_steps),
        decay=training.lr_decay,
        decay_fraction=training.decay_fraction,
    )
