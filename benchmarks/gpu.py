"""Everything that only a GPU can prove or measure, in one command of less than nine minutes.

    python -m benchmarks gpu [STAGE ...] --output OUT

Needs torch, triton, numpy, pytest, transformers and tokenizers; no network, nothing is installed.
Into the folder OUT go suite.log (what every stage printed), suite.json (each stage's outcome and
seconds), <device>/<stage>.jsonl (every measurement) and, last, table.txt: the figures beside the
project's own minimum and target, which were set before anything was measured. A figure that is not
there is "not measured", never a pass.

A stage ends at its deadline whatever it is doing. What an earlier stage leaves of its time is the
next one's; what it would like beyond its own is never taken from those that follow. The exit status
is 0 if all passed, 1 if a stage failed or ran out of time, 2 for wrong arguments, 3 without a GPU:
then nothing is run and OUT is not touched.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import torch

from benchmarks import harness
from benchmarks.harness import RESULTS, Measurement

ROOT = Path(__file__).parents[1]
PASSED, FAILED, OUT_OF_TIME = "passed", "failed", "out of time"
SANITIZER = "/usr/local/cuda/bin/compute-sanitizer"
PTXAS = "/usr/local/cuda/bin/ptxas"
TESTS_OF_KERNELS = "tests/gpu/test_gpu_kernels.py"
GPU_TESTS = ("step", "model", "memory", "resume", "selfcheck")
# What the table asks for. All others are measured by `ops` and `step`, which take
# longer than a suite may.
OPERATIONS_AGAINST = "SDPA flash,SDPA cuDNN"
STEPS = (
    ("GPT-2 124M B=16 T=1024 micro-batches=1 ", "torch.compile"),
    ("seed-sized B=64 T=256 micro-batches=1 ", "torch.compile reduce-overhead"),
)


class Stage(NamedTuple):
    """seconds: what it can count on. run: (bench, log) -> note; raises Trouble."""

    name: str
    seconds: int
    meaning: str
    run: Callable[[Bench], str]


class Trouble(Exception):
    """A stage's outcome, if not `PASSED`, and a note about it."""

    def __init__(self, outcome: str, note: str = "") -> None:
        super().__init__(outcome, note)
        self.outcome, self.note = outcome, note


class Bench(NamedTuple):
    """What a stage works with: the folder of results, its log, its end (`time.monotonic`)."""

    output: Path
    log: IO[str]
    end: float

    @property
    def left(self) -> int:
        """Seconds until the deadline, at least 1."""
        return max(1, int(self.end - time.monotonic()))

    def start(self, *command: str, log: IO[str] | None = None, **environment: str):
        """Start a program in the repository's root."""
        told = {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        return subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log or self.log,
            stderr=subprocess.STDOUT, env={**os.environ, **told, **environment},
            start_new_session=True,
        )  # fmt: skip

    def wait(self, *processes: subprocess.Popen) -> list[int]:
        """Their exit statuses; at the deadline all are killed. Raises Trouble."""
        try:
            return [process.wait(self.left) for process in processes]
        except subprocess.TimeoutExpired:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, 9)
                    process.wait()
            raise Trouble(OUT_OF_TIME) from None

    def python(self, *arguments: str) -> None:
        """Run a module or script; raises Trouble if it fails."""
        if any(self.wait(self.start(sys.executable, *arguments))):
            raise Trouble(FAILED)

    def measure(self, command: str, seconds: float, *options: str) -> None:
        """Run `python -m benchmarks command`."""
        limits = ("--output", str(self.output), "--seconds", str(int(seconds)))
        self.python("-m", "benchmarks", command, *limits, *options)

    def tests(self, most: int, *files: str, **environment: str) -> str:
        """Split the tests among as many processes as there are cores, at most `most`: nearly all of
        their time is compiling. Returns the counts."""
        n = min(os.cpu_count() or 1, most)
        with tempfile.TemporaryDirectory() as folder:
            logs = [(Path(folder) / str(i)).open("w+", encoding="utf-8") for i in range(n)]
            options = ("-p", "no:cacheprovider", "-o", "addopts=", "-v", "-rfE", "--tb=short")
            processes = [
                self.start(
                    sys.executable, "-m", "pytest", "-p", "tests.gpu.share", "--share", f"{i}/{n}",
                    *options, "--maxfail=20", *files, log=log, **environment,
                )
                for i, log in enumerate(logs)
            ]  # fmt: skip
            try:
                statuses = self.wait(*processes)
            finally:
                texts = [_text_of(log) for log in logs]
                for i, text in enumerate(texts):
                    self.log.write(f"--- process {i} of {n}\n{text[-20000:]}\n")
        note = summed_counts(texts)
        if any(status not in (0, 5) for status in statuses):  # 5: no test fell to this process
            raise Trouble(FAILED, note)
        return note


