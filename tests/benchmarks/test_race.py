"""The race's own logic, on a tiny model and text: what a recipe sees, and how it is measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import machine, race
from benchmarks.harness import Recorder, load, newest
from benchmarks.race import OURS, Race, Recipe
from benchmarks.report import frame, picture_of_race, table_of_race
from mantrans.data.holdout import held_out
from mantrans.data.stories import stories

CONFIG = """\
model: {d_model: 32, n_blocks: 1, n_heads: 2, d_ffn: 64, max_seq_len: 16}
data: {tokenizer: unused}
training: {max_steps: 10, batch_size: 2, learning_rate: 1.0e-3, experiment_name: race}
"""
STORIES = stories()[:60]

pytestmark = pytest.mark.skipif(machine.device().type != "cpu", reason="a CPU's settings")


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    monkeypatch.setattr(race, "CONFIG", tmp_path / "tiny.yaml")
    monkeypatch.setattr(race, "SHAPE", ())
    monkeypatch.setattr(race, "VOCABULARY", 300)
    monkeypatch.setattr(machine, "has_native_bfloat16", lambda: False)
    path = tmp_path / "stories.txt"
    path.write_text("<|endoftext|>".join(STORIES), encoding="utf-8")
    return path


def test_race_held_out(text: Path, tmp_path: Path) -> None:
    """A recipe trains on the documents that are not held out, and is measured on the others."""
    ready = Race(Recipe(OURS), text, 1, tmp_path)
    decode = ready.tokenizer.decode
    trained = decode(ready.trainer.train_step.source.loader.stream.tokens.tolist())
    measured = decode(ready.held_out.tokens.tolist())
    for number, story in enumerate(STORIES):
        held = held_out(number, race.HELD_OUT)
        assert (story in measured, story in trained) == (held, not held)


def test_race_same_start(text: Path, tmp_path: Path) -> None:
    """Under the same settings ours and autograd begin and learn alike: the measure is the same.

    Float32 on both sides; three steps of AdamW turn roundings of 1e-7 into some 1e-5 of a weight.
    """
    across = Recipe(OURS, ("data.attend_across_documents=true", "model.dtype=float32"))
    runs = [
        Race(across._replace(provider=who), text, 1, tmp_path) for who in (OURS, "PyTorch eager")
    ]
    for tolerance in (1e-6, 1e-4):
        ours, theirs = (run._bits_per_byte() for run in runs)
        assert ours == pytest.approx(theirs, rel=tolerance)
        start = ours
        for run in runs:
            for step in range(3):
                run.trainer.step(step, 1e-2)
    assert runs[0]._bits_per_byte() < start - 0.1


def test_race_recorded(text: Path, tmp_path: Path) -> None:
    """A curve ends when the time is over; the report has a line and a picture of it."""
    ready = Race(Recipe(OURS), text, 1, tmp_path)
    rates = []
    step = ready.trainer.step
    ready.trainer.step = lambda number, rate: (rates.append(rate), step(number, rate))
    curve = ready.run(0.2, points=4)
    assert [point.wall >= 0.2 * (i + 1) / 4 for i, point in enumerate(curve)] == [True] * 4
    assert curve[-1].tokens == (len(rates) - race.WARM_UP) * 32
    assert curve[-1].bits_per_byte < curve[0].bits_per_byte
    assert rates[race.WARM_UP :] == sorted(rates[race.WARM_UP :], reverse=True)
    recorder = Recorder(tmp_path / "out", "race")
    race._record(recorder, "stories", "ours", 0.2, ready, curve)
    data = frame(newest(load(tmp_path / "out")), "race")
    assert f"{curve[-1].bits_per_byte:.3f}" in table_of_race(data)
    assert len(picture_of_race(data).axes[0].lines) == 2  # the curve, and the legend's
