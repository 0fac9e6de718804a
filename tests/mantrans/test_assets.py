"""What comes with the package is found from any folder, and gives way to what lies there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mantrans.assets import ASSETS
from mantrans.config import Config
from mantrans.data.tokenizer import SHIPPED, load_tokenizer
from mantrans.errors import ConfigError

ROOT = Path(__file__).parents[2]
NAME = "tinystories_bpe_4096"


def test_assets_folders() -> None:
    """The package's folders are those at the top."""
    assert (ASSETS / "configs").resolve() == ROOT / "configs"
    assert SHIPPED.resolve() == ROOT / "assets/models/tokenizers"


def test_config_lookup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder's own, or the shipped one."""
    monkeypatch.chdir(tmp_path)
    shipped = Config.load("configs/quickstart.yaml")
    assert shipped == Config.load(ROOT / "configs/quickstart.yaml")
    for name in ("configs/nope.yaml", "quickstart.yaml", "other/configs/quickstart.yaml"):
        with pytest.raises(ConfigError, match=rf"^{name}: cannot be read \(No such file"):
            Config.load(name)
    Path("configs").mkdir()
    Path("configs/quickstart.yaml").write_text("training: {max_steps: 3}")
    assert Config.load("configs/quickstart.yaml").training.max_steps == 3


def test_tokenizer_lookup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path, the folder's own, or the shipped one."""
    monkeypatch.chdir(tmp_path)
    hashes = [load_tokenizer(NAME).hash]
    content = json.loads((SHIPPED / NAME / "tokenizer.json").read_text(encoding="utf-8"))
    merges = content["model"]["merges"]
    for folder in (Path("assets/models/tokenizers", NAME), Path(NAME)):
        folder.mkdir(parents=True)
        merges[-1], merges[-2 - len(hashes)] = merges[-2 - len(hashes)], merges[-1]
        (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
        hashes.append(load_tokenizer(NAME).hash)
    assert len(set(hashes)) == 3
    assert hashes[1] == load_tokenizer(Path("assets/models/tokenizers", NAME)).hash
