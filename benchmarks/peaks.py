"""What this machine can do at most, measured: copying memory, and multiplying matrices.

All fractions in the results are of these, not of a data sheet. Copying counts bytes read plus bytes
written; a product of (n, n) matrices counts 2 n³ operations.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import harness, machine
from benchmarks.harness import Candidate, Recorder

COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
PRODUCT_SIZE = {"cpu": 2048, "cuda": 8192}
DTYPES = ("bfloat16", "float32")


class Peaks(NamedTuple):
    """bytes_per_s of a copy; flops_per_s of a matrix product by the dtype of its inputs."""

    bytes_per_s: float
    flops_per_s: dict[str, float]

    def least_seconds(self, flops: float, n_bytes: float, dtype: str) -> float:
        """The time below which no program gets: the slower of arithmetic and traffic."""
        return max(flops / self.flops_per_s[dtype], n_bytes / self.bytes_per_s)


def main(arguments: Namespace) -> int:
    """`python -m benchmarks peaks`."""
    found = measure(Recorder(arguments.output, "peaks", arguments.quick), arguments.seconds)
    products = ", ".join(f"{k} {v / 1e12:.2f} TFLOP/s" for k, v in found.flops_per_s.items())
    print(f"{machine.device_name()}: copy {found.bytes_per_s / 1e9:.1f} GB/s; products {products}")
    return 0


def measure(recorder: Recorder, seconds: float) -> Peaks:
    """Measure both on `machine.device()` and record them."""
    kind = machine.device().type
    n_bytes = COPY_BYTES[kind] >> 4 * recorder.quick
    n = PRODUCT_SIZE[kind] >> 2 * recorder.quick
    candidates = [_copy(n_bytes), *(_product(n, dtype) for dtype in DTYPES)]
    for candidate in candidates:
        candidate.warm_up()
    times = harness.compete(candidates, seconds)
    copy = times["copy"].map(lambda t: 2 * n_bytes / t / 1e9)
    recorder.add(("copy", "forward", {"bytes": n_bytes}, "uint8"), "PyTorch", "rate", "GB/s", copy)
    flops_per_s = {}
    for dtype in DTYPES:
        rate = times[dtype].map(lambda t: 2 * n**3 / t / 1e12)
        case = ("matrix product", "forward", {"M": n, "N": n, "K": n}, dtype)
        recorder.add(case, "PyTorch", "rate", "TFLOP/s", rate)
        flops_per_s[dtype] = rate.p50 * 1e12
    return Peaks(copy.p50 * 1e9, flops_per_s)


def _copy(n_bytes: int) -> Candidate:
    source = torch.randint(0, 255, (n_bytes,), dtype=torch.uint8, device=machine.device())
    target = torch.empty_like(source)
    return Candidate("copy", [lambda: target.copy_(source)])


def _product(n: int, dtype: str) -> Candidate:
    """In float32 the product is a full one: PyTorch's default, no TF32."""
    options = {"dtype": getattr(torch, dtype), "device": machine.device()}
    a, b, out = (torch.randn(n, n, **options) for _ in range(3))
    return Candidate(dtype, [lambda: torch.mm(a, b, out=out)])


def known(output: Path, quick: bool = False) -> Peaks:
    """This device's newest recorded peaks; measured now, in a few seconds, if there are none."""
    rows = harness.newest(harness.load(output), quick)
    here = [r for r in rows if r.stage == "peaks" and r.quick == quick]
    rates = {r.dtype: r.p50 for r in here if r.device == machine.device_name() and r.p50}
    if not {"uint8", *DTYPES} <= rates.keys():
        return measure(Recorder(output, "peaks", quick), 3)
    return Peaks(rates["uint8"] * 1e9, {dtype: rates[dtype] * 1e12 for dtype in DTYPES})
