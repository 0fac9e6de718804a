"""Whole runs: they learn, they can be stopped anywhere and resumed to the same bits, they end."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from benchmarks.harness import peak_on_cpu
from mantrans import CustomTransformerWrapper, finite
from mantrans.checkpoint import state_file
from mantrans.errors import CheckpointError, ConfigError, MantransError
from mantrans.optim.schedule import scheduled_learning_rate
from mantrans.records import read_records
from mantrans.training import memory
from mantrans.training.restoring import load_state
from mantrans.training.resume import Checkpoint
from mantrans.training.trainer import Trainer
from tests.support.compare import assert_same_bits
from tests.support.runs import finish, outcome, small, stop_after

ROOT = Path(__file__).parents[3]
REAL_TEXT = ROOT.parent / "shared" / "data" / "tinystories_sample.txt"


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of token files that all runs share."""
    return tmp_path_factory.mktemp("tokens")


@pytest.mark.promise("interrupted anywhere")
@pytest.mark.parametrize(
    "stop", [5, pytest.param(1, marks=pytest.mark.slow), pytest.param(7, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"model": {"dtype": "bfloat16"}, "gradient_accumulation_steps": 2,
         "outlier_z_score": 3.0, "outlier_window": 8},
        {"optimizer": "sgd", "num_epochs": 2, "max_steps": None, "data": {"subset_size": 3}},
        {"model": {"dtype": "bfloat16"}, "stochastic_rounding": True,
         "data": {"attend_across_documents": False}},
    ],
    ids=["plain", "bf16, accumulation, guard", "sgd over two epochs", "stochastic, documents"],
)  # fmt: skip
def test_resume_equals_unbroken(tmp_path, tokens, settings, stop) -> None:
    """The settings that tests/end_to_end/test_resume.py, at every step, leaves out."""
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    Trainer(small(unbroken, tokens, **settings), quiet=True).run()
    first = Trainer(small(broken, tokens, **settings), quiet=True)
    stop_after(first, stop)
    assert first.run() is None
    resumed = Trainer(small(broken, tokens, **settings), resume="latest", quiet=True)
    assert resumed.progress.step == stop
    resumed.run()
    assert_same_bits(outcome(broken), outcome(unbroken))


@pytest.mark.promise("logits at a time")
@pytest.mark.parametrize(
    "recorded", [7, *(pytest.param(x, marks=pytest.mark.slow) for x in (None, "absent"))]
)
def test_resume_chunk_rows(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, recorded: int | str | None
) -> None:
    """Whatever memory would choose now, the checkpoint's count of rows stays: the bits depend on
    it. A checkpoint from before there was a count goes on with the backend's own."""

    def memory_chooses(rows: int | None) -> None:
        monkeypatch.setattr(memory, "logits_chunk_rows", lambda *_: rows)

    memory_chooses(7 if recorded == 7 else None)
    Trainer(small(tmp_path / "unbroken", tokens), quiet=True).run()
    memory_chooses(11)
    Trainer(small(tmp_path / "other", tokens), quiet=True).run()
    expected, other = outcome(tmp_path / "unbroken"), outcome(tmp_path / "other")
    expected_rows = None if recorded == "absent" else recorded
    assert expected["latest.pt"]["logits_chunk_rows"] == expected_rows
    names = ("token_embedding.weight", "position_embedding.weight")
    assert any(
        not torch.equal(*(o["latest.pt"]["parameters"][name] for o in (expected, other)))
        for name in names
    ), "the test cannot fail: 11 rows at a time give the same bits"

    memory_chooses(expected_rows)
    trainer = Trainer(small(tmp_path / "broken", tokens), quiet=True)
    stop_after(trainer, 5)
    trainer.run()
    path = tmp_path / "broken" / "checkpoints" / "small" / "latest.pt"
    if recorded == "absent":
        state = state_file.load(path)
        del state["logits_chunk_rows"]
        state_file.save(path, state)
    memory_chooses(11)
    trainer = Trainer(small(tmp_path / "broken", tokens), resume=str(path), quiet=True)
    assert trainer.wrapper.model.output.chunk_rows == expected_rows
    trainer.run()
    assert_same_bits(outcome(tmp_path / "broken"), expected)


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> Path:
    """The last checkpoint of a run."""
    folder = tmp_path_factory.mktemp("four")
    finish(small(folder, tokens, max_steps=4))
    return folder / "checkpoints" / "small" / "latest.pt"


