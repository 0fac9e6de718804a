"""Ranks add up the same bits as one process: real processes over gloo, on loopback."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from mantrans.config import ModelConfig
from mantrans.distributed.world import World
from mantrans.kernels.reference import IGNORE_INDEX
from mantrans.optim.guards import OutlierGuard
from mantrans.training.diagnosis import first_non_finite
from mantrans.training.step import StepRecord, TrainStep
from mantrans.wrapper import CustomTransformerWrapper
from tests.support.ranks import in_ranks

V, T, B = 61, 12, 2
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_heads": 2, "d_ffn": 48},
    "gpt2 untied": {"n_heads": 2, "bias": False, "tie_embeddings": False},
    "llama": {
        "n_heads": 4, "n_kv_heads": 2, "norm": "rms_norm", "position": "rope", "mlp": "swiglu",
        "bias": False,
    },
}  # fmt: skip


class Case(NamedTuple):
    """A run: its model, its step, and what the ranks divide."""

    shape: str = "gpt2"
    dtype: str = "float32"
    accumulation: int = 4
    shard: str = "none"
    stochastic: bool = False
    recompute: str = "none"
    optimizer: str = "adamw"
    method: str = "tree"
    steps: int = 10
    nan_at: int | None = None  # the step in which one row of the last rank's has a NaN
    guard: bool = False

    def row_numbers(self, world: World) -> list[int]:
        """Of the micro-batches of a rank, in their order."""
        each = self.accumulation // world.size
        first, stride = world.rank * each, 1
        if self.shard == "gradients":
            first, stride = world.rank, world.size
        numbers = range(first, first + each * stride, stride)
        return [n * B + row for n in numbers for row in range(B)]


class Source:
    """Random rows, of which a few targets are ignored."""

    def __init__(self, rows: list[int], total: int) -> None:
        self.mine, self.total = rows, total

    def load(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        whole = torch.randint(V, (self.total, T + 1), generator=generator)
        whole[step % self.total, 5:] = IGNORE_INDEX
        self.now = whole[self.mine]

    def rows(self) -> Tensor:
        return self.now


class Step(TrainStep):
    """Ignored targets, and on demand a NaN in the last micro-batch of the last rank."""

    poisoned = False

    def batch(self) -> Any:
        parts = list(super().batch())
        for i, part in enumerate(parts):
            scale = part.scale
            if self.poisoned and i == len(parts) - 1 and self.world.rank == self.world.size - 1:
                scale = scale * torch.nan
            yield part._replace(tokens=part.tokens.clamp(min=0), scale=scale)


def build(world: World, case: Case) -> tuple[CustomTransformerWrapper, Step]:
    shape = {"vocab_size": V, "d_model": 32, "n_blocks": 3, "max_seq_len": T, "dtype": case.dtype}
    wrapper = CustomTransformerWrapper.from_config(
        ModelConfig.complete(shape | SHAPES[case.shape], "test"),
        device="cpu", backend="native", optimizer=case.optimizer,
        optimizer_options={"max_grad_norm": 0.5}, recompute=case.recompute,
        stochastic_rounding=case.stochastic, world=world, shard=case.shard,
    )  # fmt: skip
    return wrapper, Step(
        wrapper.model, wrapper.trainable(), Source(case.row_numbers(world), case.accumulation * B),
        micro_batches=case.accumulation // world.size, world=world, gradient_sum=case.method,
        guards=[OutlierGuard(1.0, 3, torch.device("cpu"))] if case.guard else [],
    )  # fmt: skip


def train(world: World, case: Case) -> tuple[dict[str, np.ndarray], list[StepRecord], str]:
    """The weights and the whole optimizer's state (of rank 0), every step's record, a hash."""
    wrapper, step = build(world, case)
    for number in range(case.steps):
        step.poisoned = number == case.nan_at
        step.run(number, 1e-2)
    p = wrapper.model.parameters
    flats = {"weights": p.weights.to(p.wide)}
    owned = {} if p.master is None else {"master": (p.master, p.shard)}
    shards = wrapper.trainable().shards()
    owned |= {name: (flat, shards[name]) for name, flat in wrapper.trainable().state().items()}
    for name, (flat, shard) in owned.items():
        whole = p.whole(flat, shard)
        flats |= {f"{name} of {parameter}": values for parameter, values in whole.items()}
    digest = hashlib.sha256(p.weights.view(torch.uint8).numpy().tobytes()).hexdigest()
    return {name: flat.numpy().copy() for name, flat in flats.items()}, step.read(), digest


def train_all(world: World, cases: list[Case]) -> list[tuple]:
    return [train(world, case) for case in cases]


def assert_same(size: int, cases: list[Case]) -> None:
    """On every rank the weights, and on rank 0 the moments, of one process."""
    ranks = in_ranks(size, train_all, cases)
    for i, case in enumerate(cases):
        expected, records, digest = train(World.single(), case)
        assert len(records) == case.steps and any(r.applied for r in records), case
        if case.guard or case.nan_at is not None:
            assert not all(r.applied for r in records), case
        assert {rank[i][2] for rank in ranks} == {digest}, case
        assert all(str(rank[i][1]) == str(records) for rank in ranks), case  # NaN too
        found = ranks[0][i][0]
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], expected[name]) for name in expected), case


FAST = {
    2: [
        Case(shard="optimizer", guard=True),
        Case("gpt2 untied", "bfloat16", stochastic=True, shard="gradients", nan_at=1),
        Case(accumulation=6, dtype="float64", recompute="block", optimizer="sgd"),
        Case("gpt2 untied", shard="optimizer", optimizer="muon"),
        Case(dtype="bfloat16", stochastic=True, shard="gradients", optimizer="muon", nan_at=1),
    ],
    4: [
        Case("llama", "bfloat16", 8, "gradients"),
        Case("llama", "bfloat16", 4, "none", nan_at=2),
        Case("llama", "bfloat16", 4, "gradients", optimizer="muon"),
    ],
}


@pytest.mark.parametrize("size", FAST)
def test_ranks_equal_one_process(size: int) -> None:
    assert_same(size, [case._replace(steps=4 if case.guard else 3) for case in FAST[size]])


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("shard", ["none", "optimizer", "gradients"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "bfloat16 alone"])
def test_ranks_equal_one_process_all_cases(size: int, shard: str, shape: str, dtype: str) -> None:
    """10 steps of AdamW, or of Muon, one of them refused. Micro-batches that are no power of two
    only where ranks take them in order."""
    narrow, _, alone = dtype.partition(" ")
    cases = [
        Case(shape, narrow, accumulation, shard, bool(alone), recompute, nan_at=4)
        for accumulation, recompute in ((4, "none"), (8, "block"), (6, "block"), (12, "none"))
        if accumulation % size == 0 and (shard != "gradients" or accumulation in (4, 8))
    ]
    cases.append(Case(shape, narrow, 4, shard, bool(alone), optimizer="muon", nan_at=4))
    for first in range(0, len(cases), 2):  # in less than the limit of `in_ranks`
        assert_same(size, cases[first : first + 2])


@pytest.mark.parametrize(
    ("optimizer", "methods", "tolerance"),
    [
        ("sgd", ("tree", "running"), 1e-13),
        pytest.param("muon", ("tree",), 1e-10, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_ranks_other_numbers(optimizer: str, methods: tuple[str, ...], tolerance: float) -> None:
    """Three: sums in another order, the same on all ranks, and owned pieces of other sizes. Muon
    makes more of the differences, which it divides by a matrix's small singular values."""
    cases = [
        Case("gpt2", "float64", 6, shard, optimizer=optimizer, steps=3, method=method)
        for shard in ("none", "optimizer", "gradients")
        for method in methods
    ]
    ranks = in_ranks(3, train_all, cases)
    expected, records, _ = train(World.single(), cases[0])
    for i, case in enumerate(cases):
        assert len({rank[i][2] for rank in ranks}) == 1, case
        weights = ranks[0][i][0]["weights"]
        np.testing.assert_allclose(weights, expected["weights"], rtol=0, atol=tolerance)
        for found, wanted in zip(ranks[1][i][1], records, strict=True):
            assert found == pytest.approx(wanted, rel=10 * tolerance)


