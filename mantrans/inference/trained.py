"""Loads the model of a run's checkpoint, with the tokenizer it was trained with."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from mantrans.checkpoint import state_file
from mantrans.config import Config
from mantrans.config.arguments import DRAWING
from mantrans.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_text
from mantrans.errors import CheckpointError
from mantrans.wrapper import CustomTransformerWrapper

LARGEST_VOCABULARY = 2**24  # as model.vocab_size


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


def load_chosen(
    options: argparse.Namespace,
) -> tuple[CustomTransformerWrapper, Tokenizer, Config]:
    """The model and the config of options.checkpoint, with the sampling of other options.

    Raises MantransError for a file that is no run's checkpoint, and for wrong sampling.
    """
    state = load_trained(options.checkpoint)
    values = Config.from_dict(state["config"], str(options.checkpoint)).to_dict()
    chosen = {name: getattr(options, name) for name in (*DRAWING, "stop")}
    chosen["max_generation_length"] = options.max_length
    values["evaluation"] |= {name: value for name, value in chosen.items() if value is not None}
    if options.seed is not None:
        values["training"]["seed"] = options.seed
    config = Config.from_dict(values, "command line")
    wrapper, tokenizer = load_model(options.checkpoint, state, config, options.device)
    return wrapper, tokenizer, config


def load_model(
    path: Path, state: dict[str, Any], config: Config, device: str | None = None
) -> tuple[CustomTransformerWrapper, Tokenizer]:
    """The model of `state`, loaded from `path`, and its tokenizer.

    device: None for the config's training.device.
    Raises CheckpointError if the tokenizer or the model is not the checkpoint's.
    """
    with state_file.understood(path):
        tokenizer = tokenizer_of(state, config)
        check_vocabulary(state, tokenizer)
        wrapper = CustomTransformerWrapper.from_state_dict(
            state,
            device=device or config.training.device,
            backend=config.training.backend,
            inference=True,
        )
    return wrapper, tokenizer


def tokenizer_of(state: dict[str, Any], config: Config) -> Tokenizer:
    """The tokenizer of `config`, which must be the one of the checkpoint.

    One that came with a folder (training.init_from) is in the checkpoint, and the folder is not
    needed again; it has an id for each row of the model, as when the run began.
    Raises CheckpointError if it is another, DataError if it cannot be used.
    """
    saved, chosen = state["tokenizer"], config.data.tokenizer
    file = saved.get("file")
    if file is not None and chosen == state["config"]["data"]["tokenizer"]:
        text = bytes(file.numpy()).decode()
        tokenizer = tokenizer_from_text(text, saved["name"], f"{chosen} (in the checkpoint)")
    else:
        tokenizer = load_tokenizer(chosen)
    refuse_other_tokenizer(saved, tokenizer)
    rows = state["model_config"]["vocab_size"]
    is_padded = type(rows) is int and tokenizer.vocab_size < rows <= LARGEST_VOCABULARY
    return tokenizer.padded(rows) if file is not None and is_padded else tokenizer


def saved_tokenizer(tokenizer: Tokenizer, with_file: bool) -> dict[str, Any]:
    """What a checkpoint says of its tokenizer. with_file: the tokenizer itself too."""
    about = {"name": tokenizer.name, "hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size}
    if with_file:
        content = bytearray(tokenizer.library.to_str().encode())
        about["file"] = torch.frombuffer(content, dtype=torch.uint8)
    return about


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
