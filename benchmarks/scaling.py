"""How a training step's time and memory grow with T, C, the number of blocks, and V.

    python -m benchmarks.scaling

One dimension is varied, the others stay at the base. The expected exponent is that of the counted
operations (`mantrans.training.flops`) and of the predicted peak (`mantrans.training.memory`) over
the same sizes: both are sums of terms of several degrees, so a whole number is not expected.
"""

from __future__ import annotations

import gc
import itertools
import math
import sys
from collections.abc import Sequence

import torch

from benchmarks import commandline, machine, timing, trainers
from benchmarks.models import Batches
from benchmarks.records import Quantiles, Recorder
from benchmarks.timing import Contender, to_milliseconds
from mantrans.config import Config, ModelConfig
from mantrans.training import flops, memory

HEAD_WIDTH = 64
WARM_UP_STEPS = 2
Shape = dict[str, int]
CPU_BASE = {"B": 4, "T": 256, "C": 256, "blocks": 4, "V": 4096}
CPU_SIZES: dict[str, tuple[int, ...]] = {
    "T": (128, 256, 512, 1024, 2048),
    "C": (128, 256, 512, 1024),
    "blocks": (2, 4, 8, 16),
    "V": (4096, 8192, 16384, 32768),
}
GPU_BASE = {"B": 8, "T": 1024, "C": 768, "blocks": 12, "V": 50304}
GPU_SIZES: dict[str, tuple[int, ...]] = {
    "T": (512, 1024, 2048, 4096, 8192),
    "C": (384, 768, 1536),
    "blocks": (6, 12, 24),
    "V": (8192, 16384, 50304, 131072),
}
QUICK_BASE = {"B": 1, "T": 16, "C": 64, "blocks": 1, "V": 4096}
QUICK_SIZES: dict[str, tuple[int, ...]] = {"T": (16, 32), "blocks": (1, 2)}


def operation(dimension: str) -> str:
    return f"training step against {dimension}"


def model_config(shape: Shape) -> ModelConfig:
    """The model of a shape: heads of 64, feed-forward 4 C."""
    return ModelConfig(
        d_model=shape["C"], n_blocks=shape["blocks"], n_heads=shape["C"] // HEAD_WIDTH,
        max_seq_len=shape["T"], vocab_size=shape["V"],
    )  # fmt: skip


def expected(shape: Shape, dtype: str, device_type: str) -> tuple[float, float]:
    """(operations, bytes at the peak) of our step, by the mathematics."""
    model = model_config(shape)
    training = {"max_steps": 1, "batch_size": shape["B"]}
    config = Config.from_dict({"model": model.model_dump(), "training": training})
    work = flops.flops_per_token(model, shape["T"]) * shape["B"] * shape["T"]
    peak = memory.predict(config, getattr(torch, dtype), device_type).total
    return work, float(peak)


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The slope of log cost over log size, by least squares: cost ~ size^slope."""
    x, y = ([math.log(v) for v in values] for values in (sizes, costs))
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True))
    return above / sum((a - x_mean) ** 2 for a in x)


def main() -> int:
    arguments = commandline.arguments(__doc__ or "", seconds=120)
    on_gpu = machine.device().type == "cuda"
    base, sizes = (GPU_BASE, GPU_SIZES) if on_gpu else (CPU_BASE, CPU_SIZES)
    if arguments.quick:
        base, sizes = QUICK_BASE, QUICK_SIZES
    todo = [(d, {**base, d: n}) for d, ns in sizes.items() if arguments.only in d for n in ns]
    dtype = "bfloat16" if machine.has_native_bfloat16() else "float32"
    providers = ["triton captured" if on_gpu else "native", "PyTorch eager"]
    recorder = Recorder(arguments.output, "scaling", arguments.quick)
    budget = commandline.Budget(arguments.seconds, len(todo))
    for dimension, shape in todo:
        share = budget.next_share()
        if share <= 0:
            print(f"{dimension} {shape}: not measured, the stage's time is over")
            continue
        measure(dimension, shape, dtype, providers, share / 2, recorder)
    return 0


def measure(
    dimension: str,
    shape: Shape,
    dtype: str,
    providers: Sequence[str],
    seconds: float,
    recorder: Recorder,
) -> None:
    """Time and record one size."""
    config, batches = model_config(shape), Batches(shape["B"], shape["T"])
    contenders, peaks = [], {}
    for name in providers:
        contender, peaks[name] = _prepare(name, config, batches, dtype)
        contenders.append(contender)
    times = timing.compete(contenders, seconds)
    where = ("step", shape, dtype)
    for name, t in times.items():
        q = t.map(to_milliseconds)
        recorder.add(operation(dimension), name, *where, "time", "ms", q)
        size = Quantiles.of([peaks[name] / 2**20])
        recorder.add(operation(dimension), name, *where, "memory", "MiB", size)
        print(f"{dimension} {shape} {name}: {q.p50:.1f} ms, {size.p50:.0f} MiB", flush=True)
    del contenders
    gc.collect()


def _prepare(name: str, config: ModelConfig, batches: Batches, dtype: str) -> tuple[Contender, int]:
    """A warmed-up contender, and the bytes at its peak."""
    on_gpu = machine.device().type == "cuda"
    before = 0
    if on_gpu:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    trainer = trainers.build(name, config, batches, 1, dtype)
    numbers = itertools.count()
    for _ in range(WARM_UP_STEPS):
        trainer.step(next(numbers))
    if on_gpu:
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        peak = timing.peak_on_cpu(trainer.resident(), lambda: trainer.step(next(numbers)))
    contender = Contender(name, [lambda: trainer.step(next(numbers))], capture=False)
    contender.warm_up()
    return contender, peak


if __name__ == "__main__":
    sys.exit(main())
