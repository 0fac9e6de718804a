"""train.py --profile: the recording begins after the warm-up, ends by itself, and is told of."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from mantrans.training.profile import WARM_UP_STEPS, StepProfiler


def run_steps(profiler: StepProfiler, count: int) -> None:
    a = torch.randn(128, 128)
    for _ in range(count):
        torch.mm(a, a)
        profiler.after_step()


def test_profile_steps(tmp_path: Path) -> None:
    """Trace and table are of the steps asked for."""
    said: list[str] = []
    profiler = StepProfiler(3, tmp_path, torch.device("cpu"), torch.float32, said.append)
    run_steps(profiler, WARM_UP_STEPS + 3 + 2)
    (text,) = said
    product = next(line for line in text.splitlines() if line.startswith("aten::mm"))
    name, calls, _, share, roofline = product.split()
    assert float(calls) == 1.0, "one product a step, none of the warm-up's or of later steps"
    assert 0 < float(share.rstrip("%")) <= 100 and roofline.endswith("%")
    events = json.loads((tmp_path / "profile.json").read_text(encoding="utf-8"))["traceEvents"]
    assert sum(event.get("name") == name for event in events) == 3
    profiler.finish()
    assert len(said) == 1, "a finished recording is told of once"


def test_profile_run_ends_early(tmp_path: Path) -> None:
    """A run that ends early shows what it has."""
    said: list[str] = []
    profiler = StepProfiler(10, tmp_path, torch.device("cpu"), torch.float32, said.append)
    run_steps(profiler, WARM_UP_STEPS + 2)
    profiler.finish()
    assert len(said) == 1 and "2 steps" in said[0]


def test_profile_within_warm_up(tmp_path: Path) -> None:
    """A run within its warm up says that nothing was recorded."""
    said: list[str] = []
    profiler = StepProfiler(10, tmp_path, torch.device("cpu"), torch.float32, said.append)
    run_steps(profiler, WARM_UP_STEPS)
    profiler.finish()
    assert said == [f"nothing was profiled: the run had {WARM_UP_STEPS} steps, all warm-up"]
    assert not (tmp_path / "profile.json").exists()
