"""Where a run begins: with new weights, with a folder of transformers (`training.init_from`), or
with a checkpoint, which has all that the run once took from the folder."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from mantrans.checkpoint import state_file
from mantrans.config import Config
from mantrans.data.tokenizer import Tokenizer, foreign_tokenizer, load_tokenizer
from mantrans.errors import CheckpointError, ConfigError, DataError, single_line
from mantrans.finite import all_finite
from mantrans.inference.trained import tokenizer_of
from mantrans.interop import huggingface
from mantrans.training.resume import Checkpoint
from mantrans.wrapper import CustomTransformerWrapper


class Start(NamedTuple):
    """What a run begins with.

    config: as given, with the shape of the model. origin: what is recorded of the folder. weights:
    the folder's, if they are to be loaded.
    """

    config: Config
    tokenizer: Tokenizer
    origin: dict[str, Any] | None = None
    weights: huggingface.Weights | None = None

    def load_weights(self, model: CustomTransformerWrapper) -> list[str]:
        """Load the folder's weights, and say so. CheckpointError if one is not finite."""
        if self.weights is None or self.origin is None:
            return []
        parameters = model.model.parameters
        for name, value in self.weights:
            parameters.write(name, value)
            if not all_finite(parameters.view(parameters.best_weights(), name)):
                raise CheckpointError(
                    f"{single_line(str(self.weights.folder))}: expected finite weights in "
                    f"{model.config.dtype}, got NaN or infinity in {name}"
                )
        return [f"weights of {self.origin['architecture']} from {self.origin['folder']}"]


def start(config: Config, checkpoint: Checkpoint | None) -> Start:
    """What a run of `config` begins with.

    Raises MantransError (one line): a folder or tokenizer that cannot be used, or that contradicts
    the config.
    """
    folder = config.training.init_from
    if checkpoint is not None:
        with state_file.understood(checkpoint.path):
            state = checkpoint.state
            if folder is not None:
                config = config.with_model(state["model_config"], str(checkpoint.path))
            return Start(config, tokenizer_of(state, config), state.get("init_from"))
    if folder is None:
        return Start(config, load_tokenizer(config.data.tokenizer))
    weights = huggingface.Weights(folder)
    config = config.with_model(weights.shape, single_line(folder))
    tokenizer = _tokenizer(config, folder)
    origin = {
        "folder": folder,
        "architecture": weights.family.architecture,
        "sha256": {path.name: _sha256(path) for path in weights.files},
    }
    return Start(config, tokenizer, origin, weights)


def _tokenizer(config: Config, folder: str) -> Tokenizer:
    """The tokenizer of the config, with an id for each row of the folder's model.

    Raises ConfigError if it is not the folder's.
    """
    is_own = config.data.tokenizer == folder
    tokenizer = foreign_tokenizer(folder) if is_own else load_tokenizer(config.data.tokenizer)
    rows = config.model.vocab_size
    assert rows is not None
    shown = f"({tokenizer.vocab_size:,} tokens, hash {tokenizer.hash[:12]})"
    theirs = tokenizer if is_own else _of_folder(folder)
    if theirs is not None and theirs.hash != tokenizer.hash:
        raise ConfigError(
            f"data.tokenizer: expected that of {single_line(folder)} ({theirs.vocab_size:,} tokens,"
            f" hash {theirs.hash[:12]}), got {single_line(config.data.tokenizer)} {shown}"
        )
    if tokenizer.vocab_size > rows or (theirs is None and tokenizer.vocab_size != rows):
        raise ConfigError(
            f"data.tokenizer: expected {rows:,} tokens, as {single_line(folder)} has, got "
            f"{single_line(config.data.tokenizer)} {shown}"
        )
    return tokenizer.padded(rows)


def _of_folder(folder: str) -> Tokenizer | None:
    """The folder's tokenizer; None if there is none that we read."""
    try:
        return foreign_tokenizer(folder)
    except DataError:
        return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
