"""The GPU suite's script as far as it goes without a GPU, and its sequence with a stand-in python.

The stand-in says that there is a GPU and answers for each program the suite starts; what is tested
is the script itself: order, deadlines, outcomes, files.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_table, machine, providers, steps, trainers
from benchmarks.records import Row

ROOT = Path(__file__).parents[1]
SUITE = ROOT / "benchmarks" / "gpu_suite.sh"
STAGES = ["machine", "parity", "step", "sanitizer", "speed", "training"]


def suite(*arguments: object, python: object = sys.executable, **environment: str):
    return subprocess.run(
        [str(SUITE), *map(str, arguments)], cwd=ROOT.parent, capture_output=True, text=True,
        timeout=120, env={**os.environ, "PYTHON": str(python), **environment},
    )  # fmt: skip


def test_stages_are_listed_without_a_gpu() -> None:
    done = suite("--list")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == STAGES


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("stages", [[], ["machine"]])
def test_without_a_gpu_it_says_so_and_touches_nothing(tmp_path: Path, stages: list[str]) -> None:
    done = suite(tmp_path / "out", *stages)
    assert done.returncode == 3
    assert "no GPU" in done.stderr and "nothing was run" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_python_without_torch_is_no_gpu_either(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    bare.chmod(0o755)
    done = suite(tmp_path / "out", python=bare)
    assert done.returncode == 3 and "torch" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["out", "sped"], "stage: found 'sped'; accepted: machine parity step"),
        ([], "gpu_suite.sh OUT"),
        (["--lst"], "gpu_suite.sh OUT"),
    ],
)
def test_wrong_arguments(arguments: list[str], complaint: str) -> None:
    done = suite(*arguments)
    assert done.returncode == 2 and complaint in done.stderr


STAND_IN = """#!/usr/bin/env bash
echo "$@" >>"{calls}"
case "$*" in
    -) cat >/dev/null ;;
    *gpu_table*) exec "{python}" "$@" ;;
    {special}
    *pytest*) echo "2 passed, 1 skipped in 0.01s" ;;
    *) echo done ;;
esac
"""


def stand_in(folder: Path, special: str = "*nothing*) ;;") -> Path:
    path = folder / "python"
    path.write_text(STAND_IN.format(calls=folder / "calls", python=sys.executable, special=special))
    path.chmod(0o755)
    return path


def outcomes(folder: Path) -> dict[str, str]:
    stages = json.loads((folder / "suite.json").read_text())
    return {stage["stage"]: stage["outcome"] for stage in stages}


def test_all_stages_run_in_order_and_leave_few_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = suite(out, python=stand_in(tmp_path), GPU_SUITE_SECONDS="60")
    assert done.returncode == 0, done.stdout + done.stderr
    assert outcomes(out) == dict.fromkeys(STAGES, "passed")
    assert sorted(p.name for p in out.iterdir()) == ["suite.json", "suite.log", "table.txt"]
    calls = (tmp_path / "calls").read_text()
    programs = ["benchmarks.ceilings", "test_gpu_kernels", "test_gpu_step", "benchmarks.kernels"]
    programs += ["benchmarks.steps", "benchmarks.gpu_table"]
    places = [calls.index(name) for name in programs]
    assert places == sorted(places)
    assert "not measured" in (out / "table.txt").read_text()
    shares = calls.count("tests/gpu/test_gpu_kernels.py")
    note = json.loads((out / "suite.json").read_text())[1]["note"]
    assert f"{2 * shares} passed" in note and f"{shares} skipped" in note


def test_chosen_stages_keep_the_lists_order(tmp_path: Path) -> None:
    done = suite(tmp_path / "out", "training", "machine", python=stand_in(tmp_path))
    assert done.returncode == 0
    assert list(outcomes(tmp_path / "out")) == ["machine", "training"]


def test_a_stage_that_hangs_is_ended_and_starves_nobody(tmp_path: Path) -> None:
    python = stand_in(tmp_path, "*benchmarks.kernels*) sleep 60 ;;")
    begin = time.monotonic()
    done = suite(
        tmp_path / "out", "speed", "training", python=python, GPU_SUITE_SECONDS="6",
    )  # fmt: skip
    assert done.returncode == 1
    assert outcomes(tmp_path / "out") == {"speed": "out of time", "training": "passed"}
    assert time.monotonic() - begin < 40


def test_a_failed_test_fails_its_stage_only(tmp_path: Path) -> None:
    python = stand_in(tmp_path, "*test_gpu_kernels*) echo '1 failed, 3 passed in 1s'; exit 1 ;;")
    done = suite(tmp_path / "out", "machine", "parity", "step", python=python)
    assert done.returncode == 1
    expected = {"machine": "passed", "parity": "failed", "step": "passed"}
    assert outcomes(tmp_path / "out") == expected
    assert "1 failed, 3 passed" in (tmp_path / "out" / "suite.log").read_text()


def test_what_the_suite_asks_for_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that fits nothing would leave a stage with nothing to measure, and passed."""
    monkeypatch.setattr(machine, "device", lambda: torch.device("cuda"))
    script = SUITE.read_text()
    titles = [case.title for case in steps.cases(quick=False)]
    only = re.findall(r'--only "(.*?)"', script)
    assert len(only) == 2
    for text in only:
        assert sum(text in title for title in titles) == 1, text
    known = {*trainers.OURS, *trainers.RIVALS, *providers.OURS, *providers.SDPA}
    for names in re.findall(r'--providers "(.*?)"', script):
        assert set(names.split(",")) <= known


