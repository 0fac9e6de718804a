"""How long the kernels of a run take until its first step, compiled as a first run compiles them.

    python -m tools.gate.cold quickstart gpt2-124m

For sm_90, each with an empty cache: one after the other, and by `mantrans.training.compiling`.
Seconds of wall clock and of CPU. Nothing is launched, and Triton 3.6's launchers are not built.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton

from mantrans.config import Config
from mantrans.training import compiling, first_step
from mantrans.training.shapes_only import ShapesOnly
from tools.gate.cards import CARDS
from tools.gate.driver import cpu_seconds, launches_for
from tools.gate.programs import CONFIGS, CPU, vocabulary_of


class Times:
    """Seconds, and the kernels that Triton was asked for in them."""

    def __init__(self) -> None:
        self.kernels, self.wall, self.cpu = 0, time.perf_counter(), cpu_seconds()

    def count(self, **_: Any) -> None:
        self.kernels += 1

    def __str__(self) -> str:
        wall, cpu = time.perf_counter() - self.wall, cpu_seconds() - self.cpu
        return f"{self.kernels} kernels, {wall:.1f} s, {cpu:.1f} s of CPU"


@contextlib.contextmanager
def empty_cache() -> Iterator[None]:
    """Inside, kernels are compiled for sm_90 with nothing in the cache, and launches do nothing."""
    folder = tempfile.TemporaryDirectory()
    with folder, launches_for(CARDS[90], lambda _: None, Path(folder.name)):
        triton.runtime.driver.active.launcher_cls = lambda *_: lambda *_: None
        yield


def measure(name: str, threads: int) -> str:
    """A config's programs; threads: that compile ahead, or 0."""
    config = Config.load(CONFIGS / f"{name}.yaml")
    programs = list(first_step.programs(config, vocabulary_of(config), torch.bfloat16))
    with empty_cache():
        ahead = Times()
        triton.knobs.compilation.listener = ahead.count
        lines = [f"{name}, Triton {triton.__version__}, {threads or 'no'} threads"]
        if threads:
            for note in compiling.compile_all(programs, CPU, threads, quiet=True):
                raise RuntimeError(note)
            lines.append(f"ahead: {ahead}")
        launched = Times()
        triton.knobs.compilation.listener = launched.count
        with ShapesOnly():
            for program in programs:
                program.run()
        lines.append(f"launched: {launched}")
    return "; ".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.gate.cold")
    parser.add_argument("configs", nargs="+")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    for name in arguments.configs:
        for threads in (0, arguments.threads):
            with context.Pool(1) as pool:  # a process of its own, in which nothing is compiled
                print(pool.apply(measure, (name, threads)), flush=True)


if __name__ == "__main__":
    main()