def _text_of(log: IO[str]) -> str:
    with log:
        log.seek(0)
        return log.read()


def summed_counts(texts: Sequence[str]) -> str:
    """pytest's last lines, added up: "514 passed, 2 skipped"."""
    counts: Counter[str] = Counter()
    for text in texts:
        last = (text.strip().splitlines() or [""])[-1]
        for number, outcome in re.findall(r"(\d+) (passed|failed|skipped|error)", last):
            counts[outcome] += int(number)
    return ", ".join(f"{number} {outcome}" for outcome, number in counts.items())


# ------------------------------------------------------------------------------------ the stages


def machine(bench: Bench) -> str:
    bench.wait(bench.start("nvidia-smi"))
    bench.python("-c", "from benchmarks import machine; print(machine.versions())")
    bench.measure("peaks", 5)
    return ""


def parity(bench: Bench) -> str:
    return bench.tests(14, TESTS_OF_KERNELS)


def ptxas(bench: Bench) -> str:
    """Parity again, with the toolkit's assembler instead of that in Triton's wheel: each version
    has its own faults (see `kernels.selfcheck.GOOD_PTXAS`)."""
    other = shutil.which("ptxas") or shutil.which(PTXAS)
    if other is None:
        return "no ptxas but Triton's is installed"
    return bench.tests(14, TESTS_OF_KERNELS, TRITON_PTXAS_PATH=other)


def step(bench: Bench) -> str:
    return bench.tests(6, *(f"tests/gpu/test_gpu_{name}.py" for name in GPU_TESTS))


def sanitizer(bench: Bench) -> str:
    """Compiled outside the checker, a part in each process; and every tensor an allocation of its
    own, so that one element too far is seen."""
    checker = shutil.which("compute-sanitizer") or shutil.which(SANITIZER)
    if checker is None:
        return "compute-sanitizer is not installed"
    shapes = (sys.executable, "-m", "tests.gpu.small_shapes")
    parts = subprocess.check_output((*shapes, "--list"), cwd=ROOT, text=True).split()
    if any(bench.wait(*(bench.start(*shapes, part) for part in parts))):
        raise Trouble(FAILED)
    common = ("--error-exitcode", "9", "--print-limit", "20")
    tools = [("memcheck", "--report-api-errors", "no"), ("racecheck",)]
    with tempfile.TemporaryDirectory() as folder:
        logs = [(Path(folder) / tool[0]).open("w+", encoding="utf-8") for tool in tools]
        try:
            statuses = bench.wait(
                *(
                    bench.start(checker, "--tool", *tool, *common, *shapes, log=log,
                                PYTORCH_NO_CUDA_MEMORY_CACHING="1")
                    for tool, log in zip(tools, logs, strict=True)
                )
            )  # fmt: skip
        finally:
            texts = [_text_of(log) for log in logs]
            bench.log.writelines(texts)
    note = "; ".join(re.findall(r"[A-Z]* SUMMARY.*", "\n".join(texts)))
    if any(statuses):
        raise Trouble(FAILED, note)
    return note


def speed(bench: Bench) -> str:
    bench.measure("ops", bench.left * 3 / 4, "--against", OPERATIONS_AGAINST)
    return ""


def training(bench: Bench) -> str:
    for share, (only, against) in zip((0.6, 0.9), STEPS, strict=True):
        bench.measure("step", bench.left * share, "--only", only, "--against", against)
    return ""


