"""What is kept of a measurement: one row of JSON, with all that is needed to doubt it.

    benchmarks/results/<device>/<stage>.jsonl      rows are appended, and never changed

A row's `run` is the moment its program started. Rows of one run were measured side by side, in
interleaved rounds; those of different runs were not, and `newest` keeps them apart.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks import machine

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Quantiles:
    """The 20th, 50th and 80th percentile of `rounds` samples."""

    p20: float
    p50: float
    p80: float
    rounds: int

    @classmethod
    def of(cls, samples: Iterable[float]) -> Quantiles:
        """Of at least one sample; the nearest sample at each rank."""
        ordered = sorted(samples)
        last = len(ordered) - 1
        p20, p50, p80 = (ordered[round(share * last)] for share in (0.2, 0.5, 0.8))
        return cls(p20, p50, p80, len(ordered))

    def map(self, function: Callable[[float], float]) -> Quantiles:
        """Of the samples in another unit; a falling function turns them round."""
        low, middle, high = sorted(function(x) for x in (self.p20, self.p50, self.p80))
        return Quantiles(low, middle, high, self.rounds)


@dataclass(frozen=True)
class Row:
    """One metric of one provider at one shape.

    stage         ceilings, kernels, steps, scaling or bench: the program that measured it
    operation     the operation's name in `kernels`, or "training step <model>"
    provider      whose implementation: triton, native, reference, PyTorch eager, ...
    direction     forward, backward, forward+backward, update or step
    shape         dimension -> size, in the letters of the house
    metric, unit  "time" in ms, "memory" in MiB, "rate" in TFLOP/s or GB/s, "loss difference"
    p20, p50, p80, rounds    of the samples; None where the provider failed, and `note` says how
    tflops, gbytes_per_s     the operation's least arithmetic and least traffic over the p50 time
    fraction      the time that the measured ceilings allow, over the p50 time: 1 is the roofline
    quick         a smoke run: never shown as a result
    """

    stage: str
    operation: str
    provider: str
    direction: str
    shape: dict[str, int]
    dtype: str
    metric: str
    unit: str
    p20: float | None
    p50: float | None
    p80: float | None
    rounds: int
    tflops: float | None = None
    gbytes_per_s: float | None = None
    fraction: float | None = None
    note: str | None = None
    quick: bool = False
    run: str = ""
    device: str = ""
    versions: dict[str, str | None] = field(default_factory=dict)
    commit: str | None = None
    date: str = ""

    @property
    def case(self) -> tuple:
        """What is compared: rows of one case differ in their provider only."""
        shape = tuple(self.shape.items())
        return self.device, self.stage, self.operation, self.direction, shape, self.dtype

    @property
    def size(self) -> str:
        """The shape as text: "B=16 T=256"."""
        return " ".join(f"{name}={value}" for name, value in self.shape.items())


class Recorder:
    """Appends a stage's rows to its file under `output`, completed with where and when."""

    def __init__(self, output: Path, stage: str, quick: bool = False) -> None:
        self.stage, self.quick = stage, quick
        self.run = _now()
        self.path = output / machine.slug(machine.device_name()) / f"{stage}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def add(
        self,
        operation: str,
        provider: str,
        direction: str,
        shape: dict[str, int],
        dtype: str,
        metric: str,
        unit: str,
        quantiles: Quantiles | None,
        **more: Any,
    ) -> Row:
        """Write one row; quantiles None records a failure, which `note` must explain."""
        values = dataclasses.asdict(quantiles) if quantiles else _NOTHING
        row = Row(
            stage=self.stage, operation=operation, provider=provider, direction=direction,
            shape=shape, dtype=dtype, metric=metric, unit=unit, **values, quick=self.quick,
            run=self.run, device=machine.device_name(), versions=machine.versions(),
            commit=machine.commit(), date=_now(), **more,
        )  # fmt: skip
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(row)) + "\n")
        return row


_NOTHING = {"p20": None, "p50": None, "p80": None, "rounds": 0}


def reason(failure: Exception) -> str:
    """A failure as one line for `Row.note`: its kind, its first line, and its cause's."""
    chain = [failure, *filter(None, [failure.__cause__])]
    told = [f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:200]}" for e in chain]
    return ", because of ".join(told)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def load(folder: Path) -> list[Row]:
    """All rows under a folder of results, in the order in which they were written."""
    rows = []
    for path in sorted(folder.glob("*/*.jsonl")):
        with path.open(encoding="utf-8") as file:
            rows += [Row(**json.loads(line)) for line in file]
    return rows


def newest(rows: Iterable[Row], quick: bool = False) -> list[Row]:
    """Of every case the rows of the last run that measured it. Smoke runs count only if `quick`."""
    runs: dict[tuple, str] = {}
    rows = [row for row in rows if quick or not row.quick]
    for row in rows:
        runs[row.case] = max(runs.get(row.case, ""), row.run)
    return [row for row in rows if row.run == runs[row.case]]
