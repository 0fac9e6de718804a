"""How ranks meet, and what they tell one another."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mantrans.distributed.world import Ranks, World, device_of
from mantrans.errors import ConfigError, MantransError
from tests.support.ranks import in_ranks


def exchanges(world: World) -> dict[str, Any]:
    """Everything once, with numbers whose sum depends on the order."""
    x = torch.tensor([1.0, 1e8, -1e8, 1.0][world.rank :][:1] or [1.0])
    reduced = torch.tensor([world.rank + 1])
    world.all_reduce(reduced)
    from_last = torch.tensor([world.rank])
    world.broadcast(from_last, world.size - 1)
    return {
        "sum": world.sum(x).item(),
        "all_reduce": reduced.item(),
        "broadcast": from_last.item(),
        "any": [world.any(world.rank == world.size - 1), world.any(False)],
        "texts": [world.texts("a", f"{n} of {world.rank}") for n in range(2)],
        "from_first": [world.from_first("b", lambda: f"{world.rank}") for _ in range(2)],
    }


def keys_left(world: World) -> list[int]:
    """In the store, after one and after many calls."""
    assert isinstance(world, Ranks)
    counts = []
    for n in range(20):
        world.texts("a", "x" * n)
        world.texts("all have counted", "")
        if n in (1, 19):
            counts.append(world.store.num_keys())
    return counts


def test_texts_leave_nothing() -> None:
    """The store, which torchrun holds for as long as a run takes, does not grow."""
    for first, last in in_ranks(2, keys_left):
        assert last <= first + 2, (first, last)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_exchanges_all_ranks(size: int) -> None:
    """Exchanges agree on all ranks."""
    found = in_ranks(size, exchanges)
    assert all(result == found[0] for result in found)
    assert found[0] | {"sum": None} == {
        "sum": None,
        "all_reduce": size * (size + 1) // 2,
        "broadcast": size - 1,
        "any": [True, False],
        "texts": [[f"{n} of {rank}" for rank in range(size)] for n in range(2)],
        "from_first": ["0", "0"],
    }
    if size == 4:  # (1 + 1e8) + (-1e8 + 1): a tree, as rounded; a chain gives 1
        assert found[0]["sum"] == 0.0


def test_world_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, "", "1"):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        if value is not None:
            monkeypatch.setenv("WORLD_SIZE", value)
        world = World.from_environment()
        assert (world.rank, world.size, world.is_first) == (0, 1, True)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("RANK", "two", "RANK: expected a number, as torchrun sets it, got 'two'"),
        ("RANK", "4", r"RANK: expected less than WORLD_SIZE \(4\), got 4"),
        ("MASTER_ADDR", "", "MASTER_ADDR: expected a machine, as torchrun sets it, got nothing"),
    ],
)
def test_world_variables_wrong(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Variables of torchrun are refused."""
    for variable in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.setenv(variable, "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv(name, value)
    with pytest.raises(MantransError, match=message):
        World.from_environment()


def test_device_of_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Device of a rank is its own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    world = World(rank=3, size=4, local_rank=1, local_size=2)
    assert [device_of(world, name) for name in ("auto", "cuda", "cpu")] == ["cuda:1"] * 2 + ["cpu"]
    assert device_of(World.single(), "cuda:1") == "cuda:1"
    with pytest.raises(
        ConfigError, match=r"^training\.device: expected auto, cuda or cpu, since 4 "
    ):
        device_of(world, "cuda:0")
    with pytest.raises(ConfigError, match=r"^--nproc-per-node: expected at most 2, .* got 4$"):
        device_of(World(size=4, local_size=4), "auto")