STAGES = (
    Stage("machine", 25, "versions; measured peaks: copy, bf16 and fp32 products", machine),
    Stage("parity", 100, "each kernel against float64 and PyTorch's; repeated bits", parity),
    Stage("step", 65, "captured = eager, gradients, memory, exact resume, self-check", step),
    Stage("sanitizer", 60, "compute-sanitizer on small shapes, where it is installed", sanitizer),
    Stage("speed", 80, "each operation's speed beside PyTorch's", speed),
    Stage("training", 200, "training steps: speed and peak memory", training),
)
# Run only if named: beside the others it would take more than nine minutes.
ON_REQUEST = (
    Stage("ptxas", 300, "parity with the CUDA toolkit's ptxas, where one is installed", ptxas),
)


# ---------------------------------------------------------------------------------- the sequence


def main(arguments: Namespace) -> int:
    """`python -m benchmarks gpu`; see the module's text for the exit status."""
    names = [stage.name for stage in STAGES + ON_REQUEST]
    unknown = [name for name in arguments.stages if name not in names]
    if unknown or arguments.output == RESULTS:
        print(
            f"stage: expected {' | '.join(names)}, got {unknown[0]}" if unknown
            else "--output: expected a folder, got none",
            file=sys.stderr,
        )  # fmt: skip
        return 2
    if not torch.cuda.is_available():
        print(f"no GPU: torch {torch.__version__} sees none; nothing was run", file=sys.stderr)
        return 3
    by_default = [stage.name for stage in STAGES]
    chosen = [s for s in STAGES + ON_REQUEST if s.name in (arguments.stages or by_default)]
    return run(chosen, arguments.output, arguments.seconds)


def run(stages: Sequence[Stage], output: Path, seconds: float) -> int:
    """Run stages one after the other and write the table. Returns 0 if all passed, else 1."""
    output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    scale = min(1.0, seconds / sum(stage.seconds for stage in STAGES))
    outcomes: list[dict] = []
    with (output / "suite.log").open("w", encoding="utf-8") as log:
        for place, stage in enumerate(stages):
            reserved = scale * sum(later.seconds for later in stages[place + 1 :])
            begin = time.monotonic()
            outcome, note = _outcome(stage, Bench(output, log, end - reserved))
            took = round(time.monotonic() - begin)
            row = {"stage": stage.name, "outcome": outcome, "seconds": took, "note": note}
            outcomes.append(row)
            print(f"{stage.name:10}{outcome:12}{took:>4} s  {note}".rstrip(), flush=True)
    (output / "suite.json").write_text(json.dumps(outcomes, indent=1) + "\n", encoding="utf-8")
    table = "\n".join(text_of(line) for line in targets(Found(output)))
    (output / "table.txt").write_text(table + "\n", encoding="utf-8")
    print(table)
    return int(any(row["outcome"] != PASSED for row in outcomes))


def _outcome(stage: Stage, bench: Bench) -> tuple[str, str]:
    print(f"=== {stage.name}: {stage.meaning}", file=bench.log, flush=True)
    try:
        return PASSED, stage.run(bench)
    except Trouble as trouble:
        return trouble.outcome, trouble.note


# ------------------------------------------------------------------------------------- the table


class Line(NamedTuple):
    """A figure, what it must reach and what it should; minimum 0: there is a target only."""

    what: str
    value: float | None
    unit: str
    minimum: float
    target: float
    least_is_best: bool = False

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        sign = -1 if self.least_is_best else 1
        if sign * self.value >= sign * self.target:
            return "target reached"
        if not self.minimum:
            return "below the target"
        reached = sign * self.value >= sign * self.minimum
        return "minimum reached" if reached else "MISSED"


def text_of(line: Line) -> str:
    value = "-" if line.value is None else f"{line.value:.2f}"
    minimum = f"{line.minimum:g}" if line.minimum else "-"
    figures = f"{value:>9} {line.unit:20} minimum {minimum:>5}, target {line.target:>5g}"
    return f"{line.what:34}{figures}  {line.verdict}"


