"""`training.recheck_every`: a step computed twice finds a processor that computes wrongly, and
changes nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mantrans.checkpoint import state_file
from mantrans.cli import main
from mantrans.distributed.world import World
from mantrans.errors import MantransError, RanksError
from mantrans.kernels import native
from mantrans.records import read_records
from mantrans.training import step as step_module
from mantrans.training.recheck import require_same
from mantrans.training.trainer import Trainer
from tests.support.compare import assert_same_bits
from tests.support.runs import NAME, checkpoints, metrics_file, outcome, small, stop_after


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokens")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> Callable[..., dict[str, Any]]:
    """What runs leave that compute nothing twice, each run once."""
    found: dict[str, dict[str, Any]] = {}

    def run(settings: dict[str, Any]) -> dict[str, Any]:
        if repr(settings) not in found:
            folder = tmp_path_factory.mktemp("plain")
            Trainer(small(folder, tokens, **settings), quiet=True).run()
            found[repr(settings)] = outcome(folder)
        return found[repr(settings)]

    return run


WAYS: list[dict[str, Any]] = [
    {"model": {"dtype": "bfloat16"}, "gradient_accumulation_steps": 3, "recompute": "block",
     "outlier_z_score": 3.0, "outlier_window": 8, "data": {"attend_across_documents": False}},
    {"gradient_sum": "running", "gradient_accumulation_steps": 2, "optimizer": "sgd"},
    {"model": {"dtype": "bfloat16"}, "stochastic_rounding": True, "recompute": "gelu"},
]  # fmt: skip


@pytest.mark.promise("a processor computes wrongly")
@pytest.mark.parametrize("captured", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
    "settings", [WAYS[0], *(pytest.param(way, marks=pytest.mark.slow) for way in WAYS[1:])]
)
def test_recheck_same_bits(
    tmp_path: Path, tokens: Path, plain, settings, captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, moments, metrics and samples are those of a run without it, through a resume."""
    monkeypatch.setattr(step_module, "cuda_graph", lambda function: function)
    computed = []
    compute = step_module.TrainStep.compute
    monkeypatch.setattr(
        step_module.TrainStep, "compute", lambda s: computed.append(s.unread) or compute(s)
    )
    config = small(tmp_path, tokens, recheck_every=2, **settings)
    for resume, stop in ((None, 5), ("latest", 12)):
        trainer = Trainer(config, resume=resume, quiet=True)
        trainer.train_step.capture = captured
        stop_after(trainer, stop)
        trainer.run()
    assert len(computed) == 6 + 2 * captured, "every second step, and once after each capture"
    assert_same_bits(outcome(tmp_path), plain(settings))


def flips_one_bit(call: int) -> Callable[..., Any]:
    """Attention's forward, which in call number `call` flips one bit of one result."""
    forward, calls = native.attention_forward, []

    def attention_forward(*arguments: Any, **keywords: Any) -> Any:
        out, statistics = forward(*arguments, **keywords)
        calls.append(1)
        if len(calls) == call:
            out.view(torch.int32).flatten()[3] ^= 1 << 20
        return out, statistics

    return attention_forward


@pytest.mark.promise("a processor computes wrongly")
@pytest.mark.parametrize("which", [1, 2])
def test_recheck_one_bit(
    tmp_path: Path, tokens: Path, which: int, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """In either computation of step 6: one line, status 2; nothing of that step is left."""
    small(tmp_path, tokens, recheck_every=3, save_every=2, log_every=1, eval_every=5).save(
        tmp_path / "config.yaml"
    )
    # a call a step in one block; step 3 has two; the validation after step 5 has two batches
    calls = 5 + 1 + 2 + which
    monkeypatch.setattr(native, "attention_forward", flips_one_bit(calls))
    assert main(["train", "--config", str(tmp_path / "config.yaml")]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: step 6: loss: expected the same bits when computed twice, got ")
    latest = checkpoints(tmp_path) / "latest.pt"
    assert " on cpu: a processor or its memory computes wrongly; " in said
    assert said.endswith(f"the last checkpoint is {latest} (step 5)")
    assert state_file.load(latest)["progress"]["step"] == 5
    assert max(r["step"] for r in read_records(metrics_file(tmp_path))) == 5
    assert not list((tmp_path / "checkpoints" / NAME).glob("*06*"))


@pytest.mark.parametrize(
    ("first", "second", "name"),
    [
        ((0.0, 1.0, 2.0), (0.0, 1.0, 2.0), None),
        ((0.0, math.nan, math.inf), (0.0, -math.nan, math.inf), None),
        ((0.0, 1.0, 2.0), (0.0, math.nextafter(1.0, 2), 2.0), "loss"),
        ((0.0, 1.0, 2.0), (0.0, 1.0, math.nextafter(2.0, 3)), "gradient norm"),
        ((0.0, 0.0, 2.0), (0.0, -0.0, 2.0), "loss"),
        ((0.0, 1.0, math.nan), (0.0, 1.0, 2.0), "gradient norm"),
    ],
)
def test_require_same_bits(first, second, name: str | None) -> None:
    def compare() -> None:
        a, b = (torch.tensor(x, dtype=torch.float64) for x in (first, second))
        require_same(a, b, 7, World())

    if name is None:
        compare()
        return
    with pytest.raises(MantransError, match=rf"^step 7: {name}: .*; no checkpoint is saved$"):
        compare()


class Told(World):
    """One of three ranks; the other two have told this."""

    def __init__(self, *others: Any) -> None:
        super().__init__(rank=0, size=3)
        self.others = [json.dumps([[x.hex() for x in part] for part in pair]) for pair in others]

    def texts(self, key: str, text: str) -> list[str]:
        return [text, *self.others]


@pytest.mark.parametrize(
    ("other", "where"),
    [
        (((1.0, 6.0, 2.0), (1.5, 6.5, 2.5)), "loss of its micro-batches.* on rank 2: "),
        (((1.0, 6.0, 2.0), (1.0, 6.0, 2.5)), "gradient norm.* on one of 3 ranks: "),
    ],
)
def test_require_same_bits_of_ranks(other: Any, where: str) -> None:
    """Found by a rank that sees nothing itself."""
    fine = ((1.0, 6.0, 2.0), (1.0, 6.0, 2.0))
    a, b = (torch.tensor(x, dtype=torch.float64) for x in fine)
    with pytest.raises(RanksError, match=f"^step 7: {where}"):
        require_same(a, b, 7, Told(fine, other))
    require_same(a, b, 7, Told(fine, fine))
