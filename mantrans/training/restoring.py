"""Goes on from a checkpoint, which any number of ranks may have saved."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mantrans.checkpoint import state_file
from mantrans.config import Config
from mantrans.data.loader import RULE
from mantrans.errors import CheckpointError, ConfigError
from mantrans.optim.schedule import rate
from mantrans.training.progress import Progress
from mantrans.training.resume import (
    LATEST,
    Checkpoint,
    changed_settings,
    differences,
    find_checkpoint,
    was_restarted,
)

if TYPE_CHECKING:
    from mantrans.training.trainer import Trainer


def open_checkpoint(run: Trainer, resume: str | None) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint that `resume` names, chosen by rank 0, and why newer ones were skipped.

    A process that torchrun started again goes on from the latest.
    """

    def choose() -> str:
        name = resume
        if name is None and was_restarted() and run.folders.has_checkpoints():
            name = LATEST
        if name is None:
            return json.dumps([None, []])
        path, notes = find_checkpoint(name, run.config.training)
        return json.dumps([str(path), notes])

    path, notes = json.loads(run.world.from_first("resume", choose))
    return (Checkpoint.load(Path(path)) if path else None), notes


def load_state(run: Trainer, checkpoint: Checkpoint) -> list[str]:
    """Take over weights, moments and counters; returns which settings have changed."""
    state = checkpoint.state
    with state_file.understood(checkpoint.path):
        notes = differences(state["config"], run.config.to_dict())
        run.wrapper.load_state_dict(state)
        if run.guard and state["guard"]:
            window = state["guard"]["values"]
            if window.shape == run.guard.values.shape:
                run.guard.load_state(state["guard"])
            else:
                notes.append(
                    f"note: training.outlier_window was {len(window)}: the window starts empty"
                )
        run.progress = Progress.from_saved(state["progress"])
    return notes


def continue_data(run: Trainer, checkpoint: Checkpoint) -> list[str]:
    """Lay out batches as the checkpoint's run did; CheckpointError if its tokens were others.

    Returns what has changed since it was saved.
    """
    state = checkpoint.state
    with state_file.understood(checkpoint.path):
        # Checkpoints had no such record while batches followed the first rule.
        saved = state.get("data", {"batches": 1})
        run.loader.follow(saved["batches"])
        run.set_length()
        notes = []
        if run.loader.rule < RULE:
            notes.append(
                "note: batches are those of an earlier version, with which the run began: the "
                "last tokens of the text may never be targets"
            )
        for split, ours in run.dataset.identity.items():
            theirs = saved.get(split, ours)
            if theirs == ours:
                continue
            other = f"{theirs['tokens']:,} {split} tokens ({theirs['checksum']:.8})"
            found = f"{ours['tokens']:,} ({ours['checksum']:.8})"
            if not run.allow_other_data:
                changed = changed_settings(state["config"], run.config.to_dict(), "data")
                raise CheckpointError(
                    f"data: expected the checkpoint's {other}, got {found}: "
                    f"{', '.join(changed) or 'the text has changed'}; "
                    "to go on with these, add --allow-other-data"
                )
            notes.append(f"note: {found} {split} tokens instead of the checkpoint's {other}")
            if split == "validation":  # the lowest loss was another text's
                run.progress.best_loss, run.progress.best_step = math.inf, 0
        return [*notes, *_rate_change(run, state["config"])]


def _rate_change(run: Trainer, saved: dict[str, Any]) -> list[str]:
    """Say if the next step's learning rate is not that of the checkpoint's run, which, if it
    was at its end, had that of its last step."""
    try:
        before = Config.from_dict(saved).training
    except ConfigError:  # of another version
        return []
    step, length = run.progress.step, run.length_of(before)
    if not step < run.total_steps or length < 1:
        return []
    was, now = rate(before, min(step, length - 1), length), run.learning_rate(step)
    if math.isclose(was, now, rel_tol=0.01):
        return []
    return [f"note: the learning rate goes on at {now:.2e}; the checkpoint's run was at {was:.2e}"]
