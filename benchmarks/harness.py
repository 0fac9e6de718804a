"""How time and memory are measured, and what is kept of a measurement.

candidates take turns      a round times each once, and every round begins with another one:
                           machine noise hits all alike
warm-up is outside         compilation, first launches and the first fill of caches are not timed
inputs are rotated         several sets, together larger than the last cache
a sample is long enough    calls are repeated until it lasts SAMPLE_SECONDS
on a GPU                   CUDA events around a sample; calls that can be captured are replayed as
                           a graph, so that no gap between launches is timed

A measurement is one line of JSON in `results/<device>/<stage>.jsonl`, with all that is needed to
doubt it. Lines are appended and never changed. Those of one `run` (the moment its program started)
were measured side by side; `newest` keeps runs apart.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks import machine
from mantrans.training.profile import without_native_messages

Case = TypeVar("Case")
RESULTS = Path(__file__).parent / "results"
SAMPLE_SECONDS = 0.005
MIN_ROUNDS, MAX_ROUNDS = 5, 40
MAX_REPEATS = 1000


# --------------------------------------------------------------------------------- what is kept


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

    def milliseconds(self) -> Quantiles:
        """Of samples in seconds."""
        return self.map(lambda seconds: 1e3 * seconds)


@dataclass(frozen=True)
class Measurement:
    """One metric of one candidate at one shape.

    stage         peaks, operations, steps, scaling, race or bench: the command that measured it
    operation     an operation's name, or "training step <model>"
    provider      whose implementation: triton, native, reference, PyTorch eager, ...
    direction     forward, backward, forward+backward, update or step
    shape         dimension -> size
    metric, unit  "time" in ms, "memory" in MiB, "rate" in TFLOP/s or GB/s, "loss difference",
                    "bits per byte"
    p20, p50, p80, rounds    of the samples; None where the candidate failed, and `note` says how
    tflops, gbytes_per_s     the operation's least arithmetic and least traffic over the p50 time
    fraction      the time that the measured peaks allow, over the p50 time: 1 is the roofline
    curve         of a race: `race.Point`s
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
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    rounds: int = 0
    tflops: float | None = None
    gbytes_per_s: float | None = None
    fraction: float | None = None
    note: str | None = None
    curve: list[list[float]] | None = None
    quick: bool = False
    run: str = ""
    device: str = ""
    versions: dict[str, str | None] = field(default_factory=dict)
    commit: str | None = None
    date: str = ""

    @property
    def case(self) -> tuple:
        """What is compared: measurements of one case differ in metric and provider only.

        Recipes of a race run one after another, each for minutes: each is a case.
        """
        what = self.device, self.stage, self.operation, self.direction, self.dtype
        return *what, tuple(self.shape.items()), self.provider if self.curve else None

    @property
    def size(self) -> str:
        """The shape as text: "B=16 T=256"."""
        return " ".join(f"{name}={value}" for name, value in self.shape.items())


class Recorder:
    """Appends a stage's measurements to its file under `output`, with where and when."""

    def __init__(self, output: Path, stage: str, quick: bool = False) -> None:
        self.stage, self.quick, self.run = stage, quick, _now()
        self.path = output / machine.slug(machine.device_name()) / f"{stage}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def add(
        self,
        case: tuple[str, str, dict[str, int], str],
        provider: str,
        metric: str,
        unit: str,
        quantiles: Quantiles | None,
        **more: Any,
    ) -> None:
        """Write one measurement of a case (operation, direction, shape, dtype).

        quantiles None records a failure, which `note` must explain.
        """
        operation, direction, shape, dtype = case
        values = dataclasses.asdict(quantiles) if quantiles else {}
        measurement = Measurement(
            self.stage, operation, provider, direction, shape, dtype, metric, unit, **values,
            quick=self.quick, run=self.run, device=machine.device_name(),
            versions=machine.versions(), commit=machine.commit(), date=_now(), **more,
        )  # fmt: skip
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(measurement)) + "\n")

    def add_failure(self, case: tuple, provider: str, note: str) -> None:
        """Write down, and print, why a candidate was not timed."""
        self.add(case, provider, "time", "ms", None, note=note)
        print(f"{case[0]} {case[1]} {provider}: not timed, {note}", flush=True)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def reason(failure: Exception) -> str:
    """A failure as one line: its kind and first line, and those of its cause."""
    chain = [failure, *filter(None, [failure.__cause__])]
    told = [f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:200]}" for e in chain]
    return ", because of ".join(told)


def load(folder: Path) -> list[Measurement]:
    """All measurements under a folder of results, in the order in which they were written."""
    lines = []
    for path in sorted(folder.glob("*/*.jsonl")):
        lines += path.read_text(encoding="utf-8").splitlines()
    return [Measurement(**json.loads(line)) for line in lines]


def newest(rows: Iterable[Measurement], quick: bool = False) -> list[Measurement]:
    """Of every case the rows of the last run that measured it. Smoke runs count only if `quick`."""
    runs: dict[tuple, str] = {}
    rows = [row for row in rows if quick or not row.quick]
    for row in rows:
        runs[row.case] = max(runs.get(row.case, ""), row.run)
    return [row for row in rows if row.run == runs[row.case]]