def gradient(case: Case) -> Tensor:
    """Of one process's first step."""
    wrapper, step = build(World.single(), case)
    step.source.load(0)
    step.gradient_sum.run(step.batch())
    return wrapper.model.parameters.gradients.double()


@pytest.mark.parametrize("accumulation", [1, 2, 3, 5, 8])
def test_tree_sum(accumulation: int) -> None:
    """Beside a plain sum in float64, which `running` is; and float32's own roundings."""
    plain = gradient(Case(dtype="float64", accumulation=accumulation, method="running"))
    tree = gradient(Case(dtype="float64", accumulation=accumulation))
    assert (tree - plain).abs().max() < 1e-15 < plain.abs().max()
    narrow = gradient(Case(accumulation=accumulation))
    assert (narrow - plain).norm() < 3e-6 * plain.norm()


def test_step_out_of_memory() -> None:
    """A step that ends early, in the buffer of another level, is followed by a whole one."""
    wrapper, step = build(World.single(), Case())
    expected, _ = build(World.single(), Case())
    original, calls = wrapper.model.forward_backward, []

    def failing(*arguments: Any, **options: Any) -> Tensor:
        calls.append(None)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("full")
        return original(*arguments, **options)

    wrapper.model.forward_backward = failing
    with pytest.raises(torch.OutOfMemoryError):
        step.run(0, 1e-2)
    ids = torch.arange(2 * T).view(2, T) % V
    for each in (wrapper, expected):
        each.model.zero_gradients()
        each.accumulate_gradients(ids, ids.roll(1, 1))
    found, wanted = (dict(each.model.named_gradients()) for each in (wrapper, expected))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("shard", ["none", "gradients"])
