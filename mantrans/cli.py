"""The command line: mantrans train | evaluate | summary | generate | chat | tokenizer | prepare |
report | explain | export | verify | convert.

Each command parses its arguments, then imports and calls the module that does the work, so that
`--help` does not import torch. Only `main` turns an error into a line and an exit status. train.py,
evaluate.py and config_summary.py run the first three commands.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mantrans import terminal
from mantrans.errors import MantransError, RanksError, show
from mantrans.options import integer

if TYPE_CHECKING:
    from mantrans.distributed.watcher import Show
    from mantrans.distributed.world import World

QUICKSTART = "configs/quickstart.yaml"
MISTAKE, INTERRUPTED, PIPE_CLOSED = 2, 128 + signal.SIGINT, 128 + signal.SIGPIPE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command of `mantrans`; without arguments, those of the process.

    Returns the exit status: 0; 2 after one line on standard error, for a user's mistake, an error
    of the system or full memory; 130 after Ctrl-C, 128 + its number after another signal that
    ended the command at once; 141, without a message, if the reader of standard output has gone.
    """
    terminal.reserve_standard_streams()
    terminal.escape_what_encodings_lack()
    try:
        with terminal.lossy("stderr"):
            return _status(list(sys.argv[1:] if arguments is None else arguments))
    finally:
        terminal.discard_unwritten()


