"""Files of the first format (tests/data/v0): a config, a run folder, and two checkpoints.

What this project once wrote stays readable; a checkpoint is converted first.
"""

from __future__ import annotations

import random
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from mantrans import CustomTransformerWrapper, cli
from mantrans.checkpoint.convert import convert
from mantrans.checkpoint.folder import newest_intact
from mantrans.checkpoint.state_file import load
from mantrans.config import Config
from mantrans.errors import CheckpointError
from mantrans.records import read_records
from mantrans.report.page import write_page
from mantrans.training.trainer import Trainer
from tests.support.compare import assert_same_bits
from tests.support.damage import damaged

ROOT = Path(__file__).parents[3]
OLD = ROOT / "tests" / "data" / "v0"
DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


@pytest.fixture
def one_thread() -> Any:
    """Sums are formed in the order of the record."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ------------------------------------------------------------------------ the config and the run


def test_v0_config() -> None:
    """The run folder's config is the file that it was begun with."""
    resolved = Config.load(OLD / "bfloat16" / "config.yaml").to_dict()
    begun_with = Config.load(OLD / "bfloat16.yaml").to_dict()
    # Defaults of that time, which it holds and the file does not.
    assert resolved["evaluation"].pop("batch_size") == 16
    fractions = [c["data"].pop("validation_fraction") for c in (resolved, begun_with)]
    assert fractions[0] == fractions[1]
    assert begun_with["evaluation"].pop("batch_size") is None
    assert resolved == begun_with
    assert resolved["model"]["d_model"] == 16 and resolved["training"]["outlier_window"] == 8
    assert Config.load(OLD / "float32.yaml").model.bias is False


@pytest.mark.promise("first format")
def test_v0_run_folder(tmp_path: Path) -> None:
    """It is read by the records' reader and by the report."""
    records = read_records(OLD / "bfloat16" / "metrics.jsonl")
    assert [record["step"] for record in records] == [3, 4, 6, 8, 8]
    assert records[-1]["validation_loss"] == 5.021440855227411
    folder = Path(shutil.copytree(OLD / "bfloat16", tmp_path / "run"))
    page = write_page(folder).read_text(encoding="utf-8")
    assert "5.021" in page and "Once upon a time" in page and "batch_size" in page


# ------------------------------------------------------------------------------- the checkpoints


@pytest.mark.promise("first format")
@DTYPES
def test_convert_values(tmp_path: Path, dtype: str) -> None:
    """A converted checkpoint has every value of the old one."""
    convert(OLD / f"{dtype}.pt", tmp_path / "new.pt")
    old = torch.load(OLD / f"{dtype}.pt", weights_only=True)
    assert_same_bits(load(tmp_path / "new.pt"), old)
    model = CustomTransformerWrapper.from_checkpoint(tmp_path / "new.pt", device="cpu")
    assert str(model.dtype) == f"torch.{dtype}" and model.model.parameters.updates == 4
    for name, weight in model.model.named_parameters():
        assert torch.equal(weight, old["parameters"][name].to(model.dtype))


@pytest.mark.promise("first format")
@DTYPES
def test_convert_then_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """To step 8, where the old code came from the same checkpoint. Its losses are on record; its
    bits went with its arithmetic: sums and norms have more digits now."""
    monkeypatch.chdir(ROOT)  # the config names the text by its place in the repository
    config = Config.load(
        OLD / f"{dtype}.yaml",
        [
            f"training.output_dir={tmp_path / 'runs'}",
            f"training.checkpoint_dir={tmp_path / 'checkpoints'}",
            f"data.cache_dir={tmp_path / 'tokens'}",
        ],
    )
    run = tmp_path / "runs" / dtype
    if dtype == "bfloat16":
        shutil.copytree(OLD / "bfloat16", run)
    convert(OLD / f"{dtype}.pt", tmp_path / "step_4.pt")
    trainer = Trainer(config, resume=str(tmp_path / "step_4.pt"), quiet=True)
    assert trainer.progress.step == 4 and trainer.guard is not None and trainer.guard.count == 4
    trainer.run()
    assert load(tmp_path / "checkpoints" / dtype / "latest.pt")["progress"]["step"] == 8
    losses = [r["loss"] for r in read_records(run / "metrics.jsonl") if "loss" in r]
    near = {"float32": [5.190091, 5.021438], "bfloat16": [5.307, 5.166522, 5.001333]}[dtype]
    assert losses[-2:] == pytest.approx(near[-2:], abs=1e-2 if dtype == "bfloat16" else 1e-4)


def test_load_v0_names_command(tmp_path: Path) -> None:
    """The normal reader names the command and the command works."""
    old = tmp_path / "old.pt"
    shutil.copy(OLD / "float32.pt", old)
    with pytest.raises(CheckpointError) as caught:
        load(old)
    message = str(caught.value)
    assert "\n" not in message and "the first format, a pickle" in message
    arguments = message.partition("python -m ")[2].split()
    assert arguments == ["mantrans", "convert", str(old), "NEW.pt"]
    assert cli.main([*arguments[1:3], str(tmp_path / "new.pt")]) == 0
    assert load(tmp_path / "new.pt")["progress"]["step"] == 4
    with pytest.raises(CheckpointError, match=r"an intact .*got 1 damaged.*-m mantrans convert"):
        (tmp_path / "run").mkdir()
        newest_intact(old.rename(tmp_path / "run" / "old.pt").parent)


def test_convert_in_place(tmp_path: Path) -> None:
    """A checkpoint is converted in its own place."""
    path = Path(shutil.copy(OLD / "float32.pt", tmp_path / "own.pt"))
    convert(path, path)
    assert load(path)["progress"]["step"] == 4
    assert list(tmp_path.iterdir()) == [path]


def test_convert_damaged(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Bits flipped all over the file; cut short; a zip of something else; no file."""
    whole = (OLD / "float32.pt").read_bytes()
    broken, new = tmp_path / "broken.pt", tmp_path / "new.pt"
    rng = random.Random(0)
    for place in range(0, len(whole), 499):
        broken.write_bytes(damaged(whole, rng, place))
        try:
            convert(broken, new)
        except CheckpointError as error:
            assert str(error).startswith(
                f"{broken}: expected an intact checkpoint of the first format"
            )
        else:  # the bit was in padding, or in something that zip says twice
            assert_same_bits(load(new), torch.load(OLD / "float32.pt", weights_only=True))
            new.unlink()
    broken.write_bytes(whole[:-1])
    assert cli.main(["convert", str(broken), str(new)]) == 2
    with zipfile.ZipFile(broken, "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    assert cli.main(["convert", str(broken), str(new)]) == 2
    assert cli.main(["convert", str(tmp_path / "none.pt"), str(new)]) == 2
    assert not new.exists()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("error: ") for line in lines)
