"""`python -m benchmarks gpu` as far as it goes without a GPU: its sequence, with made-up stages."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as benchmarks
from benchmarks import baselines, gpu, machine, operations, steps
from benchmarks.gpu import FAILED, OUT_OF_TIME, PASSED, STAGES, Bench, Stage, Trouble
from benchmarks.harness import Measurement

ROOT = Path(__file__).parents[2]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable:
    """`python -m benchmarks gpu ...` where there is no GPU: its status, and its standard error."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["benchmarks", "gpu", *map(str, arguments)])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(benchmarks, "disable_malloc_trim", lambda: None)
        return benchmarks.main(), capsys.readouterr().err

    return run


def test_suite_without_gpu(tmp_path: Path, command: Callable) -> None:
    """It says so and touches nothing."""
    status, said = command("machine", "--output", tmp_path / "out")
    assert status == 3 and "no GPU" in said and "nothing was run" in said
    assert not list(tmp_path.iterdir())


def test_suite_wrong_stage(tmp_path: Path, command: Callable) -> None:
    status, said = command("sped", "--output", tmp_path / "out")
    assert status == 2
    assert "stage: expected machine | parity | step" in said and "got sped" in said


def say(text: str):
    """A stage that prints, as a program of its own."""

    def run(bench: Bench) -> str:
        bench.python("-c", f"print({text!r})")
        return text

    return run


def hang(bench: Bench) -> str:
    bench.python("-c", "import time; time.sleep(60)")
    return ""


def fail(bench: Bench) -> str:
    raise Trouble(FAILED, "1 failed, 3 passed")


def outcomes(folder: Path) -> dict[str, str]:
    stages = json.loads((folder / "suite.json").read_text())
    return {stage["stage"]: stage["outcome"] for stage in stages}


def test_suite_stage_order(tmp_path: Path) -> None:
    """Stages run in order and leave few files."""
    stages = [Stage(name, 5, "says", say(f"{name} here")) for name in ("one", "two")]
    assert gpu.run(stages, tmp_path, 600) == 0
    assert list(outcomes(tmp_path).items()) == [("one", PASSED), ("two", PASSED)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["suite.json", "suite.log", "table.txt"]
    log = (tmp_path / "suite.log").read_text()
    assert log.index("one here") < log.index("=== two") < log.index("two here")
    assert "not measured" in (tmp_path / "table.txt").read_text()


def test_stage_hanging(tmp_path: Path) -> None:
    """It is ended, and costs the others nothing."""
    begin = time.process_time()
    stages = [Stage("hangs", 1, "", hang), Stage("last", 598, "", say("done"))]
    assert gpu.run(stages, tmp_path, 600) == 1
    assert outcomes(tmp_path) == {"hangs": OUT_OF_TIME, "last": PASSED}
    assert time.process_time() - begin < 5


def test_stage_failing(tmp_path: Path) -> None:
    """It fails alone."""
    stages = [Stage("fails", 5, "", fail), Stage("last", 5, "", say("done"))]
    assert gpu.run(stages, tmp_path, 600) == 1
    assert outcomes(tmp_path) == {"fails": FAILED, "last": PASSED}
    assert json.loads((tmp_path / "suite.json").read_text())[0]["note"] == "1 failed, 3 passed"


def test_stage_tests_dealt_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their counts are added."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # half of the time of such a process
    good, bad = tmp_path / "test_good.py", tmp_path / "test_bad.py"
    good.write_text("import pytest\n@pytest.mark.parametrize('x', 'abc')\ndef test(x): pass\n")
    bad.write_text("def test_bad(): assert False\n")
    with (tmp_path / "log").open("w") as log:
        bench = Bench(tmp_path, log, time.monotonic() + 10**6)
        assert bench.tests(1, str(good)) == "3 passed"
        with pytest.raises(Trouble) as trouble:
            bench.tests(2, str(good), str(bad))
    counts = sorted(trouble.value.note.split(", "))
    assert trouble.value.outcome == FAILED and counts == ["1 failed", "3 passed"]


def test_counts_added() -> None:
    texts = ["=== 500 passed, 2 skipped in 9s ===", "noise\n14 passed in 1s", "", "1 error in 1s"]
    assert gpu.summed_counts(texts) == "514 passed, 2 skipped, 1 error"


def test_stage_names_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that fits nothing would leave a stage with nothing to measure, and passed."""
    monkeypatch.setattr(machine, "on_gpu", lambda: True)
    titles = [case.title for case in steps.cases(quick=False)]
    for only, against in gpu.STEPS:
        assert sum(only in title for title in titles) == 1, only
        assert against in baselines.BASELINES
    assert set(gpu.OPERATIONS_AGAINST.split(",")) <= operations.SDPA.keys()
    assert sum(stage.seconds for stage in STAGES) == 530
    for name in gpu.GPU_TESTS:
        assert (ROOT / f"tests/gpu/test_gpu_{name}.py").exists()


def row(stage: str, operation: str, provider: str, direction: str, p50: float, **more):
    values = {"shape": {}, "dtype": "bfloat16", "metric": "time", "unit": "ms", **more}
    quantiles = {"p20": p50, "p50": p50, "p80": p50, "rounds": 9}
    return Measurement(stage, operation, provider, direction, **values, **quantiles)


def test_table_targets(tmp_path: Path) -> None:
    """Figures stand beside their targets."""
    attention = {"shape": {"B": 16, "T": 1024, "H": 32, "D": 64}}
    norm = {"shape": {"N": 32768, "C": 768}, "gbytes_per_s": 3500.0}
    gpt2 = {"shape": {"B": 16, "T": 1024, "micro-batches": 1}}
    step = ("steps", "training step GPT-2 124M")
    rows = [
        row("peaks", "copy", "PyTorch", "forward", 4000.0, metric="rate", unit="GB/s"),
        row("operations", "attention", "triton", "forward", 1.0, **attention),
        row("operations", "attention", "SDPA flash", "forward", 1.2, **attention),
        row("operations", "attention", "SDPA cuDNN", "forward", 0.9, **attention),
        row("operations", "add_layer_norm", "triton", "forward", 1.0, **norm),
        row(*step, "triton captured", "step", 25.0, **gpt2),
        row(*step, "torch.compile", "step", 30.0, **gpt2),
        row(*step, "triton captured", "step", 800.0, metric="memory", unit="MiB", **gpt2),
        row(*step, "torch.compile", "step", 1000.0, metric="memory", unit="MiB", **gpt2),
    ]
    (tmp_path / "gpu").mkdir()
    text = "".join(json.dumps(dataclasses.asdict(r)) + "\n" for r in rows)
    (tmp_path / "gpu" / "rows.jsonl").write_text(text)
    lines = gpu.targets(gpu.Found(tmp_path))
    measured = {
        (x.what, x.unit): (round(x.value, 3), x.verdict) for x in lines if x.value is not None
    }
    assert measured == {
        ("attention forward T=1024 D=64", "x SDPA flash"): (1.2, "target reached"),
        ("attention forward T=1024 D=64", "x SDPA cuDNN"): (0.9, "below the target"),
        ("add_layer_norm forward C=768", "% of copy"): (87.5, "minimum reached"),
        ("GPT-2 124M step", "k tokens/s"): (655.36, "minimum reached"),
        ("GPT-2 124M step", "x torch.compile"): (1.2, "MISSED"),
        ("GPT-2 124M peak memory", "of torch.compile's"): (0.8, "MISSED"),
    }