@pytest.mark.parametrize("odd", [0, -1, True, 7.0, "7", [7], 2**70])
def test_chunk_rows_odd(tmp_path: Path, tokens: Path, four_steps: Path, odd: object) -> None:
    path = tmp_path / "odd.pt"
    state_file.save(path, {**state_file.load(four_steps), "logits_chunk_rows": odd})
    config = small(tmp_path, tokens, max_steps=6)
    if odd == 2**70:  # as good as all rows
        finish(config, resume=str(path))
        return
    with pytest.raises(CheckpointError, match="logits_chunk_rows: expected a count") as refusal:
        Trainer(config, resume=str(path), quiet=True)
    assert "\n" not in str(refusal.value)


def test_log_lines_once(tmp_path: Path, tokens: Path) -> None:
    config = small(tmp_path, tokens)
    Trainer(config, quiet=True).run()
    records = read_records(tmp_path / "runs" / "small" / "metrics.jsonl")
    assert [r["step"] for r in records if "loss" in r] == [5, 10, 12]
    assert [r["step"] for r in records if "validation_loss" in r] == [6, 12]
    rates = {r["step"]: r["learning_rate"] for r in records if "loss" in r}
    trainer = Trainer(config, resume="latest", quiet=True)
    assert rates == {step: trainer.learning_rate(step - 1) for step in rates}
    timings = read_records(tmp_path / "runs" / "small" / "timings.jsonl")
    assert all(r["tokens_per_second"] > 0 and 0 < r["share_of_peak"] < 1 for r in timings)


def test_describe_memory_and_peak(tmp_path: Path, tokens: Path) -> None:
    """At the start: memory by kind, what is free, and the peak that shares are of."""
    trainer = Trainer(small(tmp_path, tokens, model={"dtype": "bfloat16"}), quiet=True)
    model, memory_line, *_ = trainer.describe().splitlines()
    assert re.search(r"; products at most [0-9.]+ TFLOP/s \(measured\)$", model)
    p = trainer.wrapper.model.parameters
    kinds = r"memory   weights (.*), masters (.*), moments (.*), gradients (.*), activations .*, "
    found = re.fullmatch(kinds + r"workspaces .*; .* of .*iB free", memory_line)
    assert found, memory_line
    flat = p.gradients.nbytes
    expected = (p.weights.nbytes, flat, 2 * flat, flat)
    assert found.groups() == tuple(f"{count / 2**20:.1f} MiB" for count in expected)


def test_save_and_load_memory(tmp_path: Path, tokens: Path) -> None:
    """Neither copies a buffer of all weights, masters or moments."""
    wide = {"d_model": 512, "n_blocks": 2, "d_ffn": 2048, "dtype": "bfloat16"}
    trainer = Trainer(small(tmp_path, tokens, model=wide), quiet=True)
    p = trainer.wrapper.model.parameters
    assert p.weights.nbytes > finite.WORKSPACE
    taken = peak_on_cpu([], lambda: trainer._save(best=False, must_succeed=True))
    checkpoint = Checkpoint.load(trainer.folder.latest)
    again = peak_on_cpu([], lambda: load_state(trainer, checkpoint))
    trainer.logger.close()
    trainer.folders.close()
    assert max(taken, again) <= finite.WORKSPACE


