"""Long runs and crowded folders: nothing grows, nothing is lost, nobody writes over another."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from mantrans.records import read_records
from tests.support.processes import Processes
from tests.support.runs import metrics_file, small


def slope(points: list[tuple[float, float]]) -> float:
    """Least squares: how much the second number grows with one of the first."""
    n = len(points)
    mean_x, mean_y = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    numerator = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return numerator / sum((x - mean_x) ** 2 for x, _ in points)


@pytest.mark.promise("long runs")
@pytest.mark.parametrize(
    ("steps", "kib_per_thousand_steps"),
    [
        (900, 3_000.0),
        pytest.param(20_000, 60.0, marks=pytest.mark.slow),
    ],
)
def test_train_long_memory_and_files(
    tmp_path: Path,
    tokens: Path,
    processes: Processes,
    steps: int,
    kib_per_thousand_steps: float,
    record_property: Callable,
) -> None:
    """Resident memory's slope over the second half of the run, when caches are warm; open files at
    the same moments; and a line of metrics for every tenth step, with saves and validations.

    The long run's bound is that of 60 bytes a step: no Python object is so small that one could be
    kept each time. Without saves the slope is 0; the allocator takes half a KiB for each of them.

    TensorBoard's thread opens its file for a moment at each write. A file that is kept open raises
    the fewest that are ever open, which therefore may not change at all.
    """
    config = small(tmp_path, tokens, max_steps=steps, log_every=10, eval_every=100, save_every=50)
    config.save(tmp_path / "c.yaml")
    every = max(10, steps // 400)
    child = processes.start(
        "c.yaml", "samples.json", str(every), cwd=tmp_path, main="tests.end_to_end.sampled:main"
    )
    ended = child.wait(cpu_seconds=3000)
    assert ended.status == 0, ended.text
    samples = json.loads((tmp_path / "samples.json").read_text())
    warm = samples[len(samples) // 2 :]
    growth = 1000 * slope([(step, kib) for step, kib, _ in warm])
    files = [number for _, _, number in warm]
    half = len(files) // 2
    assert growth < kib_per_thousand_steps
    assert min(files[:half]) == min(files[half:]), files
    records = read_records(metrics_file(tmp_path))
    assert [r["step"] for r in records if "loss" in r] == list(range(10, steps + 1, 10))
    assert [r["step"] for r in records if "validation_loss" in r] == list(
        range(100, steps + 1, 100)
    )
    record_property("steps", steps)
    record_property("growth of resident memory", f"{growth:.1f} KiB in 1,000 steps")
    record_property("resident memory at the end", f"{samples[-1][1] // 1024} MiB")
    record_property("open files", f"{min(files)} to {max(files)}")
    record_property("lines of metrics missing", 0)


@pytest.mark.promise("two processes")
def test_train_two_processes_one_run(tmp_path: Path, tokens: Path, processes: Processes) -> None:
    """The second is refused with the first one's number, under the same run folder and under the
    same checkpoint folder alone; killed, the first leaves no lock behind."""
    config = small(tmp_path, tokens, max_steps=10**6, log_every=1, save_every=20)
    config.save(tmp_path / "c.yaml")
    first = processes.start("--config", "c.yaml", cwd=tmp_path)
    first.wait_for("step 25/")
    for elsewhere in ([], ["--set", "training.output_dir=elsewhere"]):
        second = processes.run("--config", "c.yaml", *elsewhere, cwd=tmp_path)
        assert second.is_one_line_error and f"is in use by process {first.pid}" in second.text
    first.kill()
    assert first.wait().status == -signal.SIGKILL
    third = processes.start("--config", "c.yaml", "--resume", "latest", cwd=tmp_path)
    third.wait_for("resumed from")
    third.wait_for("/1000000")  # before its first step a signal ends it at once
    third.kill(signal.SIGTERM)
    assert third.wait().status == 0


@pytest.mark.promise("two processes")
def test_train_four_runs_shared_folders(tmp_path: Path, tokens: Path, processes: Processes) -> None:
    """Four at once, one set of token files, one checkpoint folder: each ends as it does alone."""
    config = small(tmp_path, tokens, log_every=1)
    config.save(tmp_path / "c.yaml")
    children = [
        processes.start(
            "--config", "c.yaml", "--set", f"training.experiment_name=run{n}", cwd=tmp_path
        )
        for n in range(4)
    ]
    assert [child.wait().status for child in children] == [0] * 4
    metrics = {(tmp_path / "runs" / f"run{n}" / "metrics.jsonl").read_bytes() for n in range(4)}
    assert len(metrics) == 1
    assert (tmp_path / "checkpoints" / "latest.pt").exists()
