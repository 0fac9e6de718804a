"""Runs that torchrun itself starts, on one machine and as the agents of two."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mantrans.checkpoint import state_file
from tests.end_to_end.test_ranks import left
from tests.support.broken_rank import BREAK
from tests.support.compare import assert_same_bits
from tests.support.processes import ROOT
from tests.support.runs import checkpoints, finish, small

pytestmark = pytest.mark.slow
SETTINGS: dict[str, Any] = {
    "gradient_accumulation_steps": 4, "batch_size": 2, "max_steps": 8, "eval_every": 4
}  # fmt: skip


class Torchrun:
    """`torchrun ARGUMENTS train.py …` (with `way`: a rank that breaks), and what it prints."""

    def __init__(self, folder: Path, *arguments: str, way: str = "", more: tuple[str, ...] = ()):
        script = ["train.py"]
        if way:
            script = ["-m", "tests.support.broken_rank", "train"]
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", BREAK: way, "PYTHONPATH": str(ROOT),
            "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
        self.file = folder / f"printed{len(list(folder.glob('printed*')))}.txt"
        with self.file.open("w") as output:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "torch.distributed.run", *arguments, *script,
                    "--config", str(folder / "config.yaml"), *more,
                ],
                cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip

    def said(self) -> str:
        return self.file.read_text()

    def status(self, limit: float = 1200.0) -> int:
        try:
            return self.process.wait(limit)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)

    def wait_for(self, text: str, limit: float = 600.0) -> None:
        deadline = time.monotonic() + limit
        while text not in self.said():
            assert time.monotonic() < deadline and self.process.poll() is None, self.said()
            time.sleep(0.01)


@pytest.fixture
def begun(tmp_path: Path, tokens: Path) -> Path:
    """A folder with the configuration, whose unbroken run of one process is beside it."""
    finish(small(tmp_path / "whole", tokens, **SETTINGS))
    folder = tmp_path / "run"
    folder.mkdir()
    small(folder, tokens, **SETTINGS).save(folder / "config.yaml")
    return folder


def agents(folder: Path, *arguments: str, **keywords: Any) -> list[Torchrun]:
    """Two agents of one process each, as on two machines."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=1"]
    return [
        Torchrun(
            folder, "--nnodes=2", "--nproc-per-node=1", "--local-addr=127.0.0.1", *meeting,
            *arguments, **keywords,
        )
        for _ in range(2)
    ]  # fmt: skip


@pytest.mark.promise("torchrun")
def test_torchrun_one_machine(begun: Path) -> None:
    run = Torchrun(begun, "--standalone", "--nproc-per-node=2")
    assert run.status() == 0, run.said()
    assert run.said().count("step 5/8") == 1 and "2 processes" in run.said()
    assert_same_bits(left(begun), left(begun.parent / "whole"))


@pytest.mark.promise("torchrun")
def test_torchrun_two_machines(begun: Path) -> None:
    runs = agents(begun)
    assert [run.status() for run in runs] == [0, 0], runs[0].said() + runs[1].said()
    assert sum(run.said().count("step 5/8") for run in runs) == 1
    assert_same_bits(left(begun), left(begun.parent / "whole"))


@pytest.mark.promise("torchrun")
@pytest.mark.parametrize("machines", [1, 2])
@pytest.mark.parametrize("way", ["kill 1 step 6", "kill 0 step 6", "memory 1 step 6"])
def test_torchrun_restarts(begun: Path, machines: int, way: str) -> None:
    """A rank fails; torchrun starts all again, which go on from the last checkpoint."""
    if machines == 1:
        settings = ["--standalone", "--nproc-per-node=2", "--max-restarts=1"]
        runs = [Torchrun(begun, *settings, way=way)]
    else:
        runs = agents(begun, "--max-restarts=1", way=way)
    assert [run.status() for run in runs] == [0] * machines, "\n\n".join(r.said() for r in runs)
    said = "".join(run.said() for run in runs)
    assert len(re.findall(rf"^error: rank {way.split()[1]}", said, re.M)) == 1, said
    assert re.search(r"^resumed from .* at step 4$", said, re.M)
    assert_same_bits(left(begun), left(begun.parent / "whole"))


@pytest.mark.promise("torchrun")
def test_torchrun_fails(begun: Path, record_property: Callable) -> None:
    """Without restarts: our line, then torchrun's own summary, its status 1."""
    run = Torchrun(begun, "--standalone", "--nproc-per-node=2", way="kill 1 step 6")
    run.wait_for("error: rank 1 has died: its process is gone; the last checkpoint is ")
    begin = time.monotonic()
    assert run.status() == 1
    record_property(
        "milliseconds until torchrun had ended", round(1000 * (time.monotonic() - begin))
    )
    assert state_file.load(checkpoints(begun) / "latest.pt")["progress"]["step"] == 4


@pytest.mark.promise("torchrun")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_torchrun_signal(begun: Path, tokens: Path, number: int) -> None:
    """torchrun passes it on: all stop after the same step, saved, and go on from there."""
    small(begun, tokens, **SETTINGS | {"max_steps": 4000}).save(begun / "config.yaml")
    run = Torchrun(begun, "--standalone", "--nproc-per-node=2")
    run.wait_for("step 10/4000")
    run.process.send_signal(number)
    run.status()
    stopped = re.findall(r"^stopped at step (\d+) of 4000", run.said(), re.M)
    assert len(stopped) == 1 and not re.search("^error: ", run.said(), re.M), run.said()
    latest = state_file.load(checkpoints(begun) / "latest.pt")
    assert latest["progress"]["step"] == int(stopped[0])
    more = ("--resume", "latest", "--set", f"training.max_steps={int(stopped[0]) + 2}")
    assert Torchrun(begun, "--standalone", "--nproc-per-node=2", more=more).status() == 0
