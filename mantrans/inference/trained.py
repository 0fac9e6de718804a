"""Loads the model of a run's checkpoint, with the tokenizer it was trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mantrans.checkpoint import state_file
from mantrans.config import Config
from mantrans.data.tokenizer import Tokenizer, load_tokenizer
from mantrans.errors import CheckpointError
from mantrans.wrapper import CustomTransformerWrapper


def load_trained(path: Path) -> dict[str, Any]:
    """The state of a training run's checkpoint. CheckpointError for any other checkpoint."""
    state = state_file.load(path)
    missing = {"config", "tokenizer", "model_config", "parameters"} - state.keys()
    if missing:
        raise CheckpointError(
            f"{path}: expected a checkpoint that train.py saved, got one without "
            f"{', '.join(sorted(missing))}"
        )
    return state


def load_model(
    path: Path, state: dict[str, Any], config: Config, device: str | None = None
) -> tuple[CustomTransformerWrapper, Tokenizer]:
    """The model of `state`, loaded from `path`, and its tokenizer.

    device: None for the config's training.device.
    Raises CheckpointError if the tokenizer or the model is not the checkpoint's.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    with state_file.understood(path):
        refuse_other_tokenizer(state["tokenizer"], tokenizer)
        check_vocabulary(state, tokenizer)
        wrapper = CustomTransformerWrapper.from_state_dict(
            state,
            device=device or config.training.device,
            backend=config.training.backend,
            inference=True,
        )
    return wrapper, tokenizer


def check_vocabulary(state: dict[str, Any], tokenizer: Tokenizer) -> None:
    """CheckpointError unless the model has one row for each entry of its tokenizer."""
    found = state["model_config"]["vocab_size"]
    if found != tokenizer.vocab_size:
        raise CheckpointError(
            f"the checkpoint's vocab_size: expected the {tokenizer.vocab_size} entries of its "
            f"tokenizer ({tokenizer.name}), got {found!r:.20}"
        )


def refuse_other_tokenizer(saved: dict[str, Any], tokenizer: Tokenizer) -> None:
    """CheckpointError unless `tokenizer` is the one a checkpoint was trained with.

    saved: {"name", "hash", "vocab_size"} of the checkpoint. The hashes are compared: tokenizers of
    the same name or size may give different tokens.
    """
    if saved["hash"] != tokenizer.hash:
        raise CheckpointError(
            f"data.tokenizer: expected the checkpoint's {saved['name']!r} "
            f"({saved['vocab_size']:,} tokens, hash {saved['hash'][:12]}), got {tokenizer.name!r} "
            f"({tokenizer.vocab_size:,} tokens, hash {tokenizer.hash[:12]})"
        )