def test_train_stories(tmp_path: Path, tokens: Path) -> None:
    """Thirty steps on TinyStories: the loss falls from that of guessing to well below it."""
    if not REAL_TEXT.exists():
        pytest.skip("the TinyStories sample is not beside this checkout")
    config = small(
        tmp_path, tokens, max_steps=30, log_every=1, eval_every=30, save_every=30, batch_size=8,
        model={"d_model": 32, "n_blocks": 2, "d_ffn": 64, "max_seq_len": 32},
        data={"path": str(REAL_TEXT), "subset_size": 200, "tokenizer": "tinystories_bpe_4096"},
    )  # fmt: skip
    report = Trainer(config, quiet=True).run()
    records = read_records(tmp_path / "runs" / "small" / "metrics.jsonl")
    losses = [r["loss"] for r in records if "loss" in r]
    assert len(losses) == 30 and abs(losses[0] - math.log(4096)) < 0.2
    assert sum(losses[-5:]) / 5 < losses[0] - 1.5
    assert report["bits_per_byte"] < math.log2(4096) / 3.6


@pytest.mark.promise("too many skips")
def test_train_not_finite(tmp_path: Path, tokens: Path) -> None:
    """Steps that are not finite end the run with a report."""
    trainer = Trainer(small(tmp_path, tokens, max_consecutive_skips=3, log_every=1), quiet=True)
    advance = trainer._advance

    def poison() -> None:
        if trainer.progress.step == 6:
            weights = dict(trainer.wrapper.model.named_parameters())
            weights["blocks.0.mlp.up.bias"][3] = math.inf
        advance()

    trainer._advance = poison
    with pytest.raises(MantransError) as stopped:
        trainer.run()
    message = str(stopped.value)
    assert message.startswith("step 9: 3 steps in a row not finite")
    assert "blocks.0.mlp.up.bias" in message and "latest.pt" in message
    state = state_file.load(tmp_path / "checkpoints" / "small" / "latest.pt")
    assert all(x.isfinite().all() for x in state["parameters"].values())


def test_resume_refuses(tmp_path: Path, tokens: Path) -> None:
    """Resume refuses what it cannot continue."""
    config = small(tmp_path, tokens, max_steps=4)
    Trainer(config, quiet=True).run()
    with pytest.raises(CheckpointError, match=r"expected a checkpoint .*, got no such file"):
        Trainer(config, resume=str(tmp_path / "absent.pt"), quiet=True)
    wrapper = CustomTransformerWrapper(vocab_size=257, d_model=16, n_blocks=1, n_heads=2)
    wrapper.save_checkpoint(tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="expected a run's checkpoint, got a model"):
        Trainer(config, resume=str(tmp_path / "model.pt"), quiet=True)
    config.model.d_model = 64
    with pytest.raises(CheckpointError, match="d_model: expected 16, as in the checkpoint, got 64"):
        Trainer(config, resume="latest", quiet=True)


def test_vocab_size_mismatch(tmp_path: Path, tokens: Path) -> None:
    """A vocabulary that does not match is refused."""
    config = small(tmp_path, tokens)
    config.model.vocab_size = 5000
    with pytest.raises(ConfigError, match=r"model\.vocab_size: expected null or 257.*, got 5000"):
        Trainer(config, quiet=True)


def test_schedules() -> None:
    def rates(decay: str, **options) -> list[float]:
        return [
            scheduled_learning_rate(s, 100, 1.0, warmup_steps=10, decay=decay, **options)
            for s in range(100)
        ]

    for decay in ("constant", "linear", "cosine", "wsd"):
        values = rates(decay, minimum=0.1)
        assert values[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
        assert values[99] == pytest.approx(1.0 if decay == "constant" else 0.1)
        after = values[10:]
        assert all(a >= b for a, b in pairwise(after))
    middle = (10 + 99) // 2
    assert rates("linear")[middle] == pytest.approx(0.5, abs=0.01)
    assert rates("cosine")[middle] == pytest.approx(0.5, abs=0.02)
    wsd = rates("wsd", decay_fraction=0.2)
    assert wsd[80] == 1.0 and wsd[81] < 1.0