def _status(arguments: list[str]) -> int:
    """Run the command; its exit status."""
    try:
        status = run(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except (Exception, KeyboardInterrupt) as error:
        status, reason = explained(error)
        if reason and (isinstance(error, RanksError) or _is_first_of_machine()):
            terminal.say(f"error: {reason}")
        return status


def _is_first_of_machine() -> bool:
    """Whether no other process of this machine has the same arguments and says what is wrong."""
    size, local_rank = (os.environ.get(name, "") for name in ("WORLD_SIZE", "LOCAL_RANK"))
    return size.strip() in ("", "1") or local_rank.strip() in ("", "0")


def explained(error: BaseException) -> tuple[int, str]:
    """The exit status of a command that ended with `error`, and the line to show, "" for none.

    Raises `error` itself if it is a bug.
    """
    if isinstance(error, KeyboardInterrupt):
        return 128 + (error.args[0] if error.args else signal.SIGINT), ""
    if isinstance(error, BrokenPipeError):
        return PIPE_CLOSED, ""
    if isinstance(error, MantransError):
        return MISTAKE, str(error)
    if isinstance(error, OSError):
        name = f"{error.filename}: " if error.filename else ""
        return MISTAKE, name + (error.strerror or str(error))
    if isinstance(error, MemoryError | RuntimeError):
        from mantrans import runtime

        if runtime.is_out_of_memory(error):
            return MISTAKE, runtime.OUT_OF_MEMORY
    raise error


def run(arguments: list[str]) -> int:
    """Run the command that the first argument names with the others."""
    listing = "\n".join(f"  {name:<10} {command.__doc__}" for name, command in COMMANDS.items())
    parser = Parser("mantrans", description=f"commands:\n{listing}", formatter_class=_AS_WRITTEN)
    parser.add_argument("command", choices=COMMANDS, help="see mantrans COMMAND --help")
    command = COMMANDS[parser.parse_args(arguments[:1]).command]
    return command(arguments[1:])


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line like any other mistake.

    A blank argument is one: it is what a shell makes of a variable that is not set. An argument
    that may be empty has the type `str`.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.register("type", None, not_blank)
        self.register("type", Path, lambda text: Path(at_home(text)))

    def add_subparsers(self, **options: Any) -> Any:
        """Commands of this command, each of which checks its own arguments."""
        commands = super().add_subparsers(**options)
        commands.type = str
        return commands

    def error(self, message: str) -> NoReturn:
        raise MantransError(f"{message}; see --help")


_AS_WRITTEN = argparse.RawDescriptionHelpFormatter


def train(arguments: list[str]) -> int:
    """train a model"""
    parser = Parser("mantrans train", description="Train a model.")
    add = parser.add_argument
    add(
        "--config",
        type=at_home,
        help=f"a YAML file (default: {QUICKSTART}, or the resumed run's own)",
    )
    add_overrides(parser)
    add(
        "--resume",
        type=at_home,
        metavar="RUN",
        help="go on with a run: its name, its folder, a checkpoint, or 'latest', the experiment's",
    )
    add(
        "--allow-other-data",
        action="store_true",
        help="resume on tokens that are not the checkpoint's",
    )
    add("--no-coherence-eval", action="store_true", help="do not ask a Claude model for scores")
    add(
        "--debug-nan",
        action="store_true",
        help="stop at the first step that is not finite, and name the layer",
    )
    add(
        "--profile",
        type=integer(0, 1000),
        default=0,
        metavar="N",
        help="profile N steps, see runs/NAME",
    )
    add("--no-selfcheck", action="store_true", help="on a GPU: do not check the kernels first")
    options = parser.parse_args(arguments)
    if "WORLD_SIZE" in os.environ:  # failures of other ranks are told here, without a C++ stack
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from mantrans.distributed.world import World

    threading.excepthook = background_failure
    with terminal.lossy("stdout"):
        world = World.from_environment()
        with ended_together(world):
            status = _train(options, world)
            world.close()
    return status


def _train(options: argparse.Namespace, world: World) -> int:
    """Train on this rank; the exit status."""
    from mantrans.config import Config
    from mantrans.training import resume
    from mantrans.training.trainer import Trainer

    if options.config is None and options.resume is not None:

        def chosen() -> str:
            own = resume.own_config(options.resume, QUICKSTART, options.overrides)
            return json.dumps(own.to_dict())

        config = Config.from_dict(json.loads(world.from_first("own config", chosen)))
    else:
        config = Config.load(options.config or QUICKSTART, options.overrides)
    trainer = Trainer(
        config,
        resume=options.resume,
        allow_other_data=options.allow_other_data,
        evaluate_coherence=not options.no_coherence_eval,
        debug_nan=options.debug_nan,
        check_kernels=not options.no_selfcheck,
        profile=options.profile,
        world=world,
    )
    trainer.run()
    return INTERRUPTED if trainer.signals.first == signal.SIGINT else 0


@contextlib.contextmanager
def ended_together(world: World) -> Iterator[None]:
    """With several processes an error of one ends all, with one message; it does not return."""
    try:
        yield
    except BaseException as error:
        if world.size == 1:
            raise
        try:
            status, reason = explained(error)
        except BaseException:
            traceback.print_exc()
            world.fail("a bug", 1, show="nothing")
        show: Show = "reason" if isinstance(error, RanksError) else "rank and reason"
        world.fail(reason or "interrupted", status, show)
        raise


def background_failure(failure: threading.ExceptHookArgs) -> None:
    """Report a disk error of TensorBoard's writer thread as a warning."""
    if isinstance(failure.exc_value, OSError):
        reason = failure.exc_value.strerror
        terminal.say(f"warning: TensorBoard's files are no longer written ({reason})")
    else:
        threading.__excepthook__(failure)


def evaluate(arguments: list[str]) -> int:
    """measure a checkpoint, and show its samples"""
    parser = Parser(
        "mantrans evaluate",
        description="Measure a checkpoint that train.py saved: loss per token, perplexity, bits "
        "per byte; with --generate also samples.",
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="the model to measure")
    add("--config", type=Path, help="YAML file (default: the checkpoint's config)")
    add("--text", type=Path, metavar="FILE", help="measure on all of this text, not on the data")
    add(
        "--choices", type=Path, metavar="FILE",
        help="answer multiple-choice questions (HellaSwag's .jsonl), on no data without --text",
    )  # fmt: skip
    add("--generate", action="store_true", help="write samples, and measure their diversity")
    add("--max-batches", type=integer(1), metavar="N", help="stop after N batches of validation")
    add("--json", type=Path, metavar="FILE", help="also write the report there")
    add("--device", help="auto, cpu, cuda or cuda:N; without it training.device")
    add("--no-coherence-eval", action="store_true", help="do not ask a Claude model for scores")
    add_overrides(parser)
    options = parser.parse_args(arguments)
    from mantrans.evaluation import checkpoint

    checkpoint.run(options)
    return 0


def summary(arguments: list[str]) -> int:
    """show a config's parameters, work and memory"""
    parser = Parser(
        "mantrans summary",
        description="Show the size, work and memory of a configuration before it is run.",
    )
    parser.add_argument("config", type=at_home, help="a YAML file, such as configs/quickstart.yaml")
    add_overrides(parser)
    parser.add_argument(
        "--tokens", type=integer(1), help="tokens in the training set, for the steps of an epoch"
    )
    parser.add_argument(
        "--ranks",
        type=integer(1, 10**6),
        default=1,
        metavar="N",
        help="processes of torchrun: show the memory of one of them",
    )
    options = parser.parse_args(arguments)
    from mantrans.config import Config
    from mantrans.training import summary as text

    config = Config.load(options.config, options.overrides)
    terminal.show(text.summary(config, options.tokens, options.ranks))
    return 0


def generate(arguments: list[str]) -> int:
    """continue a text"""
    parser = Parser(
        "mantrans generate",
        description="Continue a text and print it while it is generated; defaults are from the "
        "config that the checkpoint was trained with.",
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="a model that train.py saved")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", type=str, help="the text to continue; may be empty")
    prompt.add_argument(
        "--file", type=at_home, help="it is in this file, or on standard input (-), without the "
        "line break that ends it",
    )  # fmt: skip
    add("--max-length", type=integer(1, 2**20), metavar="N", help="tokens, prompt included")
    add(
        "-n", "--count", type=integer(1, 10**6), default=1, metavar="N",
        help="continuations; each has the next seed",
    )  # fmt: skip
    add_sampling(parser)
    options = parser.parse_args(arguments)
    from mantrans.inference import generate as command

    command.run(options)
    return 0


def chat(arguments: list[str]) -> int:
    """hold a conversation with a model"""
    parser = Parser(
        "mantrans chat",
        description="Hold a conversation with a model on the terminal, or from a pipe: a line is "
        "what you say. /help there lists the commands; defaults are from the checkpoint's config.",
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="a model that train.py saved")
    add(
        "--format", choices=("plain", "roles", "chatml"), default="plain",
        help="plain: the model continues the text; roles: User: and Assistant: before the turns; "
        "chatml: the marks of Qwen's chat models",
    )  # fmt: skip
    add(
        "--max-tokens", type=integer(1, 2**20), dest="max_length", metavar="N",
        help="of an answer (default: evaluation.max_generation_length)",
    )  # fmt: skip
    add_sampling(parser)
    options = parser.parse_args(arguments)
    from mantrans.inference import chat as command

    command.run(options)
    return 0


def tokenizer(arguments: list[str]) -> int:
    """train a tokenizer, analyze one, encode with one"""
    from mantrans.data import tokenizer_tool

    parser = Parser("mantrans tokenizer", description="Byte-level BPE tokenizers.")
    tokenizer_tool.add_arguments(parser)
    options = parser.parse_args(arguments)
    options.run(options)
    return 0


def prepare(arguments: list[str]) -> int:
    """turn a text into tokens before training on it"""
    parser = Parser(
        "mantrans prepare",
        description="Turn the text of a configuration into the tokens that its runs train on. A "
        "later run starts with them at once. After a kill the same command goes on.",
    )
    add = parser.add_argument
    add("--config", type=at_home, default=QUICKSTART, help=f"a YAML file (default: {QUICKSTART})")
    add_overrides(parser)
    add(
        "--processes", type=integer(1, 4096), metavar="N",
        help="that tokenize (default: one for each core)",
    )  # fmt: skip
    add(
        "--format", choices=("llmc", "nanogpt"),
        help="write the tokens for that trainer too, as train.bin and val.bin",
    )  # fmt: skip
    add("--output", type=Path, metavar="FOLDER", help="where --format writes")
    options = parser.parse_args(arguments)
    if (options.format is None) != (options.output is None):
        given, other = ("output", "format")[:: 1 if options.format is None else -1]
        parser.error(f"--{given}: expected --{other} beside it, got none")
    from mantrans.config import Config
    from mantrans.data import prepare_tool
    from mantrans.data.tokenizer import load_tokenizer

    config = Config.load(options.config, options.overrides)
    if config.training.init_from is None:
        tokens = load_tokenizer(config.data.tokenizer)
    else:
        from mantrans.training.start import start

        config, tokens, *_ = start(config, None)
    prepare_tool.run(config.data, tokens, options.processes, options.format, options.output)
    return 0


def report(arguments: list[str]) -> int:
    """show a run's curves and samples as a page"""
    parser = Parser("mantrans report", description="A run's curves and samples as an HTML page.")
    add = parser.add_argument
    add("run", type=Path, help="a run's folder, such as runs/quickstart")
    add("--output", type=Path, metavar="FILE", help="where to write; without it RUN/report.html")
    add("--compare", type=Path, nargs="+", default=[], metavar="RUN", help="show their losses too")
    options = parser.parse_args(arguments)
    from mantrans.report.page import write_page

    terminal.show(str(write_page(options.run, options.output, options.compare)))
    return 0


def explain(arguments: list[str]) -> int:
    """show one training step as a page, gradient by gradient"""
    parser = Parser(
        "mantrans explain",
        description="Run one training step on a sentence, and write a page on which every gradient "
        "can be followed and checked.",
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, help="a model that train.py saved (default: the quickstart's)")
    add("--text", help="the sentence (default: one of a story)")
    add("--output", type=Path, metavar="FOLDER", help="where to write explain.html (default: RUN/)")
    add(
        "--max-tokens", type=integer(2, 2**20), metavar="N", help="cut the text there (default: 24)"
    )
    options = parser.parse_args(arguments)
    # before torch is loaded: threads that spin while they wait take minutes on a busy machine
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from mantrans.explain.page import TOKENS, write_page

    page = write_page(
        options.checkpoint, options.text, options.output, options.max_tokens or TOKENS
    )
    terminal.show(str(page))
    return 0


def export(arguments: list[str]) -> int:
    """write a model for transformers or llama.cpp"""
    parser = Parser(
        "mantrans export",
        description="Write a checkpoint's model and its tokenizer as a folder that transformers "
        "reads, or with --gguf as the file that llama.cpp reads.",
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="a model that train.py saved")
    add("--output", type=Path, required=True, help="the folder, or the file, to write")
    add("--gguf", action="store_true", help="a GGUF file (needs the package gguf)")
    options = parser.parse_args(arguments)
    from mantrans.inference.export import export as write

    write(options.checkpoint, options.output, options.gguf)
    terminal.show(str(options.output))
    return 0


def verify(arguments: list[str]) -> int:
    """recompute a stretch of a run, compare every bit"""
    parser = Parser(
        "mantrans verify",
        description="Recompute a stretch of a run from one of its checkpoints, and compare every "
        "bit of its metrics, and of the checkpoints there, with what was recorded. The run's own "
        "folders are only read. Exit status 1 if a bit differs.",
    )
    add = parser.add_argument
    add("run", type=at_home, help="a run: its name or its folder, such as runs/quickstart")
    add(
        "--from", type=integer(1, 10**12), required=True, dest="start", metavar="STEP",
        help="of the checkpoint to begin with",
    )  # fmt: skip
    add("--steps", type=integer(1, 10**12), required=True, metavar="N", help="steps to recompute")
    options = parser.parse_args(arguments)
    from mantrans.training.verify import verify as recompute

    verdict = recompute(options.run, options.start, options.steps, QUICKSTART)
    terminal.show(verdict.line)
    return 0 if verdict.equal else 1


def convert(arguments: list[str]) -> int:
    """convert a checkpoint of the first format to the current one"""
    parser = Parser(
        "mantrans convert",
        description="Convert a checkpoint of the first format, a pickle, to the current format. "
        "Only for your own files: a malicious one can take all of the machine's memory.",
    )
    parser.add_argument("old", type=Path, help="your own checkpoint of the first format")
    parser.add_argument("new", type=Path, help="where to write it in the current format")
    options = parser.parse_args(arguments)
    from mantrans.checkpoint.convert import convert as convert_file

    convert_file(options.old, options.new)
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    command.__name__: command
    for command in (
        train, evaluate, summary, generate, chat, tokenizer, prepare, report, explain, export,
        verify, convert,
    )
}  # fmt: skip


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """--set, whose values are `options.overrides`."""
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="SECTION.FIELD=VALUE",
        help="change one field of the config, e.g. training.learning_rate=3e-4; may be repeated",
    )  # fmt: skip


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """How tokens are drawn, and on which device."""
    add = parser.add_argument
    add("--temperature", type=float, help="below 1 safer, above 1 wilder, 0 always the most likely")
    add("--top-k", type=integer(1, 2**24), metavar="K", help="sample from the K most likely")
    add("--top-p", type=float, metavar="P", help="from the most likely that sum to P")
    add("--min-p", type=float, metavar="P", help="from those P times as likely as the most likely")
    add(
        "--repetition-penalty", type=float, metavar="X",
        help="above 1 tokens that are there already become less likely",
    )  # fmt: skip
    add(
        "--stop", type=str, action="append", metavar="TEXT",
        help="end before this text, such as $'\\n'; may be repeated",
    )  # fmt: skip
    add("--seed", type=integer(0, 2**63 - 1), help="of the sampling; another gives another text")
    add("--device", help="auto, cpu, cuda or cuda:N; without it training.device")


def at_home(text: str) -> str:
    """argparse's type for the text of a path: a leading ~ is the user's home folder."""
    path = os.path.expanduser(not_blank(text))
    if path.startswith("~"):
        raise argparse.ArgumentTypeError(f"expected a known user after ~, got {show(text)}")
    return path


def not_blank(text: str) -> str:
    """argparse's type for every text."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"expected a value, got {show(text)}: an unset variable?")
    return text
