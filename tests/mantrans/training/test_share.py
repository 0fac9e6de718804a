"""The part of a step that a rank works on."""

from __future__ import annotations

import pytest

from mantrans.config import TrainingConfig
from mantrans.distributed.world import World
from mantrans.errors import ConfigError
from mantrans.training.share import Share, share_of


def shares(ranks: int, A: int, B: int, **settings: str) -> list[Share]:
    training = TrainingConfig(max_steps=1, gradient_accumulation_steps=A, batch_size=B, **settings)
    return [share_of(training, World(rank, ranks, rank, ranks)) for rank in range(ranks)]


@pytest.mark.parametrize("shard", ["none", "optimizer", "gradients"])
@pytest.mark.parametrize(
    ("ranks", "A", "B"),
    [(1, 3, 2), (2, 4, 2), (4, 4, 1), (3, 6, 2), (4, 2, 8), (4, 3, 8), (6, 4, 9)],
)
def test_share_rows(ranks: int, A: int, B: int, shard: str) -> None:
    """All rows, each once; the ranks do equal work, in micro-batches that are not larger."""
    found = shares(ranks, A, B, shard=shard)
    assert sorted(row for share in found for row in share.rows) == list(range(A * B))
    assert len({(len(share.rows), share.micro_batches) for share in found}) == 1
    assert len(found[0].rows) <= found[0].micro_batches * B
    assert len(found[0].rows) % found[0].micro_batches == 0


def test_share_order() -> None:
    """Side by side, but by turns where each micro-batch is summed over the ranks."""
    assert [share.rows for share in shares(2, 4, 1)] == [[0, 1], [2, 3]]
    assert [share.rows for share in shares(2, 4, 1, shard="gradients")] == [[0, 2], [1, 3]]


@pytest.mark.parametrize(
    ("ranks", "A", "settings", "note"),
    [
        (1, 3, {}, ""),
        (1, 3, {"shard": "gradients", "gradient_sum": "running"}, ""),
        (4, 4, {"shard": "gradients"}, ""),
        (2, 6, {}, ""),
        (3, 6, {}, "since 3 is not a power of two"),
        (4, 2, {}, "they would not with training.batch_size 4 and gradient_accumulation_steps 4"),
        (2, 4, {"gradient_sum": "running"}, "since training.gradient_sum is running"),
        (2, 6, {"shard": "gradients"}, "gradient_accumulation_steps (6) not a power of two"),
    ],
)
def test_share_notes(ranks: int, A: int, settings: dict[str, str], note: str) -> None:
    """What the last bits depend on is said; what would help is right."""
    notes = shares(ranks, A, 8, **settings)[0].notes
    assert len(notes) == bool(note) and note in "".join(notes)
    assert not shares(4, 4, 4)[0].notes


def test_share_refused() -> None:
    with pytest.raises(ConfigError, match=r"expected a multiple of the 4 processes, got 6$"):
        shares(4, 2, 3)
