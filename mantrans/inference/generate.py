"""Continues a text once or more: the work of `mantrans generate`."""

from __future__ import annotations

import argparse
import sys
import time

from mantrans import terminal
from mantrans.errors import DataError, printable
from mantrans.inference.text import continue_text
from mantrans.inference.trained import load_chosen

LONGEST = 2**24  # bytes of a prompt; no model reads as many


def run(options: argparse.Namespace) -> None:
    """Print the prompt and its continuations while they are drawn, then their speed."""
    prompt = read_prompt(options.file) if options.prompt is None else options.prompt
    wrapper, tokenizer, config = load_chosen(options)
    tokens, begun = 0, time.perf_counter()
    for number in range(options.count):
        seed = config.training.seed + number
        if options.count > 1:
            terminal.show(f"--- {number + 1} of {options.count}, seed {seed} ---")
        made = continue_text(wrapper, tokenizer, config, prompt, seed)
        terminal.show(printable(prompt), end="")
        for piece in made:
            terminal.show(printable(piece), end="")
        terminal.show("")
        tokens += made.tokens
    seconds = time.perf_counter() - begun
    terminal.say(f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s")


def read_prompt(name: str) -> str:
    """The text of a file, or of standard input if it is "-", without the line break that ends it.

    Raises DataError for what is not UTF-8 or too long, OSError for what cannot be read.
    """
    if name == "-":
        if sys.stdin is None or sys.stdin.closed:
            raise DataError("--file: expected text on standard input, got none: it is closed")
        raw = sys.stdin.buffer.read(LONGEST + 1)
    else:
        with open(name, "rb") as file:
            raw = file.read(LONGEST + 1)
    if len(raw) > LONGEST:
        raise DataError(f"--file: expected at most {LONGEST:,} bytes, got more")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte 0x{raw[error.start]:02x} at {error.start}"
        raise DataError(f"--file: expected text in UTF-8, got {found}") from None
    return text.removesuffix("\n").removesuffix("\r")