# ----------------------------------------------------------------------------------------- time


class Candidate:
    """Something to time: call number i works on input set i, counted round and round.

    calls: one function per input set. repeats: calls per sample, None: found by warming up.
    capture: on a GPU, replay the calls as a CUDA graph if they allow it.
    """

    def __init__(
        self, name: str, calls: list[Callable[[], object]], repeats: int | None = None,
        capture: bool = True,
    ) -> None:  # fmt: skip
        self.name, self.calls = name, calls
        self.repeats = repeats or 1
        self.find_repeats = repeats is None
        self.capture = capture and machine.on_gpu()
        self.replay: Callable[[], None] | None = None
        self.samples: list[float] = []  # seconds per call

    def warm_up(self) -> None:
        """Compile, fill caches, choose the number of repeats, capture."""
        for call in [*self.calls, self.calls[0]]:
            call()
        if self.find_repeats:
            once = min(self._measure() for _ in range(2))
            wanted = min(MAX_REPEATS, max(1, round(SAMPLE_SECONDS / max(once, 1e-7))))
            # whole turns through the input sets, so that every sample sees all of them
            self.repeats = -(-wanted // len(self.calls)) * len(self.calls)
        if self.capture:
            self.replay = _graph_of(self._run)
        self._measure()

    def sample(self) -> None:
        """Time one sample."""
        self.samples.append(self._measure())

    def _run(self) -> None:
        for i in range(self.repeats):
            self.calls[i % len(self.calls)]()

    def _measure(self) -> float:
        return _elapsed(self.replay or self._run) / self.repeats


def _elapsed(function: Callable[[], object]) -> float:
    """Seconds that one call takes on the device."""
    if machine.on_gpu():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def _graph_of(function: Callable[[], None]) -> Callable[[], None] | None:
    """What replays the function's launches; None for what no graph can hold: timed as it is."""
    from mantrans.cuda_graph import cuda_graph

    outside = torch.cuda.current_stream()
    try:
        return cuda_graph(function)
    except RuntimeError as failure:
        torch.cuda.set_stream(outside)  # a capture that fails does not leave its stream by itself
        torch.cuda.synchronize()
        print(f"not captured: {(str(failure.__context__ or failure)).splitlines()[0]}")
        return None


def compete(candidates: list[Candidate], seconds: float) -> dict[str, Quantiles]:
    """Time warmed-up candidates in interleaved rounds for about `seconds`: seconds per call."""
    if not candidates:
        return {}
    end = time.monotonic() + seconds
    for turn in range(MAX_ROUNDS):
        if turn >= MIN_ROUNDS and time.monotonic() > end:
            break
        first = turn % len(candidates)
        for candidate in candidates[first:] + candidates[:first]:
            candidate.sample()
    return {c.name: Quantiles.of(c.samples) for c in candidates}


def input_sets(make: Callable[[int], object], bytes_of_one: int, at_most: int = 64) -> list:
    """As many input sets (make(0), make(1), ...) as exceed twice the last cache: 2 to `at_most`."""
    wanted = -(-2 * machine.cache_bytes() // max(1, bytes_of_one))
    return [make(i) for i in range(min(at_most, max(2, wanted)))]


def within(
    cases: Sequence[Case], end: float, title: Callable[[Case], str]
) -> Iterator[tuple[Case, float]]:
    """Each case with its share of the seconds that are left until `end`, on `time.monotonic`'s
    clock. One that comes too late is named and left out."""
    for place, case in enumerate(cases):
        left = end - time.monotonic()
        if left > 0:
            yield case, left / (len(cases) - place)
        else:
            print(f"{title(case)}: not measured, the time is over")


# --------------------------------------------------------------------------------------- memory


class PeakMemory:
    """The bytes at the peak of some work, from the moment this is made.

    On a GPU the allocator counts, captured graphs' pools included; on a CPU see `peak_on_cpu`.
    """

    def __init__(self) -> None:
        if machine.on_gpu():
            torch.cuda.synchronize()
            self.before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()

    def after(self, call: Callable[[], object], resident: Iterable[Tensor] = ()) -> int:
        """Make the last call. resident: tensors that live from before the call to after it."""
        if not machine.on_gpu():
            return peak_on_cpu(resident, call)
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - self.before


def peak_on_cpu(resident: Iterable[Tensor], call: Callable[[], object]) -> int:
    """Bytes at the peak of one call: what lived before it, and the most it had allocated itself.

    PyTorch counts no peak on a CPU. Its profiler notes every allocation with the running total,
    which goes on from profile to profile: what an earlier one saw allocated and not freed is still
    in it. What libraries allocate by themselves (oneDNN's scratch space) is not seen.
    """
    before = bytes_of(resident)
    activity = [torch.profiler.ProfilerActivity.CPU]
    profile = torch.profiler.profile(activities=activity, profile_memory=True)
    with without_native_messages(), profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    notes = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    totals = [note["args"]["Total Allocated"] for note in notes]
    start = totals[0] - notes[0]["args"]["Bytes"] if notes else 0
    return before + max([start, *totals]) - start


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Memory under the tensors, each storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