def test_diagnose_divided_gradients(shard: str) -> None:
    """A gradient is looked at before another block's is written over it."""
    wrapper, step = build(World(0, 2), Case(shard=shard))
    step.world = World.single()  # alone: nothing is exchanged
    step.source.load(0)
    down = wrapper.model.blocks[2].mlp.down
    original, calls = down.backward, []

    def breaking(*arguments: Any, **options: Any) -> Tensor:
        dx = original(*arguments, **options)
        calls.append(down.weight.gradient)
        if len(calls) == 1:
            down.weight.gradient[1, 2] = torch.inf
        return dx

    down.backward = breaking
    said = first_non_finite(wrapper.model, step.batch())
    assert len(calls) == 2
    assert said == "the first gradient that is not finite is that of blocks.2.mlp.down.weight"


class Stream:
    """Stands for a CUDA stream, and notes who waits for what."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.events = name, log, 0

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def record_event(self) -> str:
        self.events += 1
        return f"exchange {self.events}"


@pytest.mark.parametrize("shard", ["none", "gradients"])
def test_exchange_stream(shard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU: what would run where. An exchange follows what the backward has launched for its
    bucket, and the backward writes to no block's buffer that is still being exchanged."""
    log: list[str] = []
    wrapper, step = build(World(0, 2), Case(shard=shard, accumulation=2))
    gradients, main = step.gradient_sum, Stream("main", log)
    gradients.side = Stream("side", log)
    step.world = gradients.world = gradients.exchange.world = World.single()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    for i, block in enumerate(wrapper.model.blocks):

        def backward(*arguments: Any, i: int = i, original: Any = block.backward) -> Tensor:
            log.append(f"block {i}")
            return original(*arguments)

        block.backward = backward
    step.source.load(0)
    gradients.run(step.batch())
    aside = ["side waits for main"]
    if shard == "none":
        follows = [aside] * 5
    else:
        follows = [aside, *([*aside, f"main waits for exchange {i}"] for i in (1, 2, 3, 4))]
    blocks = [["block 2", *follows[0]], ["block 1", *follows[1]], ["block 0", *follows[2]]]
    rest = [*follows[3], *follows[4], "main waits for side"]
    assert log == [line for lines in (*blocks, rest) for line in lines]
