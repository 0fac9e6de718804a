"""`mantrans chat`: the conversation that the model reads, the commands, Ctrl-C, the end."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from mantrans import CustomTransformerWrapper
from mantrans.checkpoint import state_file
from mantrans.cli import main
from mantrans.data.tokenizer import Tokenizer, load_tokenizer
from mantrans.errors import ConfigError
from mantrans.inference import chat
from mantrans.inference.chat import Chat, Turn, obey, print_answer
from mantrans.inference.text import Continuation
from tests.support.runs import GOLDEN, NAME, finish, small

BYTES = load_tokenizer(GOLDEN / "tokenizer")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    finish(small(folder, folder / "tokens", max_steps=6, model={"max_seq_len": 64}))
    return folder / "checkpoints" / NAME / "best.pt"


@pytest.fixture
def talk(checkpoint: Path, capsys, monkeypatch) -> Callable[..., tuple[str, list[str]]]:
    """What a piped conversation prints: answers, and the lines beside them."""

    def run(typed: str | bytes, *options: str) -> tuple[str, list[str]]:
        raw = typed if isinstance(typed, bytes) else typed.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), "utf-8"))
        assert main(["chat", "--checkpoint", str(checkpoint), "--max-tokens", "9", *options]) == 0
        found = capsys.readouterr()
        return found.out, found.err.splitlines()

    return run


def new_chat(
    form: str = "plain", tokenizer: Any = BYTES, length: int = 5, max_seq_len: int = 64
) -> Chat:
    """With a model that has learned nothing. length: tokens of an answer."""
    config = small(Path(), Path())
    config.evaluation.max_generation_length = length
    wrapper = CustomTransformerWrapper(
        vocab_size=tokenizer.vocab_size, d_model=8, n_blocks=1, n_heads=1, max_seq_len=max_seq_len,
        device="cpu", inference=True,
    )  # fmt: skip
    return Chat(wrapper, tokenizer, config, form)


def chatml_tokenizer() -> Tokenizer:
    library = tokenizers.Tokenizer.from_file(str(GOLDEN / "tokenizer" / "tokenizer.json"))
    library.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return Tokenizer(library, "marks", "marks", foreign=True)


@pytest.fixture
def answers(monkeypatch) -> Callable[[Chat, str], list[int]]:
    """A function: ask a chat, whose model answers "A"; the tokens that the model would read."""
    seen: list[list[int]] = []

    class Fixed:
        def __init__(self, wrapper: object, ids: list[int], options: dict) -> None:
            seen.append(ids)

        def __iter__(self):
            yield "A"

    def ask(talk: Chat, said: str) -> list[int]:
        with monkeypatch.context() as patch:
            patch.setattr(chat, "Continuation", Fixed)
            assert list(talk.answer(said)) == ["A"]
        return seen[-1]

    return ask


# ------------------------------------------------------------------------------ what is read

READ = {
    "plain": ["<eot>hi", "<eot>hiA\nyou", "<eot>hiA\nyouA"],
    "roles": [
        "<eot>User: hi\nAssistant:",
        "<eot>User: hi\nAssistant:A\nUser: you\nAssistant:",
        "<eot>User: hi\nAssistant:A\nUser: you\nAssistant:A\nUser: \nAssistant:",
    ],
}


@pytest.mark.parametrize("form", READ)
def test_chat_reads(answers, form: str) -> None:
    """The third time nothing is said: a plain text goes on."""
    talk = new_chat(form, max_seq_len=128)
    eot = BYTES.decode([BYTES.eot_id])
    found = [BYTES.decode(answers(talk, said)) for said in ("hi", "you", "")]
    assert found == [text.replace("<eot>", eot) for text in READ[form]]


def test_chat_chatml(answers) -> None:
    """As transformers' template of Qwen; the marks of the format are tokens, those of a user text.
    An answer ends at its mark."""
    marks = chatml_tokenizer()
    start, end = (marks.library.token_to_id(f"<|im_{name}|>") for name in ("start", "end"))
    talk = new_chat("chatml", marks)
    answers(talk, "<|im_end|>")
    found = answers(talk, "you")
    assert found.count(start) == 4 and found.count(end) == 3
    template = (
        "<|im_start|>user\n<~im_end|><|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        "<|im_start|>user\nyou<|im_end|>\n<|im_start|>assistant\n"
    )
    marks.library.encode_special_tokens = False  # as transformers
    expected = marks.encode(template)
    [tilde], [bar] = BYTES.encode("~"), BYTES.encode("|")
    assert found == [bar if token == tilde else token for token in expected]
    assert talk.options["eos_token_id"] == end


def test_chat_forgets_oldest(answers, capsys) -> None:
    """Whole turns; of a turn that is too long its end. It is said once."""
    talk = new_chat()  # 64 positions less 5 for the answer
    for _ in range(4):
        found = answers(talk, "x" * 20)
    assert BYTES.decode(found[1:]) == "\n".join(["x" * 20 + "A", "x" * 20])
    found = answers(talk, "y" * 70)
    assert BYTES.decode(found) == "y" * 59
    answers(talk, "z")
    assert talk.forgotten == 5
    line = "note: the model reads 59 tokens: it has forgotten what is older (said once)\n"
    assert capsys.readouterr().err == line
    assert talk.text().count("\n") == 5  # all of it can be saved


# ------------------------------------------------------------------------------ commands

WRONG = {
    "/temp": "/temp: expected a finite number at least 0 and at most 100, got ''",
    "/temp hot": "/temp: expected a finite number at least 0 and at most 100, got hot (text)",
    "/temp nan": "/temp: expected a finite number",
    "/temp null": "/temp: expected a finite number at least 0 and at most 100, got null",
    "/topk 0": "/topk: expected an integer at least 1",
    "/topk 1.5": "/topk: expected an integer at least 1",
    "/topp 0": "/topp: expected a finite number above 0",
    "/minp 2": "/minp: expected a finite number above 0",
    "/penalty -1": "/penalty: expected a finite number above 0",
    "/seed": "/seed: expected an integer from 0 to 9223372036854775807, got ''",
    "/seed -1": "/seed: expected an integer from 0",
    "/save": "/save: expected a file's path, got ''",
    "/save /": "/save: expected a new file, got / (text), which exists",
    "/save /dev/null/x": "/save: expected a file that can be written, got /dev/null/x (text)",
    "/save a\0b": "/save: expected a file that can be written",
    "/reset now": "/reset: expected nothing after it, got now (text)",
    "/temperature 1": "command: expected one of /temp, /topk, /topp, /minp, /penalty, /seed, ",
    "/": "command: expected one of ",
    "/ x": "command: expected one of ",
}


def test_chat_commands_wrong(talk) -> None:
    """One line each, and nothing is lost: the answers are those without the wrong lines."""
    typed = ["Once", "a", "b"]
    good, _ = talk("\n".join(typed))
    wrong = list(WRONG)
    out, err = talk("\n".join(["Once", *wrong, "a", *wrong, "b"]))
    assert out == good
    assert len(err) == 1 + 2 * len(wrong)
    for line, expected in zip(err[1:], [*WRONG.values()] * 2, strict=True):
        assert line.startswith(expected) and ", got " in line, line


def test_chat_not_unicode(talk) -> None:
    """A line that is not UTF-8 is refused, and the conversation goes on."""
    good, _ = talk("Once\na\n")
    out, err = talk(b"Once\n\xff\xfe\na\n")
    assert out == good
    assert err[1].startswith("text: expected Unicode, got ")


def test_chat_settings() -> None:
    talk = new_chat()
    for line in ("/temp 0.5", "/topk 7", "/topp 0.9", "/minp 0.1", "/penalty 2", "/seed 5"):
        assert obey(talk, line)
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    assert [talk.options[name] for name in names] == [0.5, 7, 0.9, 0.1, 2.0, 5]
    obey(talk, "/topk null")
    assert talk.options["top_k"] is None
    list(talk.answer("a"))
    assert talk.options["seed"] == 6
    assert not obey(talk, "/quit")


def test_chat_seed_repeats(talk) -> None:
    """The same seeds, the same conversation; /reset forgets it."""
    out, _ = talk("/temp 2\n/seed 3\nOnce\na\n/reset\n/seed 3\nOnce\na\n")
    half = len(out) // 2
    assert out[:half] == out[half:] and half > 5
    other, _ = talk("/temp 2\n/seed 4\nOnce\na\n")
    assert other != out[:half]


def test_chat_save(tmp_path) -> None:
    """What the model reads, whole; never over another file."""
    talk, file = new_chat("chatml", chatml_tokenizer()), tmp_path / "saved.txt"
    talk.turns = [Turn("é", "one\r\n"), Turn("b", "two")]
    assert obey(talk, f"/save {file}")
    saved = file.read_bytes()
    assert saved.decode() == (
        "<|im_start|>user\né<|im_end|>\n<|im_start|>assistant\none\r\n<|im_end|>\n"
        "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n"
    )
    talk.turns = talk.turns[:1]
    with pytest.raises(ConfigError, match="expected a new file"):
        obey(talk, f"/save {file}")
    assert file.read_bytes() == saved


def test_chat_begins_and_ends(talk) -> None:
    """A line says what it is; /quit ends before the next line."""
    out, err = talk("/help\n/quit\nnot read\n")
    assert (
        out == ""
        and err[0] == "the model continues your text (plain: no chat format); /help for commands"
    )
    assert err[1].startswith("/temp X ")
    _, err = talk("", "--format", "roles")
    assert err == ["roles; /help for commands"]


def test_chat_equals_generate(talk, checkpoint, capsys) -> None:
    """The first answer is what `generate` continues."""
    out, _ = talk("Once", "--seed", "4", "--stop", "e")
    options = ["--prompt", "Once", "--seed", "4", "--stop", "e", "--max-length", str(5 + 9)]
    assert main(["generate", "--checkpoint", str(checkpoint), *options]) == 0
    assert capsys.readouterr().out == f"Once{out}"


# ------------------------------------------------------------------------------ Ctrl-C, the end


def test_chat_interrupted_answer(monkeypatch, capsys) -> None:
    """Ctrl-C stops the answer, which is kept, and not the program; it works again afterwards."""
    talk = new_chat(length=50)
    read = Continuation.__iter__

    def interrupted(self):
        for number, piece in enumerate(read(self)):
            if number == 3:
                os.kill(os.getpid(), signal.SIGINT)
            yield "." if piece == "" else piece

    monkeypatch.setattr(Continuation, "__iter__", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    print_answer(talk, "a")
    [turn] = talk.turns
    assert 4 <= len(turn.answer or "") < 12
    assert capsys.readouterr().out.endswith("\n")
    assert signal.getsignal(signal.SIGINT) is handler


def test_chat_interrupted_prompt(monkeypatch, capsys, checkpoint) -> None:
    """At the prompt of a terminal Ctrl-C begins a new line; Ctrl-D ends."""
    typed: list[Any] = [KeyboardInterrupt, "a", KeyboardInterrupt, EOFError]

    def read(prompt: str) -> str:
        line = typed.pop(0)
        if isinstance(line, str):
            return line
        raise line

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", read)
    assert main(["chat", "--checkpoint", str(checkpoint), "--max-tokens", "4"]) == 0
    assert not typed and len(capsys.readouterr().out) > 1


def test_chat_longest_answer(talk) -> None:
    """The tokens of the question and of the longest answer are more than a text may have."""
    out, err = talk("Once\n", "--max-tokens", str(2**20), "--stop", "e")
    assert len(out) > 1 and len(err) == 1


@pytest.mark.promise("logits that are not finite")
def test_chat_broken_model(checkpoint, tmp_path, monkeypatch, capsys) -> None:
    state = state_file.load(checkpoint)
    state["parameters"]["final_norm.bias"].fill_(float("nan"))
    state_file.save(tmp_path / "broken.pt", state)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Once\n"))
    assert main(["chat", "--checkpoint", str(tmp_path / "broken.pt")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[1].startswith("error: logits: expected finite numbers, got nan") and not lines[2:]


def test_chat_input_closed(monkeypatch, checkpoint) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["chat", "--checkpoint", str(checkpoint)]) == 0
