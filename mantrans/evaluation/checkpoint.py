"""Evaluates a checkpoint: the work of `mantrans evaluate`.

The model is always the checkpoint's. Data, tokenizer and sampling are those of --config, or else
those that the checkpoint was trained with. The text of --text replaces the data; samples need none.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mantrans import terminal
from mantrans.checkpoint import state_file
from mantrans.config import Config
from mantrans.data.dataset import prepare, tokenized
from mantrans.data.shards import TokenStream
from mantrans.data.tokenizer import Tokenizer
from mantrans.errors import ConfigError, DataError, MantransError
from mantrans.evaluation.choices import measure_choices, read_questions
from mantrans.evaluation.evaluator import as_json, as_text, evaluate
from mantrans.inference.trained import load_model, load_trained


def run(arguments: argparse.Namespace) -> None:
    """Load, measure, print, and write the JSON file if requested."""
    questions = read_questions(arguments.choices) if arguments.choices else []
    state = load_trained(arguments.checkpoint)
    config = choose_config(arguments, state)
    wrapper, tokenizer = load_model(arguments.checkpoint, state, config, arguments.device)
    with validation(arguments, config, tokenizer) as stream:
        report = evaluate(
            wrapper,
            tokenizer,
            stream,
            config,
            max_batches=arguments.max_batches,
            generate=arguments.generate,
            coherence=not arguments.no_coherence_eval,
            show_progress=True,
            say=lambda line: terminal.say(f"note: {line}"),
        )
    if questions:
        report["choices"] = {"file": str(arguments.choices)} | measure_choices(
            wrapper.model,
            tokenizer,
            questions,
            max_length=wrapper.config.max_seq_len,
            batch_size=config.evaluation_batch,
            device=wrapper.device,
            show_progress=True,
        )
    try:
        terminal.show(as_text(report))
    finally:  # even if standard output is closed
        if arguments.json:
            dataset = str(arguments.text) if arguments.text else config.data.dataset
            about = {"checkpoint": str(arguments.checkpoint), "dataset": dataset}
            write_json(arguments.json, about | {"tokenizer": tokenizer.name} | report)


@contextmanager
def validation(
    arguments: argparse.Namespace, config: Config, tokenizer: Tokenizer
) -> Iterator[TokenStream | None]:
    """The tokens to measure on: of --text, or else of the config's validation data; none where only
    --choices are asked for.

    Without these data samples are still made: a line says why nothing is measured.
    """
    if arguments.text:
        with tokenized(arguments.text, config.data, tokenizer, name="--text") as own:
            yield own
        return
    stream: TokenStream | None = None
    if arguments.choices:
        yield stream
        return
    try:
        stream = prepare(config.data, tokenizer, cache_dir=config.data.cache_dir).validation
    except DataError as missing:
        if not arguments.generate:
            raise
        terminal.say(f"note: samples only, no loss: {missing}")
    yield stream


def choose_config(arguments: argparse.Namespace, state: dict[str, Any]) -> Config:
    """The config of --config, or the checkpoint's, with the --set overrides."""
    for override in arguments.overrides:
        if override.strip().startswith("model."):
            raise ConfigError(
                "--set: expected a field of data, training or evaluation (the model is the "
                f"checkpoint's), got {override}"
            )
    if arguments.config:
        config = Config.load(arguments.config, arguments.overrides)
        if config.training.init_from is None:
            return config
        with state_file.understood(arguments.checkpoint):
            return config.with_model(state["model_config"], str(arguments.checkpoint))
    return Config.from_dict(state["config"], str(arguments.checkpoint), arguments.overrides)


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write the report; MantransError if that fails."""
    try:
        path.write_text(as_json(report), encoding="utf-8")
    except OSError as error:
        raise MantransError(f"--json {path}: cannot be written ({error.strerror})") from None
