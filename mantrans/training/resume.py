"""What `--resume` names, and the configuration that a resumed run has.

    latest              the newest intact checkpoint of the experiment
    PATH.pt             that checkpoint
    a run's folder      runs/NAME or checkpoints/NAME: the newest intact checkpoint of that run
    a run's name        the same

Without --config a resumed run has the configuration in its checkpoint, changed by --set.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mantrans.checkpoint import state_file
from mantrans.checkpoint.folder import newest_intact
from mantrans.config import Config, TrainingConfig, strict_yaml
from mantrans.errors import CheckpointError, ConfigError, single_line

LATEST = "latest"
PLACES = ("training.experiment_name", "training.output_dir", "training.checkpoint_dir")


def find_checkpoint(
    resume: str, training: TrainingConfig, name: str = "resume"
) -> tuple[Path, list[str]]:
    """The checkpoint that `resume` names, and why newer ones of its run were skipped.

    training: where runs are, and for "latest" which one. name: what an error calls `resume`.
    Raises CheckpointError: nothing of that name, or no intact checkpoint.
    """
    if not resume.strip():
        raise CheckpointError(
            f"{name}: expected {LATEST}, a checkpoint (*.pt), or a run's folder or name, got "
            f"'{single_line(resume)}'"
        )
    checkpoints, records = Path(training.checkpoint_dir), Path(training.output_dir)
    if resume == LATEST:
        return newest_intact(checkpoints / training.experiment_name)
    path = Path(resume)
    if path.is_dir():
        return newest_intact(_checkpoints_of(path))
    if path.suffix == ".pt" or os.path.lexists(path):
        return path, []
    if len(path.parts) == 1 and (checkpoints / path).is_dir():
        return newest_intact(checkpoints / path)
    if len(path.parts) == 1 and (records / path).is_dir():
        return newest_intact(_checkpoints_of(records / path))
    raise CheckpointError(
        f"{name}: expected {LATEST}, a checkpoint (*.pt), or the folder or name of a run in "
        f"{checkpoints} or {records}, got {single_line(resume)}"
    )


class Checkpoint(NamedTuple):
    """A checkpoint that a run goes on from."""

    path: Path
    state: dict[str, Any]

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Raises CheckpointError: damaged, or not of a training run."""
        state = state_file.load(path)
        if "progress" not in state:
            raise CheckpointError(f"{path}: expected a run's checkpoint, got a model's alone")
        return cls(path, state)

    @property
    def digest(self) -> str:
        """Of all that is in the file: its last bytes are one of its header and its tensors'."""
        with open(self.path, "rb") as file:
            file.seek(-32, os.SEEK_END)
            return file.read().hex()

    @property
    def origin(self) -> tuple[Path, str]:
        """Where it lies, and the name of the run that saved it."""
        with state_file.understood(self.path):
            return self.path, str(self.state["config"]["training"]["experiment_name"])

    def logits_chunk_rows(self) -> int | None:
        """Rows of logits at a time, which gradients' last bits depend on. ValueError if odd."""
        rows = self.state.get("logits_chunk_rows")
        if rows is not None and (type(rows) is not int or rows < 1):
            raise ValueError(f"logits_chunk_rows: expected a count, got {rows!r:.20}")
        return rows


def was_restarted() -> bool:
    """Whether torchrun has started this process again after a failure."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0").strip() not in ("", "0")


def own_config(
    resume: str, defaults: str, overrides: Sequence[str], name: str = "resume"
) -> Config:
    """The configuration of the run that `resume` names, changed by overrides.

    Its name and folders are those where it was found: it may have been moved. defaults:
    the config file that says where runs are, and for "latest" which one. name: what an error calls
    `resume`.
    Raises CheckpointError or ConfigError (one line).
    """
    places = [text for text in overrides if text.partition("=")[0].strip() in PLACES]
    training = Config.load(defaults, places).training
    path, _ = find_checkpoint(resume, training, name)
    state = state_file.load(path)
    with state_file.understood(path):
        values = {name: dict(section) for name, section in state["config"].items()}
        values["training"] |= _place(resume, path, values["training"])
    return Config.from_dict(values, f"{path}: config", overrides)


def _checkpoints_of(folder: Path) -> Path:
    """The checkpoints of a run, given either of its folders."""
    config = folder / "config.yaml"
    if any(folder.glob("*.pt")) or not config.is_file():
        return folder
    found: Any = strict_yaml.read(config)
    section = found.get("training") if isinstance(found, dict) else None
    place = section.get("checkpoint_dir") if isinstance(section, dict) else None
    if not isinstance(place, str):
        raise ConfigError(f"{config}: training.checkpoint_dir: expected a folder's name")
    return Path(place) / folder.resolve().name


def _place(resume: str, path: Path, saved: dict[str, Any]) -> dict[str, str]:
    """The name and the folders of the run that the checkpoint `path` belongs to."""
    folder, name = Path(os.path.realpath(path)).parent, saved["experiment_name"]
    if folder.name != name and not folder.name.startswith(f"{name}."):
        return {}  # it lies somewhere else, and the run goes on in its own place
    found = {"experiment_name": folder.name}
    if folder.parent != Path(saved["checkpoint_dir"]).resolve():
        found["checkpoint_dir"] = _short(folder.parent)
    given = Path(resume)
    if given.is_dir() and (given / "config.yaml").is_file():  # its records were named
        found["output_dir"] = _short(given.resolve().parent)
    return found


def _short(folder: Path) -> str:
    """A path as one would type it here."""
    here = Path.cwd()
    return str(folder.relative_to(here)) if folder.is_relative_to(here) else str(folder)


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A note on settings that differ from those the checkpoint was trained with."""
    changed = [
        change for section in ("model", "data", "training")
        for change in changed_settings(saved, now, section)
    ]  # fmt: skip
    return [f"note: changed since the checkpoint: {', '.join(changed)}"] if changed else []


def changed_settings(saved: dict[str, Any], now: dict[str, Any], section: str) -> list[str]:
    """A section's settings that are not those of the checkpoint, with both values. Those of Muon,
    which older checkpoints lack, only where it is used."""
    before = saved.get(section, {})
    unused = "muon_" if now[section].get("optimizer") != "muon" else "\0"
    return [
        f"{section}.{name} {before.get(name)!r} → {value!r}"
        for name, value in now[section].items()
        if before.get(name) != value and not name.startswith(unused)
    ]
