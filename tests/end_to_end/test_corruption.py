"""Files that were cut short or changed: found by name, and passed over where there is another."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mantrans.checkpoint import state_file
from mantrans.checkpoint.folder import newest_intact
from mantrans.config import Config
from mantrans.data.dataset import prepare
from mantrans.data.tokenizer import SHIPPED, load_tokenizer
from mantrans.errors import CheckpointError, DataError
from tests.support.compare import assert_same_bits
from tests.support.damage import damaged
from tests.support.processes import Processes
from tests.support.runs import checkpoints, finish, outcome, small, stop_after

MANY = pytest.param(4000, marks=pytest.mark.slow)


@pytest.fixture
def interrupted(tmp_path: Path, tokens: Path) -> Config:
    """A run of 12 steps that was stopped after 9: checkpoints of steps 4, 6, 8 and 9."""
    config = small(tmp_path / "broken", tokens, keep_checkpoints=4)
    finish(config, lambda trainer: stop_after(trainer, 9))
    return config


@pytest.mark.promise("damaged checkpoint")
@pytest.mark.parametrize("trials", [200, MANY])
def test_checkpoint_damaged(
    tmp_path: Path, interrupted: Config, trials: int, record_property: Callable
) -> None:
    """Anywhere in a real run's file: half of the flips in its first and last 4 KiB, where the
    structure is, the others in the tensors; and every length down to nothing."""
    folder = checkpoints(tmp_path / "broken")
    path = folder / "latest.pt"
    whole = path.read_bytes()
    chance = random.Random(trials)
    edge = 2**12
    for trial in range(trials):
        if trial % 2:
            place = chance.randrange(len(whole))
        else:
            place = (chance.randrange(2 * edge) - edge) % len(whole)
        path.write_bytes(damaged(whole, chance, place))
        with pytest.raises(CheckpointError, match=r"latest\.pt: .*latest"):
            state_file.verify(path)
        length = chance.randrange(len(whole)) if trial % 4 else len(whole) - 1 - trial // 4
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"latest\.pt: .*cut short|does not begin"):
            state_file.verify(path)
    record_property("bytes flipped", trials)
    record_property("truncations", trials)
    record_property("not detected", 0)


@pytest.mark.promise("newest intact checkpoint")
@pytest.mark.parametrize("trials", [12, pytest.param(300, marks=pytest.mark.slow)])
def test_latest_intact_newest_damaged(
    tmp_path: Path, interrupted: Config, trials: int, record_property: Callable
) -> None:
    """Any number of the newest are damaged in any way: the choice is the newest of the others."""
    folder = checkpoints(tmp_path / "broken")
    kept = tmp_path / "kept"
    shutil.copytree(folder, kept)
    chance = random.Random(1)
    newest_first = ["step_00000009.pt", "step_00000008.pt", "step_00000006.pt", "step_00000004.pt"]
    for _ in range(trials):
        bad = chance.randrange(1, 4)
        for number, name in enumerate(reversed(newest_first)):
            whole = (kept / name).read_bytes()
            if number >= 4 - bad:
                cut = whole[: chance.randrange(len(whole))]
                whole = chance.choice([cut, damaged(whole, chance), b""])
            (folder / name).write_bytes(whole)
        for name in ("latest.pt", "best.pt"):
            (folder / name).unlink(missing_ok=True)
        path, notes = newest_intact(folder)
        assert path.name == newest_first[bad] and len(notes) == bad
        assert all(name in note for name, note in zip(newest_first, notes, strict=False))
    record_property("folders with damage", trials)
    record_property("wrong choices", 0)


@pytest.mark.promise("newest intact checkpoint")
def test_resume_newest_damaged(
    tmp_path: Path, tokens: Path, processes: Processes, interrupted: Config
) -> None:
    """The two newest are damaged; the resumed run names both and ends as the unbroken one does."""
    finish(small(tmp_path / "unbroken", tokens, keep_checkpoints=4))
    folder = checkpoints(tmp_path / "broken")
    latest = folder / "latest.pt"
    latest.write_bytes(
        damaged(latest.read_bytes(), random.Random(3), 20_000)
    )  # step_00000009.pt is the same file
    eighth = folder / "step_00000008.pt"
    eighth.write_bytes(eighth.read_bytes()[:-1])
    interrupted.save(tmp_path / "config.yaml")
    ended = processes.run("--config", "config.yaml", "--resume", "latest", cwd=tmp_path)
    assert ended.status == 0, ended.text
    assert "latest.pt: is damaged" in ended.text or "step_00000009.pt: is damaged" in ended.text
    assert "step_00000008.pt: is damaged" in ended.text and "at step 6" in ended.text
    assert_same_bits(outcome(tmp_path / "broken"), outcome(tmp_path / "unbroken"))


@pytest.mark.promise("newest intact checkpoint")
def test_resume_nothing_intact(tmp_path: Path, processes: Processes, interrupted: Config) -> None:
    """A run is not silently begun anew."""
    for path in checkpoints(tmp_path / "broken").glob("*.pt"):
        path.write_bytes(path.read_bytes()[:100])
    interrupted.save(tmp_path / "config.yaml")
    ended = processes.run("--config", "config.yaml", "--resume", "latest", cwd=tmp_path)
    assert ended.is_one_line_error and "expected an intact checkpoint" in ended.text


@pytest.mark.promise("damaged tokens and tokenizers")
@pytest.mark.parametrize("trials", [100, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["train.tokens", "validation.tokens"])
def test_token_files_damaged(
    tmp_path: Path, tokens: Path, name: str, trials: int, record_property: Callable
) -> None:
    cache = tmp_path / "tokens"
    data = small(tmp_path, cache).data
    tokenizer = load_tokenizer(data.tokenizer)
    prepare(data, tokenizer, cache_dir=cache, quiet=True)
    (path,) = cache.glob(f"*/{name}")
    whole = path.read_bytes()
    chance = random.Random(0)
    for trial in range(trials):
        broken = damaged(whole, chance)
        if trial % 2:
            broken = whole[: chance.randrange(len(whole))]
        path.write_bytes(broken)
        with pytest.raises(DataError, match=rf"{name} is damaged: .*delete the folder"):
            prepare(data, tokenizer, cache_dir=cache, quiet=True)
    record_property("flips and truncations", trials)
    record_property("not detected", 0)


@pytest.mark.promise("damaged tokens and tokenizers")
def test_train_damaged_tokens_or_tokenizer(tmp_path: Path, processes: Processes) -> None:
    """Run as a command: the file is named, and the advice works."""
    copy = tmp_path / "tokenizer"
    shutil.copytree(SHIPPED / "tinystories_bpe_4096", copy)
    config = small(tmp_path, tmp_path / "cache", data={"tokenizer": str(copy)}, max_steps=2)
    config.save(tmp_path / "config.yaml")
    assert processes.run("--config", "config.yaml", cwd=tmp_path).status == 0

    (path,) = (tmp_path / "cache").glob("*/train.tokens")
    path.write_bytes(damaged(path.read_bytes(), random.Random(0), 5000))
    ended = processes.run("--config", "config.yaml", cwd=tmp_path)
    assert ended.is_one_line_error and f"delete the folder {path.parent}" in ended.text
    shutil.rmtree(path.parent)
    assert processes.run("--config", "config.yaml", cwd=tmp_path).status == 0

    for file, near in (("tokenizer.json", b'"vocab"'), ("manifest.json", b"sha256_of")):
        kept = (copy / file).read_bytes()
        (copy / file).write_bytes(damaged(kept, random.Random(0), kept.index(near) + 40))
        ended = processes.run("--config", "config.yaml", cwd=tmp_path)
        assert ended.is_one_line_error and str(copy) in ended.text
        (copy / file).write_bytes(kept)
    assert processes.run("--config", "config.yaml", cwd=tmp_path).status == 0
