"""Measure a checkpoint: loss per token, perplexity, bits per byte; with --generate its stories too.

    python evaluate.py --checkpoint checkpoints/best.pt
    python evaluate.py --checkpoint checkpoints/best.pt --config configs/tinystories.yaml --generate

The model is always the checkpoint's. Data, tokenizer and sampling are those of --config or else
those the checkpoint was trained with. A mistake of the user ends in one line and exit status 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from mantrans import out_of_memory
from mantrans.checkpoint import state_file
from mantrans.config import Config
from mantrans.data.dataset import prepare
from mantrans.data.tokenizer import Tokenizer, load_tokenizer
from mantrans.errors import CheckpointError, ConfigError, MantransError
from mantrans.evaluation.evaluator import as_json, as_text, evaluate, refuse_other_tokenizer
from mantrans.wrapper import CustomTransformerWrapper


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    try:
        with out_of_memory.explained():
            run(parse(argv))
    except MantransError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def run(arguments: argparse.Namespace) -> None:
    """Load, measure, print, and write the JSON file if one is wanted."""
    state = load_trained(arguments.checkpoint)
    config = choose_config(arguments, state)
    tokenizer = load_tokenizer(config.data.tokenizer)
    with state_file.understood(arguments.checkpoint):
        refuse_other_tokenizer(state["tokenizer"], tokenizer)
        check_vocabulary(state, tokenizer)
        wrapper = CustomTransformerWrapper.from_state_dict(
            state,
            device=arguments.device or config.training.device,
            backend=config.training.backend,
            optimizer="sgd",  # nothing is optimized, and SGD has no moments to make room for
        )
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
    print(as_text(report))
    if arguments.json:
        about = {"checkpoint": str(arguments.checkpoint), "dataset": config.data.dataset}
        write_json(arguments.json, about | {"tokenizer": tokenizer.name} | report)


def load_trained(path: Path) -> dict[str, Any]:
    """The state of a training run's checkpoint. CheckpointError for one that is not a run's."""
    state = state_file.load(path)
    missing = {"config", "tokenizer", "model_config", "parameters"} - state.keys()
    if missing:
        raise CheckpointError(
            f"{path}: found no {', '.join(sorted(missing))} in it; "
            "accepted: a checkpoint that train.py saved"
        )
    return state


def check_vocabulary(state: dict[str, Any], tokenizer: Tokenizer) -> None:
    """CheckpointError unless the model has one row for each entry of its tokenizer."""
    found = state["model_config"]["vocab_size"]
    if found != tokenizer.vocab_size:
        raise CheckpointError(
            f"the checkpoint's vocab_size: found {found!r:.20}; accepted: the "
            f"{tokenizer.vocab_size} entries of its tokenizer ({tokenizer.name})"
        )


def choose_config(arguments: argparse.Namespace, state: dict[str, Any]) -> Config:
    """The file's config, or the one in the checkpoint, with the --set overrides."""
    for override in arguments.overrides:
        if override.strip().startswith("model."):
            raise ConfigError(
                f"--set {override}: the model is the checkpoint's and cannot be changed; "
                "accepted: fields of data, training and evaluation"
            )
    if arguments.config:
        return Config.load(arguments.config, arguments.overrides)
    return Config.from_dict(state["config"], str(arguments.checkpoint), arguments.overrides)


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write the report; MantransError where that fails."""
    try:
        path.write_text(as_json(report), encoding="utf-8")
    except OSError as error:
        raise MantransError(f"--json {path}: cannot be written ({error.strerror})") from None


class OneLineParser(argparse.ArgumentParser):
    """Reports a wrong command line as every other mistake is reported."""

    def error(self, message: str) -> NoReturn:
        raise MantransError(f"{message}; see --help")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. MantransError for one that cannot be understood."""
    parser = OneLineParser(
        prog="evaluate.py", description="Measure a checkpoint that train.py saved."
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="the model to measure")
    add("--config", type=Path, help="YAML file; without it the config in the checkpoint")
    add("--generate", action="store_true", help="write samples, and measure their diversity")
    add("--max-batches", type=positive, metavar="N", help="stop after N batches of validation data")
    add("--json", type=Path, metavar="FILE", help="also write the report there")
    add("--device", help="auto, cpu, cuda or cuda:N; without it training.device")
    add("--no-coherence-eval", action="store_true", help="ask no Claude model for marks")
    add(
        "--set", action="append", default=[], dest="overrides", metavar="SECTION.FIELD=VALUE",
        help="change one field of the config; may be given several times",
    )  # fmt: skip
    return parser.parse_args(argv)


def positive(text: str) -> int:
    """argparse's type for a count of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; accepted: an integer of at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
