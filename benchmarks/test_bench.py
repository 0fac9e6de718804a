"""The small set for pytest-benchmark: `make bench`, in less than five minutes on two CPU cores.

    pytest benchmarks/test_bench.py --benchmark-autosave      then, at another commit, again, and
    pytest-benchmark compare

One model, the seed-sized one, as a whole step and operation by operation. pytest-benchmark measures
one candidate after the other, not in turns, so a difference of a few percent between them means
little here; `python -m benchmarks step` and `ops` take turns.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from benchmarks import baselines, harness, machine, operations
from benchmarks.harness import Quantiles, Recorder

B, T = 16, 256
DTYPE = "bfloat16" if machine.has_native_bfloat16() else "float32"
ROUNDS, WARM_UP = 9, 2
MEASURED = ("attention", "add_layer_norm", "bias_gelu", "linear_cross_entropy", "adamw")
OURS = "triton" if machine.on_gpu() else "native"
NAMES = (OURS, "PyTorch eager", "PyTorch fused", "torch.compile")
CASES = [
    pytest.param(case, name, id=f"{case.operation.name}-{case.direction}-{name}")
    for case in operations.model_cases(B=B, T=T, C=256, H=4, F=512, V=4096, dtype=DTYPE)
    if case.operation.name in MEASURED
    for name in NAMES
    if name in {i.name for i in operations.implementations(case)}
]
STEPS = ["triton captured" if machine.on_gpu() else "native", *baselines.BASELINES]
STEPS.remove("torch.compile reduce-overhead")


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize(("case", "name"), CASES)
def test_operation(
    case: operations.Case, name: str, benchmark: Any, recorder: Recorder | None
) -> None:
    chosen = next(i for i in operations.implementations(case) if i.name == name)
    sets = harness.input_sets(lambda seed: chosen.prepare(case.tensors(seed)), 8 << 20)
    calls = itertools.cycle(sets)
    _run(benchmark, recorder, case.where, name, lambda: next(calls)(), iterations=4)


@pytest.mark.parametrize("name", sorted(STEPS))
def test_training_step(name: str, benchmark: Any, recorder: Recorder | None) -> None:
    config = baselines.model_config("seed-sized", T)
    trainer = baselines.build(name, config, baselines.Batches(B, T), 1, DTYPE)
    numbers = itertools.count()
    where = ("training step seed-sized", "step", {"B": B, "T": T}, DTYPE)
    _run(benchmark, recorder, where, name, lambda: trainer.step(next(numbers)), iterations=1)


def _run(
    benchmark: Any, recorder: Recorder | None, where: tuple, name: str, call: Any, iterations: int
) -> None:
    """Let pytest-benchmark time a call, and record its samples."""
    benchmark.group = f"{where[0]} {where[1]}"

    def synchronized() -> None:
        call()
        if machine.on_gpu():
            torch.cuda.synchronize()

    benchmark.pedantic(synchronized, rounds=ROUNDS, warmup_rounds=WARM_UP, iterations=iterations)
    if recorder is not None and benchmark.stats is not None:
        times = Quantiles.of(1e3 * seconds for seconds in benchmark.stats.stats.data)
        recorder.add(where, name, "time", "ms", times)
