"""A conversation with a model on the terminal, or from a pipe: the work of `mantrans chat`.

Answers go to standard output, all else to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mantrans import terminal
from mantrans.config import Config, EvaluationConfig
from mantrans.errors import ConfigError, DataError, printable, show
from mantrans.inference.text import Continuation, sampling_options
from mantrans.inference.trained import load_chosen
from mantrans.options import integer

if TYPE_CHECKING:
    from mantrans.data.tokenizer import Tokenizer
    from mantrans.wrapper import CustomTransformerWrapper


class Format(NamedTuple):
    """What is written before what the user says, between it and the answer, and after that."""

    before: str = ""
    between: str = ""
    after: str = ""
    stop: tuple[str, ...] = ()


FORMATS = {
    "plain": Format(),
    "roles": Format("User: ", "\nAssistant:", "", ("\nUser:",)),
    "chatml": Format("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>", ()),
}
_MARK = re.compile(r"(<\|im_(?:start|end)\|>)")  # a token by itself, in a format only
_SETTINGS = {
    "/temp": "temperature", "/topk": "top_k", "/topp": "top_p", "/minp": "min_p",
    "/penalty": "repetition_penalty",
}  # fmt: skip
_HELP = """/temp X     temperature: below 1 safer, above 1 wilder, 0 always the most likely
/topk K     sample from the K most likely tokens; null: all
/topp P     sample from the most likely that sum to P; null: all
/minp P     sample from those P times as likely as the most likely; null: all
/penalty X  above 1 tokens that are there already become less likely
/seed N     of the next answer; the one after it has N + 1
/reset      forget the conversation
/save FILE  write the conversation to a new file
/quit       end, as Ctrl-D does; Ctrl-C stops an answer
An empty line lets a plain text go on. A text that begins with / takes a space before it."""


class Turn(NamedTuple):
    said: str
    answer: str | None = None  # None: it is due


class Chat:
    """The conversation: its turns, and how answers are drawn.

    max_tokens: of an answer. form: how the turns become the text that the model continues.
    """

    def __init__(
        self, wrapper: CustomTransformerWrapper, tokenizer: Tokenizer, config: Config, form: str
    ) -> None:
        self.wrapper, self.tokenizer, self.form = wrapper, tokenizer, FORMATS[form]
        self.options = sampling_options(config, tokenizer)
        self.options["stop"] = [*self.options["stop"], *self.form.stop]
        self.opening = [tokenizer.eot_id] if config.data.attend_across_documents else []
        self.reset()
        if form == "chatml":
            self.opening, self.options["eos_token_id"] = [], self._mark("<|im_end|>")

    def reset(self) -> None:
        """Forget the conversation; the sampling stays."""
        self.turns: list[Turn] = []
        self.forgotten = 0  # of the turns: those for which there was no room
        self.has_told = False

    def answer(self, said: str) -> Generator[str]:
        """The answer, in pieces; what has been drawn when the caller stops is kept.

        Raises DataError for text that is not Unicode, and forgets it.
        """
        length = self.options["max_length"]
        window = self.wrapper.config.max_seq_len
        ids = self._fitting(said, window - min(length, window // 2))
        options = self.options | {"max_length": min(len(ids) + length, 2**20)}
        answer = Continuation(self.wrapper, ids, options)
        pieces: list[str] = []
        try:
            for piece in answer:
                pieces.append(piece)
                yield piece
        finally:
            self.turns.append(Turn(said, "".join(pieces)))
            self.options["seed"] += 1

    def text(self) -> str:
        """The conversation as the model reads it."""
        return "".join(self._pieces(self.turns))

    def _fitting(self, said: str, room: int) -> list[int]:
        """The tokens of the newest turns for which there is room, at least of the last one's end.

        The model forgets the others; the first time a line says so.
        """
        turns = [*self.turns[self.forgotten :], Turn(said)]
        ids = self._ids(turns)
        if len(ids) > room and not self.has_told:
            self.has_told = True
            terminal.say(
                f"note: the model reads {room} tokens: it has forgotten what is older (said once)"
            )
        while len(ids) > room and len(turns) > 1:
            del turns[0]
            self.forgotten += 1
            ids = self._ids(turns)
        return ids[-room:]

    def _ids(self, turns: list[Turn]) -> list[int]:
        """Text between marks is encoded at once; marks are read in the format, and nowhere else."""
        ids, text = list(self.opening), ""
        for piece in self._pieces(turns):
            if isinstance(piece, _Mark):
                ids += [*self.tokenizer.encode(text), self._mark(piece)]
                text = ""
            else:
                text += piece
        return ids + self.tokenizer.encode(text) or [self.tokenizer.eot_id]

    def _pieces(self, turns: list[Turn]) -> Iterator[str]:
        """The text of `turns`; a mark of the format is a `_Mark`."""
        for number, turn in enumerate(turns):
            if number and (turn.said or self.form.before):
                yield "\n"
            yield from _marked(self.form.before)
            yield turn.said
            yield from _marked(self.form.between)
            if turn.answer is not None:
                yield turn.answer
                yield from _marked(self.form.after)

    def _mark(self, mark: str) -> int:
        found = self.tokenizer.library.token_to_id(mark)
        if found is None:
            raise ConfigError(
                f"--format: expected plain or roles, because the tokenizer has no {mark}, "
                "got chatml"
            )
        return found


class _Mark(str):
    """A mark of a format, which is one token; the same text from a user is text."""


def _marked(template: str) -> Iterator[str]:
    for piece in _MARK.split(template):
        yield _Mark(piece) if _MARK.fullmatch(piece) else piece


def run(options: argparse.Namespace) -> None:
    """Answer lines until they end or one is /quit. Raises MantransError for wrong options."""
    wrapper, tokenizer, config = load_chosen(options)
    chat = Chat(wrapper, tokenizer, config, options.format)
    about = "the model continues your text (plain: no chat format)"
    terminal.say(f"{about if options.format == 'plain' else options.format}; /help for commands")
    for line in lines():
        try:
            if line.startswith("/"):
                if not obey(chat, line):
                    return
            elif line or options.format == "plain":
                print_answer(chat, line)
        except (ConfigError, DataError) as wrong:
            terminal.say(str(wrong))
        except KeyboardInterrupt:
            terminal.show("")


def print_answer(chat: Chat, said: str) -> None:
    """Show an answer while it is drawn. Ctrl-C stops it after the token that is being drawn."""
    with interruptible() as interrupted, contextlib.closing(chat.answer(said)) as pieces:
        for piece in pieces:
            terminal.show(printable(piece), end="")
            if interrupted():
                break
    terminal.show("")


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C raises nothing; the function that is given says whether it came."""
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGINT, before)


