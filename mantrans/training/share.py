"""The part of each step's sequences that a rank works on.

A step has A micro-batches of B sequences, whatever the number of ranks W:

    W divides A        a rank has A / W of them: each micro-batch is as it is with one process
    W divides A * B    a rank has A * B / W sequences, in as few equal micro-batches of at most B
                       sequences as possible: other shapes, so that bits depend on W

A rank's micro-batches are side by side in the step's batch; with shard `gradients` they are every
W-th, because each is summed over the ranks at once (see `gradient_sum`).
"""

from __future__ import annotations

from typing import NamedTuple

from mantrans.config import TrainingConfig
from mantrans.distributed.world import World
from mantrans.errors import ConfigError


class Share(NamedTuple):
    """rows: of the step's batch that this rank reads, by micro-batch. notes: for the user."""

    rows: list[int]
    micro_batches: int
    notes: list[str]


def share_of(training: TrainingConfig, world: World) -> Share:
    """The share of one rank. ConfigError if the ranks cannot have equal shares."""
    ranks = world.size
    parts, size = micro_batches(training, ranks)
    interleaved = training.shard == "gradients"
    numbers = [
        part * ranks + world.rank if interleaved else world.rank * parts + part
        for part in range(parts)
    ]
    rows = [number * size + row for number in numbers for row in range(size)]
    reason = dependence(training, ranks)
    return Share(rows, parts, [f"note: {reason}"] if reason else [])


def micro_batches(training: TrainingConfig, ranks: int) -> tuple[int, int]:
    """(how many, sequences in each) of one of so many ranks. ConfigError without equal shares."""
    total, B = training.sequences_per_step, training.batch_size
    if total % ranks:
        raise ConfigError(
            "training.batch_size × gradient_accumulation_steps: expected a multiple of the "
            f"{ranks} processes, got {total}"
        )
    mine = total // ranks
    parts = next(n for n in range(-(-mine // B), mine + 1) if mine % n == 0)
    return parts, mine // parts  # B if A is a multiple of the ranks


def dependence(training: TrainingConfig, ranks: int) -> str | None:
    """Why so many ranks compute other last bits than one process; None if they do not."""
    A, B = training.gradient_accumulation_steps, training.batch_size
    parts, size = micro_batches(training, ranks)
    depend = "the last bits depend on the number of processes, since"
    if ranks & (ranks - 1):
        return f"{depend} {ranks} is not a power of two"
    if A % ranks:
        return (
            f"micro-batches of {size} sequences instead of {B}, since training."
            f"gradient_accumulation_steps ({A}) is not a multiple of the {ranks} processes: the "
            "last bits depend on their number; they would not with training.batch_size "
            f"{size} and gradient_accumulation_steps {ranks * parts}"
        )
    if training.gradient_sum == "running" and ranks > 1:
        return f"{depend} training.gradient_sum is running"
    if training.shard == "gradients" and ranks > 1 and parts & (parts - 1):
        return (
            f"{depend} training.shard is gradients and gradient_accumulation_steps ({A}) not a "
            "power of two"
        )
    return None