def row(stage: str, operation: str, provider: str, direction: str, p50: float, **more) -> Row:
    values = {"shape": {}, "dtype": "bfloat16", "metric": "time", "unit": "ms", **more}
    return Row(stage, operation, provider, direction, p20=p50, p50=p50, p80=p50, rounds=9, **values)


def test_the_table_sets_figures_beside_their_bars(tmp_path: Path) -> None:
    attention = {"shape": {"B": 16, "T": 1024, "H": 32, "D": 64}}
    norm = {"shape": {"N": 32768, "C": 768}, "gbytes_per_s": 3500.0}
    gpt2 = {"shape": {"B": 16, "T": 1024, "micro-batches": 1}}
    step = ("steps", "training step GPT-2 124M")
    rows = [
        row("ceilings", "copy", "PyTorch", "forward", 4000.0, metric="rate", unit="GB/s"),
        row("kernels", "attention", "triton", "forward", 1.0, **attention),
        row("kernels", "attention", "SDPA flash", "forward", 1.2, **attention),
        row("kernels", "attention", "SDPA cuDNN", "forward", 0.9, **attention),
        row("kernels", "add_layer_norm", "triton", "forward", 1.0, **norm),
        row(*step, "triton captured", "step", 25.0, **gpt2),
        row(*step, "torch.compile", "step", 30.0, **gpt2),
        row(*step, "triton captured", "step", 800.0, metric="memory", unit="MiB", **gpt2),
        row(*step, "torch.compile", "step", 1000.0, metric="memory", unit="MiB", **gpt2),
    ]
    (tmp_path / "gpu").mkdir()
    text = "".join(json.dumps(dataclasses.asdict(r)) + "\n" for r in rows)
    (tmp_path / "gpu" / "rows.jsonl").write_text(text)
    found = gpu_table.Found(tmp_path)
    lines = [*gpu_table.kernel_lines(found), *gpu_table.step_lines(found)]
    measured = {
        (x.what, x.unit): (round(x.value, 3), x.verdict) for x in lines if x.value is not None
    }
    assert measured == {
        ("attention forward T=1024 D=64", "x SDPA flash"): (1.2, "aim reached"),
        ("attention forward T=1024 D=64", "x SDPA cuDNN"): (0.9, "below the aim"),
        ("add_layer_norm forward C=768", "% of copy"): (87.5, "bar reached"),
        ("GPT-2 124M step", "k tokens/s"): (655.36, "bar reached"),
        ("GPT-2 124M step", "x torch.compile"): (1.2, "MISSED"),
        ("GPT-2 124M peak memory", "of torch.compile's"): (0.8, "MISSED"),
    }
