"""`mantrans verify`: a run is computed again, and one changed bit of its record is found."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mantrans.checkpoint import state_file
from mantrans.cli import main
from mantrans.records import read_records
from tests.support.damage import damaged
from tests.support.runs import checkpoints, finish, metrics_file, small

NAME = "blocks.0.attention.qkv.weight"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 steps: lines at 5, 10, 12, validation at 6 and 12, checkpoints at 4, 6, 8, 12."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("finished")
    finish(small(folder, folder / "tokens", keep_checkpoints=9, outlier_z_score=9.0))
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it to change."""
    for place in ("runs", "checkpoints"):
        shutil.copytree(finished / place, tmp_path / place, symlinks=True)
    config = tmp_path / "runs" / "small" / "config.yaml"  # leads to the checkpoints
    config.write_text(config.read_text().replace(str(finished / "c"), str(tmp_path / "c")))
    return tmp_path


def verified(run: Path, start: int, steps: int, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says: the verdict with its status, or the error."""
    folder = run / "runs" / "small"
    status = main(["verify", str(folder), "--from", str(start), "--steps", str(steps)])
    shown = capsys.readouterr()
    [line] = (shown.out + shown.err).splitlines()
    assert len(line) < 500
    return f"{status} {line}"


def changed(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Save the checkpoint again after `change(state)`, with valid checksums."""
    state, saves = state_file.load(path), state_file.order(path)
    assert saves is not None
    change(state)
    path.unlink()
    state_file.save(path, state, saves=saves.saves)


def altered(path: Path, name: str, place: tuple[int, ...], part: str = "parameters") -> None:
    """The last bit of one element is flipped."""

    def flip(state: dict[str, Any]) -> None:
        tensor = (state["optimizer_state"]["exp_avg"] if part == "moments" else state[part])[name]
        tensor.view(torch.int32)[place] ^= 1

    changed(path, flip)


def contents(run: Path) -> dict[str, tuple[str, int]]:
    return {
        str(file): (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns)
        for file in sorted(run.rglob("*")) if file.is_file()
    }  # fmt: skip


@pytest.mark.promise("verified on demand")
def test_verify_good_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole stretch, a stretch between two lines, and one without a checkpoint."""
    before = contents(run)
    expected = "0 8 steps, every bit equal: 5 lines of metrics and all of "
    assert verified(run, 4, 8, capsys) == expected + (
        "step_00000006.pt, step_00000008.pt, step_00000012.pt"
    )
    assert verified(run, 6, 2, capsys) == "0 2 steps, every bit equal: all of step_00000008.pt"
    found = verified(run, 8, 2, capsys)
    assert found.startswith("0 2 steps, every bit equal: 1 line of metrics (no checkpoint lies")
    assert contents(run) == before


@pytest.mark.promise("verified on demand")
@pytest.mark.parametrize(("part", "shown"), [("parameters", ""), ("moments", "state.exp_avg.")])
def test_verify_weight_altered(
    run: Path, capsys: pytest.CaptureFixture[str], part: str, shown: str
) -> None:
    """By someone who also writes valid checksums; the first of two such bits is named."""
    for place in ((3, 7), (5, 1)):
        altered(checkpoints(run) / "step_00000008.pt", NAME, place, part)
    found = verified(run, 4, 8, capsys)
    assert f"{shown}{NAME}[3, 7]: recorded " in found and found.startswith("1 step 8: ")
    recorded, recomputed = (int(words.split(")")[0], 16) for words in found.split("(0x")[1:3])
    assert recorded ^ recomputed == 1
    assert "(step_00000008.pt)" in found and found.endswith("computed wrongly")


@pytest.mark.promise("verified on demand")
def test_verify_counter_altered(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the run, and of the guard, which is a tensor."""
    file = checkpoints(run) / "step_00000008.pt"
    changed(file, lambda state: state["progress"].update(best_step=7))
    found = verified(run, 6, 2, capsys)
    assert found.startswith("1 step 8: best_step: recorded 7, recomputed 6 (step_00000008.pt)")
    changed(file, lambda state: state["guard"]["count"].add_(1))
    assert verified(run, 6, 2, capsys).startswith("1 step 8: guard.count[]: recorded 9 (0x0")


@pytest.mark.promise("verified on demand")
def test_verify_checkpoint_damaged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The checksum finds it before anything is computed, at either end."""
    file = checkpoints(run) / "step_00000008.pt"
    whole = file.read_bytes()
    file.unlink()  # the other names of the file keep theirs
    for place in (len(whole) - 5000, 20):
        file.write_bytes(damaged(whole, random.Random(3), place))
        for start, steps in ((4, 8), (8, 4)):
            found = verified(run, start, steps, capsys)
            assert found.startswith(f"2 error: {file}: is damaged or not a checkpoint: ")


@pytest.mark.promise("verified on demand")
@pytest.mark.parametrize(
    ("step", "field"),
    [
        (6, "validation_loss"),
        pytest.param(5, "loss", marks=pytest.mark.slow),
        pytest.param(10, "grad_norm", marks=pytest.mark.slow),
        pytest.param(12, "skipped", marks=pytest.mark.slow),
    ],
)
def test_verify_metric_altered(
    run: Path, capsys: pytest.CaptureFixture[str], step: int, field: str
) -> None:
    file = metrics_file(run)
    lines = read_records(file)
    line = next(line for line in lines if line["step"] == step and field in line)
    was = line[field]
    line[field] = was + 1 if isinstance(was, int) else was * (1 + 2**-52)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = verified(run, 4, 8, capsys)
    assert found.startswith(f"1 step {step}: {field}: recorded {line[field]!r}, recomputed {was!r}")
    lines.remove(line)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert verified(run, 4, 8, capsys).startswith(f"1 step {step}: metrics: ")


def test_verify_changed_since(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever is not as it was is named as the likely cause of a difference, and only then."""
    file = run / "runs" / "small" / "versions.json"
    found = json.loads(file.read_text())
    file.write_text(json.dumps(found | {"torch": "1.0", "device": "H100"}))
    assert verified(run, 6, 2, capsys).startswith("0 2 steps, every bit equal")
    altered(checkpoints(run) / "step_00000008.pt", NAME, (0, 0))
    end = f"likely cause: device H100 on record, cpu here; torch 1.0 on record, {torch.__version__}"
    assert verified(run, 6, 2, capsys).endswith(f"{end} here")


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_verify_settings_changed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that went on with other settings: they are named, and cannot lead beyond its end."""
    file = checkpoints(run) / "step_00000006.pt"
    changed(file, lambda state: state["config"]["training"].update(learning_rate=0.1))
    found = verified(run, 6, 2, capsys)
    assert found.startswith("1 step 8: ") and found.endswith(
        "likely cause: the run was resumed with training.learning_rate 0.1 → 0.005"
    )
    changed(file, lambda state: state["config"]["training"].update(max_steps=7))
    expected = (
        "2 error: --steps: expected at most 1, since the configuration of the checkpoint ends"
    )
    assert verified(run, 6, 2, capsys).startswith(f"{expected} at step 7, got 2")


def test_verify_without_its_gpu(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run of a GPU is not computed on a CPU, whose bits are others."""
    if torch.cuda.is_available():
        pytest.skip("there is one")
    file = run / "runs" / "small" / "versions.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"device": "H100"}))
    for device in ("cuda", "auto"):
        changed(
            checkpoints(run) / "step_00000006.pt",
            lambda state, device=device: state["config"]["training"].update(device=device),
        )
        expected = "2 error: device: expected H100, which the run was recorded on, got no GPU"
        assert verified(run, 6, 2, capsys).startswith(expected)


def test_verify_threads_recorded(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run's number of threads is used, not this process's."""
    torch.set_num_threads(2)
    assert verified(run, 6, 2, capsys).startswith("0 2 steps, every bit equal")
    assert torch.get_num_threads() == 1


def test_verify_sends_nothing(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was sent to a tracker is not sent again."""
    changed(
        checkpoints(run) / "step_00000006.pt",
        lambda state: state["config"]["training"].update(tracker="wandb"),
    )
    asked: list[str | None] = []
    monkeypatch.setattr(
        "mantrans.training.tracker.start", lambda config, *_: asked.append(config.training.tracker)
    )
    assert verified(run, 6, 2, capsys).startswith("0 2 steps, every bit equal")
    assert asked == [None]


@pytest.mark.parametrize(
    ("processes", "message"),
    [
        ("2", "got 2: micro-batches of 2 sequences instead of 4, since"),
        ("0", "0 2 steps, every bit equal"),
        ("²", "0 2 steps, every bit equal"),
    ],
)
def test_verify_processes(
    run: Path, capsys: pytest.CaptureFixture[str], processes: str, message: str
) -> None:
    """A run of so many that one computes other bits is refused; it is not called damaged."""
    file = run / "runs" / "small" / "versions.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"processes": processes}))
    found = verified(run, 6, 2, capsys)
    if message[0] != "0":
        expected = "processes: expected a run that one process can compute again, "
        message = f"2 error: {file}: {expected}{message}"
    assert found.startswith(message)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_verify_under_torchrun(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, rank: str
) -> None:
    """One line, of the first process."""
    for name, value in (("WORLD_SIZE", "2"), ("RANK", rank), ("LOCAL_RANK", rank)):
        monkeypatch.setenv(name, value)
    assert main(["verify", str(run / "runs" / "small"), "--from", "6", "--steps", "2"]) == 2
    said = "error: WORLD_SIZE: expected 1, since one process computes what several have trained, "
    assert capsys.readouterr().err == (said + "got 2; run it without torchrun\n") * (rank == "0")


REFUSED = {
    (5, 2): "--from: expected a step with a checkpoint in {}/checkpoints/small (4, 6, 8, 12), got",
    (4, 9): "--steps: expected at most 8, which are on record after step 4, got 9",
    (12, 1): "--steps: expected at most 0, which are on record after step 12, got 1",
    (6, 1): "--steps: expected at least 2: nothing is on record between the steps 6 and 8, got 1",
}


@pytest.mark.parametrize(("stretch", "message"), REFUSED.items())
def test_verify_refused(
    run: Path, capsys: pytest.CaptureFixture[str], stretch: tuple[int, int], message: str
) -> None:
    assert verified(run, *stretch, capsys).startswith(f"2 error: {message.format(run)}")


def test_verify_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["verify", "none", "--from", "4", "--steps", "1"]) == 2
    assert capsys.readouterr().err.startswith("error: RUN: expected ")
