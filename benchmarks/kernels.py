"""Speed and memory of every operation: ours beside PyTorch's, its attention backends and Liger.

    python -m benchmarks.kernels [--only attention]

Before anything is timed, each provider's results are compared with those of
`mantrans.kernels.native` on the same tensors; one that computes something else is refused.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import ceilings, commandline, machine, operations, timing
from benchmarks.operations import Operation
from benchmarks.providers import Provider, providers
from benchmarks.records import Quantiles, Recorder, reason
from benchmarks.timing import Contender, to_milliseconds

# Relative RMS difference between two right answers: bfloat16 keeps 8 bits, and a rival rounds its
# weight gradients to it (2^-9 each, several roundings deep); float32 sums differ in their order.
TOLERANCE = {"bfloat16": 2e-2, "float32": 1e-4}
# PyTorch's layer norm sums bfloat16 weight gradients on a CPU with fewer digits than float32 has:
# 6.7e-2 away from ours, seen on 4,096 rows. It is what users get, so it is not refused.
WEIGHT_TOLERANCE = {"bfloat16": 1.5e-1, "float32": 1e-4}
MOST_SECONDS = 2.0


def cases(quick: bool) -> Iterator[Operation]:
    """The operations at the shapes that are measured on this device, most telling first."""
    if quick:
        yield from model_shapes(B=2, T=64, C=64, H=2, F=128, V=256, dtype="float32")
    elif machine.device().type == "cuda":
        yield from gpu_shapes()
    else:
        seed_sized = {"B": 16, "T": 256, "C": 256, "H": 4, "F": 512, "V": 4096}
        if machine.has_native_bfloat16():
            yield from model_shapes(**seed_sized, dtype="bfloat16")
            yield from model_shapes(B=1, T=1024, C=768, H=12, F=3072, V=50304, dtype="bfloat16")
        yield from model_shapes(**seed_sized, dtype="float32")


def model_shapes(B: int, T: int, C: int, H: int, F: int, V: int, dtype: str) -> Iterator[Operation]:
    """Each operation once, at the shape that a model of this size gives it."""
    N, P = B * T, 4 * (4 * C * C + 2 * C * F) + V * C
    yield operations.attention(B, T, H, C // H, dtype)
    yield operations.add_layer_norm(N, C, dtype)
    yield operations.cross_entropy(min(N, 1024), V, dtype)
    yield operations.linear_cross_entropy(N, C, V, dtype)
    yield operations.bias_gelu(N, F, dtype)
    yield operations.linear(N, C, 3 * C, dtype)
    yield operations.embedding(B, T, C, V, dtype)
    yield operations.adamw(P, dtype)
    yield operations.decode_attention(B, T, H, C // H, dtype)
    if dtype == "float32":
        yield operations.gradient_norm(P)


def gpu_shapes() -> Iterator[Operation]:
    """The shapes of the targets: attention to 16k, norms of GPT-2's widths, two vocabularies."""
    dtype = "bfloat16"
    for C in (768, 256, 1600):
        yield operations.add_layer_norm(32768, C, dtype)
    yield operations.cross_entropy(8192, 50304, dtype)
    yield operations.cross_entropy(32768, 4096, dtype)
    for T in (1024, 4096, 16384, 2048, 8192):
        for H, D in ((32, 64), (16, 128)):
            yield operations.attention(16384 // T, T, H, D, dtype)
    yield operations.linear_cross_entropy(16384, 768, 50304, dtype)
    yield operations.bias_gelu(32768, 3072, dtype)
    yield operations.adamw(124_475_904, dtype)
    yield operations.embedding(16, 1024, 768, 50304, dtype)
    yield operations.linear(16384, 768, 3072, dtype)
    yield operations.decode_attention(64, 1024, 12, 64, dtype)
    yield operations.gradient_norm(124_475_904)


class Prepared(NamedTuple):
    """A provider ready to be timed, and the bytes that one call of it allocates at its peak."""

    provider: Provider
    contender: Contender
    peak: int


def main() -> int:
    arguments = commandline.arguments(__doc__ or "", seconds=240)
    here = [c for c in cases(arguments.quick) if arguments.only in c.name]
    todo = [(case, direction) for case in here for direction in case.cost]
    limits = ceilings.known(arguments.output, arguments.quick)
    recorder = Recorder(arguments.output, "kernels", arguments.quick)
    budget = commandline.Budget(arguments.seconds, len(todo))
    failed = False
    for case, direction in todo:
        share = budget.next_share()
        name = f"{case.name} {direction} {case.shape} {case.dtype}"
        if share <= 0:
            print(f"{name}: not measured, the stage's time is over")
            continue
        seconds = min(share, MOST_SECONDS)
        failed |= measure(case, direction, seconds, limits, recorder, arguments.providers)
    return int(failed)


def measure(
    case: Operation,
    direction: str,
    seconds: float,
    limits: ceilings.Ceilings,
    recorder: Recorder,
    wanted: Sequence[str] = (),
) -> bool:
    """Check, time and record the providers of one case that are `wanted`, or all where nobody is
    named. True if one of ours failed."""
    torch._dynamo.reset()
    where = (direction, case.shape, case.dtype)
    prepared, our_failure = [], False
    for provider in providers(case, direction):
        if wanted and provider.name not in wanted:
            continue
        try:
            prepared.append(_prepare(provider, case, direction))
        except Exception as failure:
            note = reason(failure)
            recorder.add(case.name, provider.name, *where, "time", "ms", None, note=note)
            print(f"{case.name} {direction} {case.shape} {provider.name}: failed, {note}")
            our_failure |= provider.name in ("triton", "native", "reference")
    times = timing.compete([p.contender for p in prepared], seconds)
    cost = case.cost[direction]
    floor = limits.least_seconds(*cost, case.dtype)
    for provider, contender, peak in prepared:
        t = times[provider.name]
        direct = machine.device().type == "cuda" and contender.replay is None
        recorder.add(
            case.name, provider.name, *where, "time", "ms",
            t.map(to_milliseconds),
            tflops=cost.flops / t.p50 / 1e12, gbytes_per_s=cost.n_bytes / t.p50 / 1e9,
            fraction=floor / t.p50, note="launched one by one" if direct else None,
        )  # fmt: skip
        size = Quantiles.of([peak / 2**20])
        recorder.add(case.name, provider.name, *where, "memory", "MiB", size)
    line = ", ".join(
        f"{k} {v.p50 * 1e3:.3g}" for k, v in sorted(times.items(), key=lambda x: x[1].p50)
    )
    print(f"{case.name} {direction} {case.shape} {case.dtype} [ms]: {line}", flush=True)
    del prepared
    gc.collect()
    return our_failure


def _prepare(provider: Provider, case: Operation, direction: str) -> Prepared:
    """Check one provider and warm it up."""
    _check(provider, case, direction)
    one = timing.bytes_of(x for x in _tensors(case, 0).values() if isinstance(x, Tensor))
    calls = timing.input_sets(lambda i: provider.prepare(_tensors(case, i)), one)
    contender = Contender(provider.name, calls, capture=not provider.direct)
    contender.warm_up()
    return Prepared(provider, contender, _peak(calls[0]))


def _tensors(case: Operation, seed: int) -> operations.Tensors:
    return case.make(torch.Generator(machine.device()).manual_seed(seed))


def _check(provider: Provider, case: Operation, direction: str) -> None:
    """Raises ValueError where a result is not that of `mantrans.kernels.native`.

    Compared are results of equal shape: PyTorch's attention backends give three gradients where
    ours is packed, and a loss where ours is the gradient is left out.
    """
    import mantrans.kernels.native as oracle

    t = _tensors(case, 99)
    expected = case.forward(oracle, t)
    if direction == "backward":
        assert case.backward is not None
        expected = case.backward(oracle, t, expected)
    found = provider.prepare(_tensors(case, 99))()
    for i, (a, b) in enumerate(zip(found, expected, strict=False)):
        if a.shape != b.shape or not a.is_floating_point() or not a.numel():
            continue
        error = ((a.detach().double() - b.double()).norm() / b.double().norm()).item()
        limits = WEIGHT_TOLERANCE if i and direction == "backward" else TOLERANCE
        if not error <= limits[case.dtype]:
            raise ValueError(f"differs from native by {error:.1e} of its norm")


def _peak(call) -> int:
    """Bytes that a call allocates at its peak, results included, inputs not."""
    if machine.device().type == "cpu":
        return timing.peak_on_cpu([], call)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


if __name__ == "__main__":
    sys.exit(main())
