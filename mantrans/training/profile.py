"""A profile of a few training steps: a trace, and a table of the most expensive operations.

`train.py --profile N` skips WARM_UP_STEPS steps (compilation, capture, first use of memory),
records the next N with PyTorch's profiler, and continues training. The run's folder gets
`profile.json`, a Chrome trace for chrome://tracing or ui.perfetto.dev; the console shows a table:

    share of step    an operation's own time, divided by the time of all operations: of its kernels
                     on a GPU, of the host on a CPU
    of the roofline  for products whose operations the profiler counts: operations per second,
                     divided by those of a large matrix product here, measured when profiling
                     starts. A small share means that a better kernel or shape could save time. A
                     step replayed as a CUDA graph has only kernels, which the profiler does not
                     count: use `compile_step: false` to see these figures.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mantrans.training.flops import product_peak

WARM_UP_STEPS = 5
ROWS = 10
NAME_WIDTH = 52


class StepProfiler:
    """Watches a training loop that calls `after_step` after each of its steps.

    A recording that has begun must be ended: PyTorch's profiler crashes the process that exits
    while it records. So none begins after `finish`, and an end without a beginning is impossible.

    steps: how many to record, at least 1. directory: where profile.json goes. device, dtype: the
    run's, for the peak. say: shows the table.
    """

    def __init__(
        self,
        steps: int,
        directory: Path,
        device: torch.device,
        dtype: torch.dtype,
        say: Callable[[str], None],
    ) -> None:
        if steps < 1:  # would end before it begins
            raise ValueError(f"steps: expected at least 1, got {steps}")
        self.steps, self.path, self.say = steps, Path(directory) / "profile.json", say
        self.device, self.dtype = device, dtype
        self.seen, self.finished = 0, False
        self.profile: torch.profiler.profile | None = None

    def after_step(self) -> None:
        """Count a step; start or end the recording when it is due."""
        self.seen += 1
        if self.finished:
            return
        if self.seen == WARM_UP_STEPS:
            self._begin()
        elif self.seen == WARM_UP_STEPS + self.steps:
            self.finish()

    def finish(self) -> None:
        """End the recording and show it, even if the run ended early; works once."""
        if self.finished:
            return
        self.finished = True
        recorded = self.seen - WARM_UP_STEPS
        if self.profile is not None:
            self._stop(self.profile)
        if self.profile is None or recorded < 1:
            self.say(f"nothing was profiled: the run had {self.seen} steps, all warm-up")
            return
        self.profile.export_chrome_trace(str(self.path))
        events = self.profile.key_averages()
        self.say(f"{table(events, recorded, self.device, self.peak)}\ntrace  {self.path}")

    def _stop(self, profile: torch.profiler.profile) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        with without_native_messages():
            profile.stop()

    def _begin(self) -> None:
        self.peak = product_peak(self.device, self.dtype)
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.profile = torch.profiler.profile(activities=activities, with_flops=True)
        with without_native_messages():
            self.profile.start()


def table(events: Any, steps: int, device: torch.device, peak: float) -> str:
    """The ten most expensive operations as text.

    events: the profiler's averages over `steps` steps. peak: operations per second of a large
    matrix product.
    """
    on_gpu = device.type == "cuda"
    cost = _own_device_time if on_gpu else _own_host_time
    costly = sorted((e for e in events if cost(e) > 0), key=cost, reverse=True)
    total = sum(cost(e) for e in costly)
    lines = [f"{'operation':{NAME_WIDTH}}  calls/step  ms/step  of step  of roofline"]
    for event in costly[:ROWS]:
        seconds = cost(event) / 1e6
        roofline = f"{event.flops / seconds / peak:>11.0%}" if event.flops else f"{'–':>11}"
        lines.append(
            f"{event.key[:NAME_WIDTH]:{NAME_WIDTH}}  {event.count / steps:>10.1f}  "
            f"{1e3 * seconds / steps:>7.3f}  {cost(event) / total:>7.1%}  {roofline}"
        )
    lines.append(
        f"{steps} steps, {total / steps / 1e3:.2f} ms of operations each; "
        f"the roofline is a matrix product's {peak / 1e12:.3g} TFLOP/s, measured here"
    )
    return "\n".join(lines)


def _own_host_time(event: Any) -> float:
    return event.self_cpu_time_total


def _own_device_time(event: Any) -> float:
    """Of kernels only: the operation that launched a kernel would count its time twice."""
    is_kernel = event.device_type.name == "CUDA"
    return event.self_device_time_total if is_kernel else 0.0


@contextmanager
def without_native_messages() -> Iterator[None]:
    """Suppress what libraries write to standard error directly, as the profiler does."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
