"""Evaluates a checkpoint: the work of `mantrans evaluate`.

The model is always the checkpoint's. Data, tokenizer and sampling are those of --config, or else
those that the checkpoint was trained with.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mantrans import terminal
from mantrans.config import Config
from mantrans.data.dataset import prepare
from mantrans.errors import ConfigError, MantransError
from mantrans.evaluation.evaluator import as_json, as_text, evaluate
from mantrans.inference.trained import load_model, load_trained


def run(arguments: argparse.Namespace) -> None:
    """Load, measure, print, and write the JSON file if requested."""
    state = load_trained(arguments.checkpoint)
    config = choose_config(arguments, state)
    wrapper, tokenizer = load_model(arguments.checkpoint, state, config, arguments.device)
    data = prepare(config.data, tokenizer, cache_dir=config.data.cache_dir)
    report = evaluate(
        wrapper,
        tokenizer,
        data.validation,
        config,
        max_batches=arguments.max_batches,
        generate=arguments.generate,
        coherence=not arguments.no_coherence_eval,
        show_progress=True,
    )
    try:
        terminal.show(as_text(report))
    finally:  # even if standard output is closed
        if arguments.json:
            about = {"checkpoint": str(arguments.checkpoint), "dataset": config.data.dataset}
            write_json(arguments.json, about | {"tokenizer": tokenizer.name} | report)


def choose_config(arguments: argparse.Namespace, state: dict[str, Any]) -> Config:
    """The config of --config, or the checkpoint's, with the --set overrides."""
    for override in arguments.overrides:
        if override.strip().startswith("model."):
            raise ConfigError(
                "--set: expected a field of data, training or evaluation (the model is the "
                f"checkpoint's), got {override}"
            )
    if arguments.config:
        return Config.load(arguments.config, arguments.overrides)
    return Config.from_dict(state["config"], str(arguments.checkpoint), arguments.overrides)


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write the report; MantransError if that fails."""
    try:
        path.write_text(as_json(report), encoding="utf-8")
    except OSError as error:
        raise MantransError(f"--json {path}: cannot be written ({error.strerror})") from None