class Found:
    """The newest measurements of a folder."""

    def __init__(self, folder: Path) -> None:
        rows = harness.newest(harness.load(folder))
        self.rows = [row for row in rows if row.p50 is not None]

    def row(
        self, operation: str, direction: str, provider: str, metric: str, shape: dict[str, int]
    ) -> Measurement | None:
        """The row, or None. `shape` holds the dimensions that tell cases apart."""
        wanted = (operation, direction, provider, metric)
        for row in self.rows:
            key = (row.operation, row.direction, row.provider, row.metric)
            if key == wanted and shape.items() <= row.shape.items():
                return row
        return None

    def ratio(
        self, operation: str, direction: str, ours: str, theirs: str, metric: str, **shape: int
    ) -> float | None:
        """Their figure over ours."""
        a = self.row(operation, direction, theirs, metric, shape)
        b = self.row(operation, direction, ours, metric, shape)
        return a.p50 / b.p50 if a and b else None  # type: ignore[operator]

    def share_of_copy(self, operation: str, direction: str, **shape: int) -> float | None:
        """Our kernel's traffic over the copy bandwidth of the same machine, in percent."""
        row = self.row(operation, direction, "triton", "time", shape)
        copy = self.row("copy", "forward", "PyTorch", "rate", {})
        return 100 * row.gbytes_per_s / copy.p50 if row and copy else None  # type: ignore[operator]


def targets(found: Found) -> Iterator[Line]:
    """Attention beside PyTorch's backends; norms and loss beside the copy; whole steps."""
    for direction in ("forward", "backward"):
        for D in (64, 128):
            for T in (1024, 2048, 4096, 8192, 16384):
                for other, minimum in (("SDPA flash", 1.0), ("SDPA cuDNN", 0.0)):
                    value = found.ratio("attention", direction, "triton", other, "time", T=T, D=D)
                    name = f"attention {direction} T={T} D={D}"
                    yield Line(name, value, f"x {other}", minimum, 1.0)
    for direction, minimum, target in (("forward", 85, 92), ("backward", 70, 85)):
        for C in (256, 768, 1600):
            share = found.share_of_copy("add_layer_norm", direction, C=C)
            yield Line(f"add_layer_norm {direction} C={C}", share, "% of copy", minimum, target)
    for V in (4096, 50304):
        share = found.share_of_copy("cross_entropy", "forward+backward", V=V)
        yield Line(f"cross_entropy V={V}", share, "% of copy", 85, 92)
    yield from step_targets(found)


def step_targets(found: Found) -> Iterator[Line]:
    """Whole training steps, without accumulation."""
    ours, one = "triton captured", {"micro-batches": 1}
    gpt2, small = {"B": 16, "T": 1024, **one}, {"B": 64, "T": 256, **one}

    def speed(model: str, shape: dict[str, int], unit: float) -> float | None:
        row = found.row(f"training step {model}", "step", ours, "time", shape)
        return shape["B"] * shape["T"] / row.p50 * 1e3 / unit if row and row.p50 else None

    def beside(model: str, shape: dict[str, int], other: str, metric: str = "time"):
        return found.ratio(f"training step {model}", "step", ours, other, metric, **shape)

    compiled, reduced = "torch.compile", "torch.compile reduce-overhead"
    name, small_name = "GPT-2 124M", "seed-sized"
    yield Line(f"{name} step", speed(name, gpt2, 1e3), "k tokens/s", 600, 700)
    yield Line(f"{name} step", beside(name, gpt2, compiled), f"x {compiled}", 1.25, 1.25)
    yield Line(f"{small_name} step", speed(small_name, small, 1e6), "M tokens/s", 0, 10)
    eager = beside(small_name, small, "PyTorch eager")
    yield Line(f"{small_name} step", eager, "x PyTorch eager", 5, 5)
    yield Line(
        f"{small_name} step", beside(small_name, small, reduced), "x reduce-overhead", 1.3, 1.3
    )
    share = beside(name, gpt2, compiled, "memory")
    yield Line(
        f"{name} peak memory", 1 / share if share else None, f"of {compiled}'s", 0.7, 0.5, True
    )
