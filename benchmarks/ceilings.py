"""The two ceilings of this machine, measured: copying memory, and multiplying matrices.

    python -m benchmarks.ceilings

All fractions in the results are of these, not of a data sheet. Copying counts bytes read plus bytes
written; a product of (n, n) matrices counts 2 n³ operations.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import commandline, machine, records
from benchmarks.records import Recorder
from benchmarks.timing import Contender, compete

COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
PRODUCT_SIZE = {"cpu": 2048, "cuda": 8192}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Ceilings(NamedTuple):
    """bytes_per_s of a copy; flops_per_s of a matrix product by the dtype of its inputs."""

    bytes_per_s: float
    flops_per_s: dict[str, float]

    def least_seconds(self, flops: float, n_bytes: float, dtype: str) -> float:
        """The time below which no program gets: the slower of arithmetic and traffic."""
        return max(flops / self.flops_per_s[dtype], n_bytes / self.bytes_per_s)


def measure(recorder: Recorder, seconds: float) -> Ceilings:
    """Measure both ceilings on `machine.device()` and record them."""
    kind = machine.device().type
    n_bytes = COPY_BYTES[kind] >> 4 * recorder.quick
    size = PRODUCT_SIZE[kind] >> 2 * recorder.quick
    contenders = [_copy(n_bytes)] + [_product(size, name) for name in DTYPES]
    for contender in contenders:
        contender.warm_up()
    times = compete(contenders, seconds)
    rates = {}
    for name, work in {"copy": 2 * n_bytes, **dict.fromkeys(DTYPES, 2 * size**3)}.items():
        is_copy = name == "copy"
        t, scale = times[name], 1e9 if is_copy else 1e12
        rate = t.map(lambda s, work=work, scale=scale: work / s / scale)
        rates[name] = rate.p50 * scale
        recorder.add(
            "copy" if is_copy else "matrix product", "PyTorch", "forward",
            {"bytes": n_bytes} if is_copy else {"M": size, "N": size, "K": size},
            "uint8" if is_copy else name, "rate", "GB/s" if is_copy else "TFLOP/s", rate,
        )  # fmt: skip
    return Ceilings(rates.pop("copy"), rates)


def _copy(n_bytes: int) -> Contender:
    source = torch.randint(0, 255, (n_bytes,), dtype=torch.uint8, device=machine.device())
    target = torch.empty_like(source)
    return Contender("copy", [lambda: target.copy_(source)])


def _product(size: int, dtype: str) -> Contender:
    """In float32 the product is a full one: PyTorch's default, no TF32."""
    a, b, out = (
        torch.randn(size, size, dtype=DTYPES[dtype], device=machine.device()) for _ in range(3)
    )
    return Contender(dtype, [lambda: torch.mm(a, b, out=out)])


def known(output: Path, quick: bool = False) -> Ceilings:
    """This device's newest recorded ceilings; measured now, in a few seconds, if there are none."""
    here = [r for r in records.newest(records.load(output), quick) if r.stage == "ceilings"]
    here = [r for r in here if r.device == machine.device_name() and r.quick == quick]
    rates = {r.dtype: r.p50 for r in here if r.p50 is not None}
    if "uint8" not in rates or not DTYPES.keys() <= rates.keys():
        return measure(Recorder(output, "ceilings", quick), 3)
    return Ceilings(rates.pop("uint8") * 1e9, {k: v * 1e12 for k, v in rates.items()})


def main() -> None:
    arguments = commandline.arguments(__doc__ or "", seconds=10)
    found = measure(Recorder(arguments.output, "ceilings", arguments.quick), arguments.seconds)
    products = ", ".join(f"{k} {v / 1e12:.2f} TFLOP/s" for k, v in found.flops_per_s.items())
    print(f"{machine.device_name()}: copy {found.bytes_per_s / 1e9:.1f} GB/s; products {products}")


if __name__ == "__main__":
    main()
