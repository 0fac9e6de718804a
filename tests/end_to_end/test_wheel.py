"""What `python -m build` packs, and that a machine with nothing else of this project can train."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import pytest

from tests.support.installed import ROOT, Environment, build, copy_sources, run
from tests.support.readme import own_text_commands, write_own_texts

NAME = "tinystories_bpe_4096"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a user's clone may look: with a tokenizer of their own, which is not ours to pack."""
    folder = copy_sources(tmp_path_factory.mktemp("sources"))
    own = folder / "assets/models/tokenizers/their_own"
    own.mkdir()
    (own / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(sources, tmp_path_factory.mktemp("wheel"), "--wheel")


def contents(wheel: Path) -> dict[str, bytes]:
    """What lies in a wheel beside its own description."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        return {name: archive.read(name) for name in names}


def test_wheel_contents(wheel: Path) -> None:
    """A wheel holds the package and nothing else."""
    expected = {}
    for folder, _, files in os.walk(ROOT / "mantrans", followlinks=True):
        tokenizers = Path(folder).parent.name == "tokenizers"
        if Path(folder).name != "__pycache__" and (not tokenizers or Path(folder).name == NAME):
            for path in (Path(folder, file) for file in files):
                expected[str(path.relative_to(ROOT))] = path.read_bytes()
    assert contents(wheel) == expected
    for name in (
        "kernels/reference.py", "kernels/triton/attention.py", "assets/configs/quickstart.yaml",
        f"assets/tokenizers/{NAME}/tokenizer.json", "assets/stories/stories.txt.xz",
    ):  # fmt: skip
        assert f"mantrans/{name}" in expected


@pytest.mark.slow
def test_wheel_from_source_archive(sources: Path, wheel: Path, tmp_path: Path) -> None:
    """It is the same as the one from the clone."""
    assert contents(build(sources, tmp_path)) == contents(wheel)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("installed") / "environment")
    environment.install_ours(wheel)
    return environment


@pytest.mark.slow
def test_wheel_quickstart(installed: Environment, tmp_path: Path) -> None:
    """The quickstart trains outside the clone."""
    settings = [
        "--set=training.max_steps=20", "--set=training.log_every=10", "--set=training.device=cpu",
        "--set=training.eval_batches=2", "--set=evaluation.max_generation_length=30",
    ]  # fmt: skip
    command = installed.folder / "bin" / "mantrans"
    run(command, "train", *settings, cwd=tmp_path, OMP_NUM_THREADS="1")
    records = (tmp_path / "runs/quickstart/metrics.jsonl").read_text().splitlines()
    losses = [row["loss"] for row in map(json.loads, records) if "loss" in row]
    assert losses[-1] < losses[0]
    report = json.loads((tmp_path / "runs/quickstart/report.json").read_text())
    assert report["run"]["step"] == 20

    loaded = "import sys, mantrans.training.trainer as t, mantrans.kernels.native as n"
    places = run(installed.python, "-c", f"{loaded}; print(t.__file__, n.__file__)", cwd=tmp_path)
    assert all(Path(place).is_relative_to(installed.packages) for place in places.split())


EXPORT = """
from mantrans import CustomTransformerWrapper
from mantrans.data.tokenizer import load_tokenizer
model = CustomTransformerWrapper.from_checkpoint("checkpoints/local/best.pt", device="cpu")
model.save_pretrained("folder", load_tokenizer("tokenizers/mine"))
from transformers import AutoModelForCausalLM, AutoTokenizer
theirs, tokenizer = (x.from_pretrained("folder") for x in (AutoModelForCausalLM, AutoTokenizer))
ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
print(tokenizer.decode(theirs.generate(ids, max_length=12)[0]))
"""


@pytest.mark.promise("README's commands")
@pytest.mark.slow
def test_wheel_own_text(installed: Environment, tmp_path: Path) -> None:
    """The README's commands; then the model and its tokenizer as a folder for transformers."""
    write_own_texts(tmp_path)
    command = installed.folder / "bin" / "mantrans"
    said = [run(command, *line, cwd=tmp_path, OMP_NUM_THREADS="1") for line in own_text_commands()]
    assert "bits per byte" in said[3] and said[4].startswith("Once upon a time")
    exported = run(installed.python, "-c", EXPORT, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert exported.startswith("Once upon a time")


@pytest.mark.slow
def test_wheel_uninstalled(sources: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "environment")
    before = environment.files()
    environment.install_ours(sources)
    run(environment.python, "-c", "import mantrans", cwd=tmp_path)
    added = {path.removeprefix(f"{environment.packages.relative_to(environment.folder)}/")
             for path in environment.files() - before}  # fmt: skip
    assert {path.split("/")[0] for path in added} <= {"bin", "mantrans", "mantrans-0.1.0.dist-info"}
    environment.pip("uninstall", "--yes", "mantrans")
    assert environment.files() == before
    assert not (environment.packages / "mantrans").exists()
