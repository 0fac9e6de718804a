"""Right after the step was captured: once whatever will need memory beside it.

A graph keeps the memory of a whole step. What validation and saves need on top was predicted
(`memory`); here it is tried, so that a lack of it ends the run now and not at the first validation.
Nothing is recorded, and no weight changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mantrans.errors import ConfigError
from mantrans.evaluation.evaluator import measure_stream
from mantrans.runtime import is_out_of_memory
from mantrans.training import saving
from mantrans.training.agreement import require_same_weights

if TYPE_CHECKING:
    from mantrans.training.trainer import Trainer


def rehearse(run: Trainer) -> None:
    """A batch of validation, a save's check, a second computation. Every rank calls it.

    ConfigError, which names the field to change, if the device runs out of memory.
    """
    config = run.config
    smaller = "make it smaller, or training.batch_size"
    for field, value, what, act, advice in (
        ("evaluation.batch_size", config.evaluation_batch, "validation", _validate, smaller),
        (
            "training.batch_size",
            config.training.batch_size,
            "the check of a save",
            _check,
            "make it smaller",
        ),
        (
            "training.recheck_every",
            config.training.recheck_every,
            "a second computation",
            _compute_again,
            "set it to null, or make training.batch_size smaller",
        ),
    ):
        try:
            act(run)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise ConfigError(
                f"{field}: expected {what} to fit beside the captured step, got out of memory on "
                f"{run.wrapper.device} with {value}; {advice}"
            ) from None


def _validate(run: Trainer) -> None:
    """The first batch, on the rank that validates."""
    if run.world.is_first and len(run.dataset.validation):
        measure_stream(
            run.wrapper, run.tokenizer, run.dataset.validation, run.config, max_batches=1
        )


def _check(run: Trainer) -> None:
    require_same_weights(run.world, run.wrapper.model.parameters, run.progress.step)
    saving.weights_are_finite(run)


def _compute_again(run: Trainer) -> None:
    if run.config.training.recheck_every is not None:
        run.train_step.compute()
