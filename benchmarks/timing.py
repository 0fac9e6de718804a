"""How time and memory are measured.

contenders take turns      a round times each once, every round begins with another one: a
                           change in the machine's mood hits all alike
warm-up is outside         compilation, first launches and caches' first fill are not timed
inputs are rotated         several sets, together larger than the last cache
a sample is long enough    repeated calls until it lasts SAMPLE_SECONDS
on a GPU                   CUDA events around a sample; where the calls can be captured, a graph
                           of them is replayed, so that no gap between launches is timed
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.records import Quantiles
from mantrans.training.profile import without_native_messages

SAMPLE_SECONDS = 0.005
LEAST_ROUNDS = 5
MOST_ROUNDS = 40


class Contender:
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
        self.capture = capture and machine.device().type == "cuda"
        self.replay: Callable[[], None] | None = None
        self.samples: list[float] = []  # seconds per call

    def warm_up(self) -> None:
        """Compile, fill caches, choose the number of repeats, capture."""
        for call in [*self.calls, self.calls[0]]:
            call()
        if self.find_repeats:
            self.repeats = 1
            once = min(self._measure() for _ in range(2))
            wanted = max(1, round(SAMPLE_SECONDS / max(once, 1e-7)))
            # whole turns through the input sets, so that every sample sees all of them
            turns = -(-min(wanted, 1000) // len(self.calls))
            self.repeats = turns * len(self.calls)
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
        return elapsed(self.replay or self._run) / self.repeats


def elapsed(function: Callable[[], object]) -> float:
    """Seconds that one call takes on the device."""
    if machine.device().type == "cuda":
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


def to_milliseconds(seconds: float) -> float:
    """The unit of recorded times."""
    return 1e3 * seconds


def _graph_of(function: Callable[[], None]) -> Callable[[], None] | None:
    """What replays the function's launches; None for what no graph can hold: timed as it is."""
    from mantrans.training.step import cuda_graph

    outside = torch.cuda.current_stream()
    try:
        return cuda_graph(function)
    except RuntimeError as failure:
        torch.cuda.set_stream(outside)  # a capture that fails does not leave its stream by itself
        torch.cuda.synchronize()
        print(f"not captured: {(str(failure.__context__ or failure)).splitlines()[0]}")
        return None


def compete(contenders: list[Contender], seconds: float) -> dict[str, Quantiles]:
    """Time warmed-up contenders in interleaved rounds for about `seconds`.

    At least LEAST_ROUNDS rounds are made, at most MOST_ROUNDS. Returns seconds per call by name.
    """
    if not contenders:
        return {}
    end = time.monotonic() + seconds
    for turn in range(MOST_ROUNDS):
        if turn >= LEAST_ROUNDS and time.monotonic() > end:
            break
        first = turn % len(contenders)
        for contender in contenders[first:] + contenders[:first]:
            contender.sample()
    return {c.name: Quantiles.of(c.samples) for c in contenders}


def input_sets(make: Callable[[int], object], bytes_of_one: int, at_most: int = 64) -> list:
    """As many input sets (make(0), make(1), ...) as exceed twice the last cache: 2 to `at_most`."""
    wanted = -(-2 * machine.cache_bytes() // max(1, bytes_of_one))
    return [make(i) for i in range(min(at_most, max(2, wanted)))]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Memory under the tensors, each storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def peak_on_cpu(resident: Iterable[Tensor], step: Callable[[], object]) -> int:
    """Bytes at the peak of one step: what lived before it, and the most it had allocated itself.

    PyTorch counts no peak on a CPU. Its profiler notes every allocation with the running total.
    What libraries allocate by themselves (oneDNN's scratch space) is not seen.
    resident: tensors that live from before the step to after it.
    """
    before = bytes_of(resident)
    activity = [torch.profiler.ProfilerActivity.CPU]
    profile = torch.profiler.profile(activities=activity, profile_memory=True)
    with without_native_messages(), profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    totals = [e["args"]["Total Allocated"] for e in events if e.get("name") == "[memory]"]
    return before + max(totals, default=0)
