"""The part of each step's sequences that a rank works on.

A step has A micro-batches of B sequences, whatever the number of ranks W:

    W divides A        a rank has A / W of them: each micro-batch is as it is with one process
    W divides A * B    a rank has A * B / W sequences, in as few equal micro-batches of at most B
                       sequences as possible: other shapes, so that bits depend on W
"""

from __future__ import annotations

from typing import NamedTuple

from mantrans.config import TrainingConfig
from mantrans.distributed.world import World
from mantrans.errors import ConfigError


class Share(NamedTuple):
    """sequences: of this rank in a step. micro_batches: into which they are divided."""

    sequences: int
    micro_batches: int
    notes: list[str]


def share_of(training: TrainingConfig, world: World) -> Share:
    """The share of one rank. ConfigError if the ranks cannot have equal shares."""
    ranks, total = world.size, training.sequences_per_step
    A, B = training.gradient_accumulation_steps, training.batch_size
    notes = []
    if not world.is_power_of_two:
        notes.append(
            f"note: the last bits depend on the number of processes, since {ranks} is not a power "
            "of two"
        )
    if A % ranks == 0:
        return Share(total // ranks, A // ranks, notes)
    if total % ranks:
        raise ConfigError(
            "training.batch_size × gradient_accumulation_steps: expected a multiple of the "
            f"{ranks} processes, got {total}"
        )
    mine = total // ranks
    parts = next(n for n in range(-(-mine // B), mine + 1) if mine % n == 0)
    if world.is_power_of_two:
        notes.append(
            f"note: micro-batches of {mine // parts} sequences instead of {B}, since training."
            f"gradient_accumulation_steps ({A}) is not a multiple of the {ranks} processes: the "
            "last bits depend on their number; they would not with training.batch_size "
            f"{mine // parts} and gradient_accumulation_steps {ranks * parts}"
        )
    return Share(mine, parts, notes)
