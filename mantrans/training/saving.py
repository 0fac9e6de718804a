"""Saves a run: one file has all that its rest depends on, whatever the number of ranks.

Rank 0 writes it; what it has not itself the others send to its memory before. All ranks learn
whether it was written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mantrans.errors import CheckpointError
from mantrans.finite import all_finite
from mantrans.inference.trained import saved_tokenizer
from mantrans.training.agreement import require_same_weights

if TYPE_CHECKING:
    from mantrans.training.trainer import Trainer


def state(run: Trainer) -> dict[str, Any]:
    """Everything that the rest of the run depends on."""
    return {
        **run.wrapper.state_dict(),
        "config": run.config.to_dict(),
        "tokenizer": saved_tokenizer(run.tokenizer, with_file=run.origin is not None),
        **({"init_from": run.origin} if run.origin else {}),
        "data": {"batches": run.loader.rule, **run.dataset.identity},
        "progress": run.progress.saved(),
        "guard": run.guard.state() if run.guard else {},
        "logits_chunk_rows": run.wrapper.model.output.chunk_rows,
        "extra": {},
    }


def save(run: Trainer, *, best: bool, must_succeed: bool) -> None:
    """Write a checkpoint. If a periodic one fails, it is reported and the run continues."""
    require_same_weights(run.world, run.wrapper.model.parameters, run.progress.step)
    is_finite = weights_are_finite(run)
    whole = state(run)

    def write() -> str:
        try:
            if not is_finite:
                raise CheckpointError(
                    f"step {run.progress.step}: weights are not finite and are not saved; "
                    "what was saved before is intact"
                )
            _sync_records(run)
            run.folder.save(run.progress.step, whole, best=best)
        except CheckpointError as failure:
            return str(failure)
        return ""

    failure = run.world.from_first("save", write)
    if not failure:
        run.tell_last_saved(f"{run.latest} (step {run.progress.step})")
    elif must_succeed:
        raise CheckpointError(failure)
    else:
        run.logger.message(f"warning: {failure}; training goes on")


def weights_are_finite(run: Trainer) -> bool:
    """A skipped step leaves finite weights, but a step that is not skipped may overflow."""
    weights = run.wrapper.model.parameters.best_weights()
    return not run.world.any(not all_finite(weights))


def _sync_records(run: Trainer) -> None:
    """Flush the records: they must include every step that a checkpoint includes."""
    try:
        run.logger.sync()
    except OSError as error:
        raise CheckpointError(
            f"{run.directory}: the records cannot be written ({error.strerror}), and without "
            "them no checkpoint is saved"
        ) from None
