"""Kernels are compiled ahead: all that a run launches, and nothing else changes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mantrans.config import Config
from mantrans.training import compiling
from mantrans.training.building import build_wrapper

ROOT = Path(__file__).parents[3]
SMALL = ["model.d_model=32", "model.n_blocks=1", "model.n_heads=2", "model.d_ffn=48",
         "model.dtype=float32", "training.device=cpu", "model.vocab_size=61"]  # fmt: skip

# In a process of its own, for kernels that are interpreted cannot be compiled; one for all tests,
# each of which has a program of the self-check to itself.
SCRIPT = """
import json, sys, threading
import torch, triton
from mantrans.kernels import selfcheck
from mantrans.training import compiling, first_step
from mantrans.training.first_step import CPU, Program
from mantrans.training.shapes_only import ShapesOnly
from tools.gate.cold import Times, empty_cache

shapes = selfcheck.run_shapes(64, 2, 128, 97, 32)
found = {}

def program(name):
    checks = [(draw, p) for draw, p in selfcheck.PROGRAMS if p.__name__ == name]
    return next(first_step.of_selfcheck(shapes, torch.bfloat16, checks))

def kernels_of(function):
    times = Times()
    triton.knobs.compilation.listener = times.count
    found["notes"] = function()
    return times.kernels

def launch(program):
    with ShapesOnly():
        program.run()

def stop():
    raise KeyboardInterrupt

def fail(*_):
    raise ValueError("x: expected 1, got 2")

with empty_cache():
    gelu, swiglu, embedding = program("gelu"), program("swiglu"), program("embedding")
    found["ahead"] = kernels_of(lambda: compiling.compile_all([gelu], CPU, 2))
    found["no notes"], found["PyTorch's compiler"] = found["notes"], "torch._dynamo" in sys.modules
    found["launched"] = kernels_of(lambda: launch(gelu))

    try:
        compiling.compile_all([swiglu, Program("stopped", stop)], CPU, 1)
    except KeyboardInterrupt:
        found["threads"] = threading.active_count()
    found["launched after Ctrl-C"] = kernels_of(lambda: launch(swiglu))

    launcher = triton.runtime.driver.active.launcher_cls
    triton.runtime.driver.active.launcher_cls = fail
    found["note"] = compiling.compile_all([Program("this", fail), embedding], CPU, 2)
    triton.runtime.driver.active.launcher_cls = launcher
    found["launched after a failure"] = kernels_of(lambda: launch(embedding))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> Any:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_compile_all_then_launch(found: Any) -> None:
    """Launches find every kernel compiled; PyTorch's compiler, a second or two, is not imported."""
    assert not found["PyTorch's compiler"]
    assert found["ahead"] >= 3 and found["launched"] == 0 and found["no notes"] == []


def test_compile_all_interrupted(found: Any) -> None:
    """No thread stays, and the kernels that were dropped are compiled when they are launched."""
    assert found["threads"] == 1 and found["launched after Ctrl-C"] > 0


def test_compile_all_failed(found: Any) -> None:
    """A program that fails is named; a kernel that does is left to its launch."""
    note = "note: this is compiled when it runs (ValueError('x: expected 1, got 2'))"
    assert found["note"] == [note] and found["launched after a failure"] > 0


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_compile_for_without_kernels(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "compile_all", None)
    config = Config.load(ROOT / "configs/quickstart.yaml", [*SMALL, f"training.backend={backend}"])
    assert compiling.compile_for(config, build_wrapper(config, 61).model) == []


def test_compile_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for a run's shapes, whatever it is called."""
    triton = pytest.importorskip("triton")
    from mantrans.kernels import triton as ops

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr("mantrans.kernels.triton.launch.interpreted", lambda: False)
    monkeypatch.setattr(compiling, "compile_all", lambda *_, **__: ["compiled"])

    def compile_for(*changes: str, checks: bool = True) -> list[str]:
        config = Config.load(ROOT / "configs/quickstart.yaml", [*SMALL, *changes])
        model = build_wrapper(config, 61).model
        model.ops = ops
        return compiling.compile_for(config, model, checks=checks)

    assert compile_for() == ["compiled"]
    assert compile_for() == compile_for("training.experiment_name=other") == []
    assert compile_for("training.batch_size=3") == compile_for(checks=False) == ["compiled"]
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/elsewhere/ptxas")
    assert compile_for() == ["compiled"]
