"""`mantrans generate`: where the prompt is from, several continuations, stop texts, the speed."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest

from mantrans.cli import main
from mantrans.config import Config
from mantrans.evaluation.evaluator import generate_samples
from mantrans.inference.text import continue_text
from mantrans.inference.trained import load_model, load_trained
from tests.support.runs import NAME, finish, small


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    finish(small(folder, folder / "tokens", max_steps=6))
    return folder / "checkpoints" / NAME / "best.pt"


def generate(checkpoint: Path, *options: str) -> int:
    return main(["generate", "--checkpoint", str(checkpoint), *options])


@pytest.mark.parametrize("written", ["On\nce é", "On\nce é\n", "On\nce é\r\n", "\ufeffOn\nce é\n"])
def test_generate_prompt_from(checkpoint, tmp_path, capsys, monkeypatch, written: str) -> None:
    """An argument, a file and standard input give the same, without the last line break."""
    (tmp_path / "prompt.txt").write_bytes(written.encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(written.encode())))
    said = set()
    for source in (
        ["--prompt", "On\nce é"], ["--file", str(tmp_path / "prompt.txt")], ["--file", "-"]
    ):  # fmt: skip
        assert generate(checkpoint, *source) == 0
        said.add(capsys.readouterr().out)
    [text] = said
    assert text.startswith("On\nce é") and len(text) > 20


def test_generate_input_closed(checkpoint, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert generate(checkpoint, "--file", "-") == 2
    assert capsys.readouterr().err == (
        "error: --file: expected text on standard input, got none: it is closed\n"
    )


def test_generate_count(checkpoint, capsys) -> None:
    """Each continuation is the one of its own seed, also beyond the largest --seed."""
    options = ["--prompt", "Once", "--temperature", "2"]
    for first in (7, 2**63 - 1):
        assert generate(checkpoint, *options, "-n", "2", "--seed", str(first)) == 0
        out = capsys.readouterr().out
        parts = re.split(r"^--- \d of 2, seed (\d+) ---\n", out, flags=re.MULTILINE)
        assert parts[0] == "" and parts[1::2] == [str(first), str(first + 1)]
        assert parts[2] != parts[4]
        assert generate(checkpoint, *options, "--seed", str(first)) == 0
        assert capsys.readouterr().out == parts[2]
    assert generate(checkpoint, *options, "--seed", "8") == 0
    assert capsys.readouterr().out != parts[4]


def test_generate_speed(checkpoint, capsys) -> None:
    """The tokens that were drawn, of all continuations."""
    config = Config.from_dict(load_trained(checkpoint)["config"])
    wrapper, tokenizer = load_model(checkpoint, load_trained(checkpoint), config)
    tokens = 0
    for seed in (0, 1):
        made = continue_text(wrapper, tokenizer, config, "Once", seed)
        list(made)
        tokens += made.tokens
    assert generate(checkpoint, "--prompt", "Once", "--count", "2", "--seed", "0") == 0
    [line] = capsys.readouterr().err.splitlines()
    found = re.fullmatch(r"(\d+) tokens in (\d+\.\d\d) s: (\d+\.\d) tokens/s", line)
    assert found and int(found[1]) == tokens > 40


def test_stop_every_door(checkpoint, capsys) -> None:
    """The command, samples of an evaluation and the library end before the same stop text."""
    config = Config.from_dict(load_trained(checkpoint)["config"])
    config.evaluation.temperature = 1.5
    config.evaluation.generation_prompts = ["Once"]
    wrapper, tokenizer = load_model(checkpoint, load_trained(checkpoint), config)
    whole = "".join(continue_text(wrapper, tokenizer, config, "Once"))
    stop = whole[9:12]
    expected = whole.partition(stop)[0]
    config.evaluation.stop = ["never said", stop]
    assert "".join(continue_text(wrapper, tokenizer, config, "Once")) == expected
    [sample] = generate_samples(wrapper, tokenizer, config, 1)
    assert sample["continuation"] == expected
    options = ["--prompt", "Once", "--temperature", "1.5", "--stop", "never said", "--stop", stop]
    assert generate(checkpoint, *options) == 0
    assert capsys.readouterr().out.encode() == f"Once{expected}\n".encode()


def test_settings_reach_the_model(checkpoint, capsys) -> None:
    """min_p 1 is greedy; a high penalty repeats no byte; both from options and from a config."""
    assert generate(checkpoint, "--prompt", "Once", "--temperature", "0") == 0
    greedy = capsys.readouterr().out
    assert generate(checkpoint, "--prompt", "Once", "--min-p", "1") == 0
    assert capsys.readouterr().out == greedy
    config = Config.from_dict(load_trained(checkpoint)["config"])
    config.evaluation.temperature, config.evaluation.repetition_penalty = 0, 100.0
    config.evaluation.generation_prompts = ["Once"]
    [sample] = generate_samples(
        *load_model(checkpoint, load_trained(checkpoint), config), config, 1
    )
    assert generate(
        checkpoint, "--prompt", "Once", "--temperature", "0", "--repetition-penalty", "100"
    ) == 0  # fmt: skip
    penalized = capsys.readouterr().out
    assert penalized != greedy
    assert len(set(sample["continuation"][:10])) > len(set(greedy[4:14]))
