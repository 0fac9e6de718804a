"""The small set for pytest-benchmark: `make bench`, in less than five minutes on two CPU cores.

    pytest benchmarks/test_bench.py --benchmark-autosave      then, at another commit, again, and
    pytest-benchmark compare

One model, the seed-sized one, as a whole step and operation by operation. pytest-benchmark measures
one provider after the other, not in turns, so a difference of a few percent between them means
little here; `benchmarks.steps` and `benchmarks.kernels` take turns.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import machine, models, operations, timing, trainers
from benchmarks.operations import Operation
from benchmarks.providers import providers
from benchmarks.records import Quantiles, Recorder

B, T, C, H, F, V = 16, 256, 256, 4, 512, 4096
DTYPE = "bfloat16" if machine.has_native_bfloat16() else "float32"
ROUNDS, WARM_UP = 9, 2
OPERATIONS = [
    operations.attention(B, T, H, C // H, DTYPE),
    operations.add_layer_norm(B * T, C, DTYPE),
    operations.bias_gelu(B * T, F, DTYPE),
    operations.linear_cross_entropy(B * T, C, V, DTYPE),
    operations.adamw(3_200_000, DTYPE),
]
NAMES = ["native", "PyTorch eager", "PyTorch fused", "torch.compile"]
if machine.device().type == "cuda":
    NAMES.append("triton")
CASES = [
    pytest.param(operation, direction, name, id=f"{operation.name}-{direction}-{name}")
    for operation in OPERATIONS
    for direction in operation.cost
    for name in NAMES
    if (name == "PyTorch fused") == (operation.name == "adamw") or name in ("native", "triton")
    if name != "torch.compile" or operation.name != "attention"
]
STEPS = [name for name in trainers.RIVALS if "overhead" not in name]
STEPS += ["triton captured"] if machine.device().type == "cuda" else ["native"]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize(("operation", "direction", "name"), CASES)
def test_operation(
    operation: Operation, direction: str, name: str, benchmark: Any, recorder: Recorder | None
) -> None:
    provider = next(p for p in providers(operation, direction) if p.name == name)

    def prepare(seed: int) -> Callable[[], tuple]:
        generator = torch.Generator(machine.device()).manual_seed(seed)
        return provider.prepare(operation.make(generator))

    calls = itertools.cycle(timing.input_sets(prepare, 8 << 20))
    where = (operation.name, name, direction, operation.shape, operation.dtype)
    _run(benchmark, recorder, where, lambda: next(calls)(), iterations=4)


@pytest.mark.parametrize("name", sorted(STEPS))
def test_training_step(name: str, benchmark: Any, recorder: Recorder | None) -> None:
    config = models.model_config("seed-sized", T)
    trainer = trainers.build(name, config, models.Batches(B, T), 1, DTYPE)
    numbers = itertools.count()
    where = ("training step seed-sized", name, "step", {"B": B, "T": T}, DTYPE)
    _run(benchmark, recorder, where, lambda: trainer.step(next(numbers)), iterations=1)


def _run(
    benchmark: Any, recorder: Recorder | None, where: tuple, call: Callable, iterations: int
) -> None:
    """Let pytest-benchmark time a call, and record its samples."""
    operation, name, direction, shape, dtype = where
    benchmark.group = f"{operation} {direction}"

    def synchronized() -> None:
        call()
        if machine.device().type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(synchronized, rounds=ROUNDS, warmup_rounds=WARM_UP, iterations=iterations)
    if recorder is not None and benchmark.stats is not None:
        times = Quantiles.of(1e3 * seconds for seconds in benchmark.stats.stats.data)
        recorder.add(operation, name, direction, shape, dtype, "time", "ms", times)
