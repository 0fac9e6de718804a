"""Runs of several processes, started as torchrun starts them: the bits, the files, the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

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
        name: settings.pop(name) for name in ("environment", "others", "main") if name in settings
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
        ({}, [(2, "optimizer"), (4, "none")]),
        pytest.param(BFLOAT16, [(2, "none"), (4, "gradients")]),
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
            for optimizer in ("adamw", "sgd")
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
