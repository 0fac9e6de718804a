"""What ranks own: together everything, each element once, and found again by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mantrans import CustomTransformerWrapper
from mantrans.config import ModelConfig
from mantrans.distributed.shard import PIECES, Shard
from mantrans.distributed.world import World
from mantrans.errors import ConfigError

SIZES = pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 16, 63, 64])
BUCKETS = {
    "tables": slice(0, 3 * 4096), "blocks.0": slice(3 * 4096, 5 * 4096),
    "blocks.1": slice(5 * 4096, 7 * 4096), "vectors": slice(7 * 4096, 8 * 4096),
}  # fmt: skip


@SIZES
def test_shard_ownership(size: int) -> None:
    """Each element has one owner, whose buffer has it once; a rank owns as much as the others."""
    owners = torch.full((8 * 4096,), -1)
    for rank in range(size):
        shard = Shard(BUCKETS, World(rank, size))
        kept = torch.zeros(shard.elements)
        for part in shard.parts:
            assert (owners[part.where] == -1).all()
            owners[part.where] = rank
            kept[part.kept] += 1
            length = part.where.stop - part.where.start
            assert length == part.kept.stop - part.kept.start and length % part.pieces == 0
        assert (kept == 1).all()
        assert abs(shard.elements - 8 * 4096 / size) < 8 * 4096 / PIECES
    assert (owners >= 0).all()


def test_shard_one_process() -> None:
    """Blocks that lie side by side take one launch."""
    parts = Shard(BUCKETS, World.single()).parts
    assert [part.kind for part in parts] == ["tables", "blocks", "vectors"]
    assert parts[1].where == slice(3 * 4096, 7 * 4096) and parts[1].buckets == slice(1, 3)
    assert [part.pieces for part in parts] == [PIECES, 2 * PIECES, PIECES]


def test_shard_too_many_processes() -> None:
    with pytest.raises(ConfigError, match=r"^training.shard: expected none with more than 64 proc"):
        Shard(BUCKETS, World(0, 128))


@SIZES
def test_shard_store(size: int) -> None:
    """A range of values that begins and ends inside of pieces, and spans buckets."""
    expected = torch.arange(8.0 * 4096)
    found = torch.zeros_like(expected)
    for rank in range(size):
        shard = Shard(BUCKETS, World(rank, size))
        owned = torch.full((shard.elements,), -1.0)
        for start, stop in ((0, 100), (100, 20_000), (20_000, 8 * 4096)):
            shard.store(owned, start, expected[start:stop])
        for part in shard.parts:
            found[part.where] = owned[part.kept]
    assert torch.equal(found, expected)


def build(world: World, shard: str, optimizer: str) -> CustomTransformerWrapper:
    shape = {"vocab_size": 61, "d_model": 20, "n_blocks": 3, "n_heads": 2, "dtype": "bfloat16"}
    config = ModelConfig.complete(shape, "test")
    return CustomTransformerWrapper.from_config(
        config, device="cpu", backend="native", optimizer=optimizer, world=world, shard=shard
    )


@pytest.mark.parametrize("shard", ["optimizer", "gradients"])
@pytest.mark.parametrize(
    ("size", "optimizer"), [(2, "adamw"), (3, "adamw"), (2, "muon"), (3, "muon")]
)
def test_load_state_owned(shard: str, size: int, optimizer: str) -> None:
    """Masters at the start, and the moments and masters of a state with all of them."""
    whole = build(World.single(), shard, optimizer)
    ids = torch.arange(24).view(2, 12)
    initial = whole.model.parameters.master.clone()
    whole.train_step(ids, ids)
    p = whole.model.parameters
    state: dict[str, Any] = whole.state_dict()
    expected = {"master": p.master, **whole.optimizer.state()}
    found = {name: torch.zeros_like(flat) for name, flat in expected.items()}
    for rank in range(size):
        one = build(World(rank, size), shard, optimizer)
        own = one.model.parameters
        parts = own.shard.parts
        assert all(torch.equal(own.master[x.kept], initial[x.where]) for x in parts)
        one.load_state_dict(state)
        assert torch.equal(own.weights, p.weights)
        shards = {"master": own.shard, **one.optimizer.shards()}
        wholes = {"master": p.shard, **whole.optimizer.shards()}
        for name, flat in {"master": own.master, **one.optimizer.state()}.items():
            assert len(flat) == shards[name].elements < len(p.weights)
            for bucket, part in shards[name].by_bucket.items():
                there = wholes[name].places[bucket].start - p.buckets[bucket].start
                found[name][there + part.where.start : there + part.where.stop] = flat[part.kept]
        if shard == "gradients":
            assert len(own.gradients) + len(own.owned_gradients) < len(p.weights) * 1.5
    assert all(torch.equal(found[name], flat) for name, flat in expected.items())