def lines() -> Iterator[str]:
    """The user's lines, with a prompt and a history of lines on a terminal."""
    at_terminal = sys.stdin is not None and sys.stdin.isatty()
    prompt = "> " if sys.stdout is not None and sys.stdout.isatty() else ""
    if at_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() uses it)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is not UTF-8 is refused by name
    while sys.stdin is not None:
        try:
            line = input(prompt) + "\n" if at_terminal else sys.stdin.readline()
        except KeyboardInterrupt:
            terminal.say("")
            continue
        except EOFError:
            line = ""
        if not line:
            return
        yield line.removesuffix("\n")


def obey(chat: Chat, line: str) -> bool:
    """Do what a line that begins with / says; False for the end. ConfigError for a wrong one."""
    command, _, value = line.partition(" ")
    value = value.strip()
    if command in _SETTINGS:
        name = _SETTINGS[command]
        given = {name: number(value)}
        checked = EvaluationConfig.checked(given, command, sources={name: command})
        chat.options[name] = getattr(checked, name)
    elif command == "/seed":
        try:
            chat.options["seed"] = integer(0, 2**63 - 1)(value)
        except argparse.ArgumentTypeError as wrong:
            raise ConfigError(f"/seed: {wrong}") from None
    elif command == "/save":
        save(chat, value)
    elif command not in ("/reset", "/help", "/quit"):
        known = ", ".join((*_SETTINGS, "/seed", "/reset", "/save", "/help", "/quit"))
        raise ConfigError(f"command: expected one of {known}, got {show(command)}")
    elif value:
        raise ConfigError(f"{command}: expected nothing after it, got {show(value)}")
    elif command == "/reset":
        chat.reset()
    elif command == "/help":
        terminal.say(_HELP)
    return command != "/quit"


def number(text: str) -> Any:
    """A number, or None for null; other text is left to be refused."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return None if text == "null" else text


def save(chat: Chat, name: str) -> None:
    """Write the conversation to a new file. ConfigError if it is there, or cannot be."""
    if not name:
        raise ConfigError("/save: expected a file's path, got ''")
    try:
        with Path(name).expanduser().open("x", encoding="utf-8", newline="") as file:
            file.write(chat.text() + "\n")
    except FileExistsError:
        raise ConfigError(f"/save: expected a new file, got {show(name)}, which exists") from None
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"/save: expected a file that can be written, got {show(name)} ({reason})"
        ) from None
