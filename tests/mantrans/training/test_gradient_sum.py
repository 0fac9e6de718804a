"""Ranks add up the same bits as one process: real processes over gloo, on loopback."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from mantrans.config import ModelConfig
from mantrans.distributed.world import World
from mantrans.kernels.reference import IGNORE_INDEX
from mantrans.optim.guards import OutlierGuard
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
    flats = {"weights": p.weights.float()}
    owned = {"master": p.master, **wrapper.trainable().state()}
    for name, flat in owned.items():
        if flat is not None:
            whole = flat if p.divided == "none" else p.shard.whole(flat)
            if whole is not None:
                flats[name] = whole
    digest = hashlib.sha256(p.weights.view(torch.uint8).numpy().tobytes()).hexdigest()
    return {name: flat.numpy().copy() for name, flat in flats.items()}, step.read(), digest


def assert_same(size: int, case: Case) -> None:
    """On every rank the weights, and on rank 0 the moments, of one process."""
    expected, records, digest = train(World.single(), case)
    results = in_ranks(size, train, case)
    assert {result[2] for result in results} == {digest}
    assert all(str(result[1]) == str(records) for result in results)  # equal or NaN
    assert results[0][0].keys() == expected.keys()
    for name, flat in expected.items():
        assert np.array_equal(results[0][0][name], flat), name


FAST = [
    (2, Case()),
    (4, Case(shape="llama", dtype="bfloat16", accumulation=8, shard="gradients")),
    (2, Case(shape="gpt2 untied", dtype="bfloat16", stochastic=True, shard="optimizer")),
    (2, Case(accumulation=6, dtype="float64", recompute="block", optimizer="sgd")),
]


@pytest.mark.parametrize(("size", "case"), FAST, ids=str)
def test_ranks_equal_one_process(size: int, case: Case) -> None:
    assert_same(size, case)
