"""Runs of several processes, started as torchrun starts them: the bits, the files, the start."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from mantrans.cli import QUICKSTART
from mantrans.distributed.watcher import ENDED_BY_ANOTHER
from mantrans.training.verify import verify
from tests.support.broken_rank import BREAK, BROKEN
from tests.support.compare import assert_same_bits
from tests.support.processes import Processes
from tests.support.ranks import Ranks, start_ranks
from tests.support.runs import outcome, small


def begin(
    processes: Processes, folder: Path, tokens: Path, size: int, *arguments: str, **settings: Any
) -> Ranks:
    """A small run of 8 steps of 4 micro-batches."""
    keywords = {
        name: settings.pop(name)
        for name in ("environment", "others", "main", "limits")
        if name in settings
    }
    defaults = {"gradient_accumulation_steps": 4, "batch_size": 2, "max_steps": 8, "eval_every": 4}
    folder.mkdir(exist_ok=True)
    small(folder, tokens, **defaults | settings).save(folder / "config.yaml")
    return start_ranks(
        processes, size, "--config", "config.yaml", *arguments, cwd=folder, **keywords
    )


def left(folder: Path) -> dict[str, Any]:
    """`outcome` without what says how many bytes a rank has."""
    found = outcome(folder)
    found["report"]["run"].pop("state_bytes")
    return found


def finished(ranks: Ranks) -> str:
    """What rank 0 printed; the others print nothing, and all end well."""
    ended = ranks.wait()
    assert [rank.status for rank in ended] == [0] * len(ended), ranks.said()
    assert not any(rank.text for rank in ended[1:]), ranks.said()
    return ended[0].text


BFLOAT16 = {"model": {"dtype": "bfloat16"}}


@pytest.mark.promise("same bits on any number of ranks")
@pytest.mark.parametrize(
    ("settings", "runs"),
    [
        ({}, [(2, "optimizer")]),
        *(
            pytest.param(
                model | {"optimizer": optimizer},
                [(size, shard) for size in (2, 4) for shard in ("none", "optimizer", "gradients")],
                marks=pytest.mark.slow,
            )
            for model in (
                {},
                BFLOAT16,
                {"model": {"dtype": "float64"}},
                {
                    "model": {"dtype": "bfloat16", "tie_embeddings": False},
                    "stochastic_rounding": True,
                },
            )
            for optimizer in ("adamw", "sgd", "muon")
        ),
    ],
)
def test_ranks_bits(
    tmp_path: Path,
    tokens: Path,
    processes: Processes,
    settings: dict[str, Any],
    runs: list[tuple[int, str]],
) -> None:
    """Weights, moments, metrics and samples are those of one process, whatever the ranks divide."""
    finished(begin(processes, tmp_path / "1", tokens, 1, **settings))
    expected = left(tmp_path / "1")
    for size, shard in runs:
        folder = tmp_path / f"{size}{shard}"
        finished(begin(processes, folder, tokens, size, shard=shard, **settings))
        assert_same_bits(left(folder), expected, f"{size} ranks, shard {shard}")


@pytest.mark.promise("same bits on any number of ranks")
@pytest.mark.promise("a signal to one rank")
@pytest.mark.parametrize(
    "sizes", [(2, 1, 4), *(pytest.param(s, marks=pytest.mark.slow) for s in [(4, 2, 1), (1, 4, 2)])]
)
def test_ranks_resume_other_size(
    tmp_path: Path, tokens: Path, processes: Processes, sizes: tuple[int, ...]
) -> None:
    """A run that goes on with other numbers of ranks, which divide other things."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finished(begin(processes, whole, tokens, 1, model={"dtype": "bfloat16"}, max_steps=9))
    shards = ("optimizer", "none", "gradients")
    for size, shard, stop in zip(sizes, shards, (3, 6, 9), strict=True):
        resume = ["--resume", "latest"] if stop > 3 else []
        said = finished(
            begin(
                processes, parts, tokens, size, *resume, main=BROKEN,
                environment={BREAK: f"term {size - 1} step {stop}"},
                model={"dtype": "bfloat16"}, shard=shard, max_steps=9,
            )
        )  # fmt: skip
        assert f"stopped at step {stop} of 9" in said or stop == 9
        assert not resume or f"at step {stop - 3}\n" in said
    assert_same_bits(left(parts), left(whole))


