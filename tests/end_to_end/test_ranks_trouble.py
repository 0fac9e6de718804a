"""A rank that dies, hangs, runs out of memory or loses its disk: all end in seconds, with one
message, and the last checkpoint is whole."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mantrans.checkpoint import state_file
from mantrans.checkpoint.state_file import SLOW_WRITE_VARIABLE
from mantrans.distributed.watcher import ENDED_BY_ANOTHER
from tests.end_to_end.test_ranks import begin, finished, left
from tests.support.broken_rank import BREAK, BROKEN
from tests.support.compare import assert_same_bits
from tests.support.processes import Processes
from tests.support.ranks import Ranks
from tests.support.runs import checkpoints

KILLED, OF_A_MISTAKE, OF_A_BUG = -signal.SIGKILL, 2, 1
SAVED = "the last checkpoint is {} (step 4)"


def broken(
    processes: Processes, folder: Path, tokens: Path, size: int, way: str, **settings: Any
) -> Ranks:
    return begin(processes, folder, tokens, size, main=BROKEN, environment={BREAK: way}, **settings)


def statuses(ranks: Ranks) -> list[int]:
    return [child.wait().status for child in ranks.children]


def told(ranks: Ranks) -> str:
    """The one line that says why; there is no other, and no traceback."""
    lines = [line for line in ranks.said().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in ranks.said(), ranks.said()
    return lines[0]


@pytest.mark.promise("a rank ends, all end")
@pytest.mark.parametrize(
    ("way", "status", "line"),
    [
        ("kill 1 step 6", KILLED, "error: rank 1 has died: its process is gone; {saved}"),
        pytest.param(
            "kill 0 step 6", KILLED, "error: rank 0 has died: its process is gone; {saved}",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "kill 0 validation 8", KILLED, "error: rank 0 has died: its process is gone; {saved}",
            marks=pytest.mark.slow,
        ),
        (
            "memory 1 step 6", OF_A_MISTAKE,
            "error: rank 1: out of memory; lower training.batch_size",
        ),
        pytest.param(
            "memory 0 step 6", OF_A_MISTAKE,
            "error: rank 0: out of memory; lower training.batch_size", marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_rank_ends(
    tmp_path: Path,
    tokens: Path,
    processes: Processes,
    way: str,
    status: int,
    line: str,
    record_property: Callable,
) -> None:
    """In the middle of a step, and while the others wait for rank 0's validation."""
    ranks = broken(processes, tmp_path, tokens, 2, way, eval_every=8 if "step" in way else 6)
    rank = int(way.split()[1])
    ranks[rank].process.join(60)
    seconds = ranks.seconds_until_gone(limit=10)
    assert statuses(ranks) == [status if r == rank else ENDED_BY_ANOTHER for r in range(2)]
    latest = checkpoints(tmp_path) / "latest.pt"
    assert told(ranks).startswith(line.format(saved=SAVED.format(f"{latest}")))
    assert state_file.load(latest)["progress"]["step"] == 4
    record_property("milliseconds until all were gone", round(1000 * seconds))


@pytest.mark.promise("a rank ends, all end")
@pytest.mark.slow
def test_rank_bug(tmp_path: Path, tokens: Path, processes: Processes) -> None:
    """A bug has its traceback, once."""
    ranks = broken(processes, tmp_path, tokens, 2, "bug 1 step 6")
    ranks.seconds_until_gone()
    assert statuses(ranks) == [ENDED_BY_ANOTHER, OF_A_BUG]
    assert ranks.said().count("Traceback") == 1 and "nobody expects this" in ranks[1].said()
    assert "error: " not in ranks.said().lower().replace("keyerror: ", "")


@pytest.mark.promise("a rank hangs, all end")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("stop 1 step 6", "error: rank 1 does not answer since "),
        ("stop 0 step 6", "error: rank 0 does not answer since "),
        ("stop 0 validation 8", "error: rank 0 does not answer since "),
        ("hang 1 step 6", "error: rank 1 hangs in step 6 since "),
        ("hang 0 step 6", "error: rank 0 hangs in step 6 since "),
    ],
)
def test_rank_hangs(
    tmp_path: Path,
    tokens: Path,
    processes: Processes,
    way: str,
    reason: str,
    record_property: Callable,
) -> None:
    """After training.distributed_timeout. A process that was stopped leaves when it goes on."""
    ranks = broken(
        processes, tmp_path, tokens, 3, way, distributed_timeout=5.0, batch_size=6, eval_every=8
    )
    rank, stopped = int(way.split()[1]), way.startswith("stop")
    seconds = ranks.seconds_until_gone(but=[rank] if stopped else [])
    line = told(ranks)
    assert line.startswith(reason) and line.endswith("(step 4)")
    ranks[rank].kill(signal.SIGCONT)
    assert statuses(ranks) == [ENDED_BY_ANOTHER] * 3
    record_property("milliseconds until all were gone", round(1000 * seconds))


@pytest.mark.promise("a rank hangs, all end")
@pytest.mark.slow
def test_rank_slow_validation(tmp_path: Path, tokens: Path, processes: Processes) -> None:
    """Rank 0 may take its time: three times the limit."""
    ranks = broken(
        processes, tmp_path, tokens, 2, "sleep 0 validation 4", distributed_timeout=5.0
    )  # fmt: skip
    finished(ranks)


