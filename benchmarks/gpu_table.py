"""The figures of a GPU run beside the bars they must pass: `python -m benchmarks.gpu_table FOLDER`.

The bars are the project's own, set before anything was measured (docs/performance-log.md has the
predictions, and results beside them). A figure that is not there is "not measured", never a pass.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks import records
from benchmarks.records import Row

OURS_KERNEL, OURS_STEP = "triton", "triton captured"


class Line(NamedTuple):
    """One line of the table: a figure and what it must reach; bar 0: there is an aim only."""

    what: str
    value: float | None
    unit: str
    bar: float
    aim: float
    least_is_best: bool = False

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        sign = -1 if self.least_is_best else 1
        if sign * self.value >= sign * self.aim:
            return "aim reached"
        if not self.bar:
            return "below the aim"
        return "bar reached" if sign * self.value >= sign * self.bar else "MISSED"


class Found:
    """The newest rows of a folder, by what they measure."""

    def __init__(self, folder: Path) -> None:
        self.rows = [row for row in records.newest(records.load(folder)) if row.p50 is not None]

    def row(self, operation: str, direction: str, provider: str, metric: str, **shape: int):
        """The row, or None. `shape` names the dimensions that tell cases apart."""
        for row in self.rows:
            key = (row.operation, row.direction, row.provider, row.metric)
            if key == (operation, direction, provider, metric) and _has(row, shape):
                return row
        return None

    def time(self, operation: str, direction: str, provider: str, **shape: int) -> float | None:
        """Milliseconds of one call."""
        row = self.row(operation, direction, provider, "time", **shape)
        return row and row.p50

    def ratio(
        self, operation: str, direction: str, ours: str, theirs: str, metric: str, **shape: int
    ) -> float | None:
        """Their figure over ours."""
        a = self.row(operation, direction, theirs, metric, **shape)
        b = self.row(operation, direction, ours, metric, **shape)
        return a.p50 / b.p50 if a and b else None

    def share_of_copy(self, operation: str, direction: str, **shape: int) -> float | None:
        """Our kernel's traffic over the copy bandwidth of the same machine, in percent."""
        row = self.row(operation, direction, OURS_KERNEL, "time", **shape)
        copy = self.row("copy", "forward", "PyTorch", "rate")
        return 100 * row.gbytes_per_s / copy.p50 if row and copy else None


def _has(row: Row, shape: dict[str, int]) -> bool:
    return all(row.shape.get(name.replace("_", "-")) == size for name, size in shape.items())


def kernel_lines(found: Found) -> Iterator[Line]:
    """Attention beside PyTorch's backends; norms and loss beside the copy bandwidth."""
    for direction in ("forward", "backward"):
        for D in (64, 128):
            for T in (1024, 2048, 4096, 8192, 16384):
                for rival, bar, aim in (("SDPA flash", 1.0, 1.0), ("SDPA cuDNN", 0.0, 1.0)):
                    value = found.ratio(
                        "attention", direction, OURS_KERNEL, rival, "time", T=T, D=D
                    )
                    yield Line(f"attention {direction} T={T} D={D}", value, f"x {rival}", bar, aim)
    for direction, bar, aim in (("forward", 85, 92), ("backward", 70, 85)):
        for C in (256, 768, 1600):
            share = found.share_of_copy("add_layer_norm", direction, C=C)
            yield Line(f"add_layer_norm {direction} C={C}", share, "% of copy", bar, aim)
    for V in (4096, 50304):
        share = found.share_of_copy("cross_entropy", "forward+backward", V=V)
        yield Line(f"cross_entropy V={V}", share, "% of copy", 85, 92)


def step_lines(found: Found) -> Iterator[Line]:
    """Whole training steps, without accumulation."""
    gpt2 = ("training step GPT-2 124M", "step"), {"B": 16, "T": 1024, "micro_batches": 1}
    small = ("training step seed-sized", "step"), {"B": 64, "T": 256, "micro_batches": 1}

    def speed(case: tuple, unit: float) -> float | None:
        what, shape = case
        ms = found.time(*what, OURS_STEP, **shape)
        return shape["B"] * shape["T"] / ms * 1e3 / unit if ms else None

    def beside(case: tuple, rival: str, metric: str = "time") -> float | None:
        what, shape = case
        return found.ratio(*what, OURS_STEP, rival, metric, **shape)

    yield Line("GPT-2 124M step", speed(gpt2, 1e3), "k tokens/s", 600, 700)
    yield Line("GPT-2 124M step", beside(gpt2, "torch.compile"), "x torch.compile", 1.25, 1.25)
    yield Line("seed-sized step", speed(small, 1e6), "M tokens/s", 0, 10)
    yield Line("seed-sized step", beside(small, "PyTorch eager"), "x PyTorch eager", 5, 5)
    rival = "torch.compile reduce-overhead"
    yield Line("seed-sized step", beside(small, rival), "x reduce-overhead", 1.3, 1.3)
    share = beside(gpt2, "torch.compile", "memory")
    share = 1 / share if share else None
    yield Line("GPT-2 124M peak memory", share, "of torch.compile's", 0.7, 0.5, True)


def text_of(line: Line) -> str:
    value = "-" if line.value is None else f"{line.value:.2f}"
    bar = f"{line.bar:g}" if line.bar else "-"
    return f"{line.what:38}{value:>9} {line.unit:20}{bar:>7}{line.aim:>7g}  {line.verdict}".rstrip()


def main() -> None:
    folder = Path(sys.argv[1])
    outcomes = folder / "suite.json"
    if outcomes.exists():
        for stage in json.loads(outcomes.read_text(encoding="utf-8")):
            note = f"  {stage['note']}" if stage["note"] else ""
            print(f"{stage['stage']:10}{stage['outcome']:12}{stage['seconds']:>4} s{note}")
        print()
    found = Found(folder)
    for row in found.rows:
        if row.stage == "ceilings":
            print(f"ceiling: {row.operation} {row.dtype} {row.p50:,.0f} {row.unit}")
    print(f"\n{'what':38}{'measured':>9} {'':20}{'bar':>7}{'aim':>7}")
    for line in [*kernel_lines(found), *step_lines(found)]:
        print(text_of(line))


if __name__ == "__main__":
    main()