@pytest.mark.promise("torchrun")
@pytest.mark.slow
def test_ranks_resume_own_config(tmp_path: Path, tokens: Path, processes: Processes) -> None:
    """Without --config rank 0 chooses the run, and all have its settings; a profile is rank 0's."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finished(begin(processes, whole, tokens, 1))
    way = {BREAK: "term 1 step 3"}
    finished(begin(processes, parts, tokens, 2, main=BROKEN, environment=way))
    said = finished(
        start_ranks(
            processes, 4, "--resume", str(parts / "runs" / "small"), "--profile", "1", cwd=parts
        )
    )
    assert "at step 3\n" in said and "nothing was profiled: the run had 5 steps" in said
    assert_same_bits(left(parts), left(whole))


@pytest.mark.promise("torchrun")
@pytest.mark.slow
def test_ranks_prepare_data_once(tmp_path: Path, processes: Processes) -> None:
    """The first of a machine writes the tokens, the others wait and read them."""
    said = finished(begin(processes, tmp_path / "run", tmp_path / "tokens", 4))
    assert said.count("tokenizing") == 1 and "4 processes" in said
    versions = json.loads((tmp_path / "run" / "runs" / "small" / "versions.json").read_text())
    assert versions["processes"] == "4"


@pytest.mark.promise("verified on demand")
@pytest.mark.slow
def test_ranks_verified(tmp_path: Path, tokens: Path, processes: Processes) -> None:
    """One process verifies what two have trained, whose bits are the same."""
    finished(begin(processes, tmp_path, tokens, 2, shard="gradients"))
    verdict = verify(str(tmp_path / "runs" / "small"), 4, 4, QUICKSTART)
    assert verdict.equal and "all of step_00000008.pt" in verdict.line


def refused(ranks: Ranks, folder: Path) -> str:
    """The one line with which all ranks end; nothing is left in the run's folders."""
    assert {child.wait().status for child in ranks.children} <= {2, ENDED_BY_ANOTHER}, ranks.said()
    lines = [line for line in ranks.said().splitlines() if not line.startswith("tokenizing")]
    assert len(lines) == 1, ranks.said()
    assert not (folder / "runs").exists() and not (folder / "checkpoints").exists()
    return lines[0]


@pytest.mark.promise("ranks that differ")
@pytest.mark.parametrize(
    ("on_last", "line"),
    [
        (
            "training.learning_rate=0.002",
            "error: rank 2: training.learning_rate: expected 0.005, as rank 0 has, got 0.002",
        ),
        pytest.param(
            "model.dtype=float64",
            "error: rank 2: model.dtype: expected float32, as rank 0 has, got float64",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "data.tokenizer=tinystories_bpe_4096",
            "error: rank 2: hash of the tokenizer: expected ", marks=pytest.mark.slow,
        ),
        pytest.param(
            "data.path={own}",
            "error: rank 2: number of train tokens: expected 20035, as rank 0 has, got ",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "data.path=none.txt",
            "error: rank 2: data.path: expected a file ",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "training.unknown=1",
            "error: rank 2: --set training.unknown=1: expected a field of training ",
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_ranks_start_differs(
    tmp_path: Path, tokens: Path, processes: Processes, on_last: str, line: str
) -> None:
    """Refused by name before anything is written."""
    own = tmp_path / "own.txt"
    own.write_text("Other text than the others have. " * 100)
    override = ["--set", on_last.format(own=own)]
    ranks = begin(processes, tmp_path, tokens, 3, batch_size=3, others={2: override})
    assert refused(ranks, tmp_path).startswith(line)


@pytest.mark.promise("ranks that differ")
@pytest.mark.slow
def test_ranks_start_other_version(tmp_path: Path, tokens: Path, processes: Processes) -> None:
    way = {BREAK: "version 1 start 0"}
    ranks = begin(processes, tmp_path, tokens, 2, main=BROKEN, environment=way)
    assert refused(ranks, tmp_path) == (
        f"error: rank 1: version of torch: expected {metadata.version('torch')}, as rank 0 has, "
        "got 0.0"
    )


@pytest.mark.promise("ranks that differ")
@pytest.mark.parametrize(
    ("size", "settings", "line"),
    [
        (
            4, {"batch_size": 3, "gradient_accumulation_steps": 2},
            "error: rank 0: training.batch_size × gradient_accumulation_steps: expected a multiple "
            "of the 4 processes, got 6",
        ),
        pytest.param(
            2, {"data": {"path": "none.txt"}}, "error: rank 0: data.path: expected a file ",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            2, {"device": "cuda:1"},
            "error: rank 0: training.device: expected auto, cuda or cpu, since 2 processes train, "
            "got cuda:1", marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_ranks_start_refused(
    tmp_path: Path,
    tokens: Path,
    processes: Processes,
    size: int,
    settings: dict[str, Any],
    line: str,
) -> None:
    """What all ranks have in common is said once, by rank 0."""
    assert refused(begin(processes, tmp_path, tokens, size, **settings), tmp_path).startswith(line)


@pytest.mark.promise("ranks that differ")
@pytest.mark.slow
def test_ranks_start_argument(tmp_path: Path, tokens: Path, processes: Processes) -> None:
    """A wrong command line is told before the ranks meet: by the first of each machine."""
    line = refused(begin(processes, tmp_path, tokens, 2, "--confg", "x"), tmp_path)
    assert line.startswith("error: unrecognized arguments: --confg x")