@pytest.mark.promise("a rank ends, all end")
@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_rank_killed_in_save(tmp_path: Path, tokens: Path, processes: Processes, rank: int) -> None:
    """latest.pt is the one before, whole; a resumed run has the bits of an unbroken one."""
    folder = tmp_path / "broken"
    slow = {SLOW_WRITE_VARIABLE: "0.03"}
    ranks = begin(processes, folder, tokens, 2, save_every=2, environment=slow)
    wait_until(lambda: any(checkpoints(folder).glob(".step_00000004*")))
    ranks[rank].kill()
    ranks.seconds_until_gone(limit=10)
    assert state_file.load(checkpoints(folder) / "latest.pt")["progress"]["step"] == 2
    assert told(ranks).startswith(f"error: rank {rank} has died: its process is gone; ")
    finished(begin(processes, folder, tokens, 2, "--resume", "latest", save_every=2))
    finished(begin(processes, tmp_path / "whole", tokens, 1, save_every=2))
    assert not list(checkpoints(folder).glob(".*.partial"))
    assert_same_bits(left(folder), left(tmp_path / "whole"))


@pytest.mark.promise("a rank ends, all end")
@pytest.mark.slow
def test_rank_full_disk(tmp_path: Path, tokens: Path, processes: Processes) -> None:
    """A periodic save that fails is reported and the ranks go on; the last one ends all of them
    with rank 0's line."""
    ranks = begin(processes, tmp_path, tokens, 2, limits={"RLIMIT_FSIZE": 30_000})
    ranks.seconds_until_gone()
    assert statuses(ranks) == [OF_A_MISTAKE, OF_A_MISTAKE]
    assert ranks.said().count("training goes on") == 1 and "step 8/8" in ranks.said()
    assert told(ranks).startswith("error: rank 0: ") and "could not be written" in told(ranks)


@pytest.mark.promise("a rank computes wrongly")
@pytest.mark.parametrize(
    ("size", "rank", "line"),
    [
        (
            2, 1,
            "error: step 6: rank 1 has other weights than rank 0, first in token_embedding.weight"
        ),
        pytest.param(
            4, 0,
            "error: step 6: rank 0 has other weights than rank 1, first in token_embedding.weight",
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_rank_other_weights(
    tmp_path: Path, tokens: Path, processes: Processes, size: int, rank: int, line: str
) -> None:
    """One bit of one weight is found at the next comparison, and not saved."""
    way = f"bit {rank} step 5"
    ranks = broken(processes, tmp_path, tokens, size, way, compare_ranks_every=3, save_every=4)
    ranks.seconds_until_gone()
    assert statuses(ranks) == [OF_A_MISTAKE] * size
    assert told(ranks).startswith(line) and told(ranks).endswith("(step 4)")
    assert state_file.load(checkpoints(tmp_path) / "latest.pt")["progress"]["step"] == 4


@pytest.mark.promise("a processor computes wrongly")
@pytest.mark.slow
@pytest.mark.parametrize("shard", ["none", "gradients"])
def test_rank_computes_otherwise(
    tmp_path: Path, tokens: Path, processes: Processes, shard: str
) -> None:
    """One rank computes another loss the first time: all end, with one line. Without that a run
    with `recheck_every` has the bits of one without."""
    ranks = broken(
        processes, tmp_path, tokens, 2, "off 1 step 6", recheck_every=3, save_every=4, shard=shard
    )
    ranks.seconds_until_gone()
    assert statuses(ranks) == [OF_A_MISTAKE] * 2
    assert told(ranks).startswith("error: step 6: loss of its micro-batches: expected the same ")
    assert " on rank 1: a processor" in told(ranks) and told(ranks).endswith("(step 4)")
    assert state_file.load(checkpoints(tmp_path) / "latest.pt")["progress"]["step"] == 4
    for folder, every in (("with", 2), ("without", None)):
        finished(begin(processes, tmp_path / folder, tokens, 2, recheck_every=every, shard=shard))
    assert_same_bits(left(tmp_path / "with"), left(tmp_path / "without"))


@pytest.mark.promise("too many skips")
@pytest.mark.slow
def test_rank_not_finite(tmp_path: Path, tokens: Path, processes: Processes) -> None:
    """All skip the same steps and give up together; the rank with the value is named."""
    settings = {"max_consecutive_skips": 2, "log_every": 1, "shard": "gradients"}
    ranks = broken(processes, tmp_path, tokens, 2, "nan 1 step 6", **settings)
    ranks.seconds_until_gone()
    assert statuses(ranks) == [OF_A_MISTAKE] * 2
    where = "all values up to the loss are finite, but the loss is not (on rank 1)"
    latest = checkpoints(tmp_path) / "latest.pt"
    saved = f"the last good checkpoint is {latest}"
    assert told(ranks) == f"error: rank 0: step 7: 2 steps in a row not finite; {where}; {saved}"
    assert state_file.load(latest)["progress"]["step"] == 4


def wait_until(condition: Callable[[], bool], timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)
