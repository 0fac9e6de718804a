"""Errors that a user can cause and correct; `mantrans.cli` prints them in one line."""

from __future__ import annotations

from typing import Any


class MantransError(Exception):
    """One line: "NAME: expected X, got Y". The commands exit with status 2."""


class ConfigError(MantransError, ValueError):
    """A field of the configuration is unknown, of the wrong type, or contradicts another."""


class DataError(MantransError):
    """Text, a tokenizer or a token cache is missing, unreadable, or does not fit the model."""


class UnfinishedError(DataError):
    """Preparing a text was broken off; what is done is kept, and the same command goes on."""


class CheckpointError(MantransError):
    """A checkpoint is missing, damaged, or of another model."""


class RanksError(MantransError):
    """The ranks of a run do not agree; names those that it is about."""


class ModelError(MantransError):
    """What a model computes is NaN or infinite, so that nothing can be drawn from it."""


def single_line(text: str) -> str:
    """Return `text` for one line of a terminal: unprintable characters escaped, length cut."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return shown if len(shown) <= 200 else shown[:197] + "..."


def show(value: Any) -> str:
    """Return a value and its kind for an error message: one short line, whatever the value."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        # Python refuses to print integers of thousands of digits.
        return str(value) if value.bit_length() <= 128 else f"a {value.bit_length()}-bit integer"
    if isinstance(value, str):
        shown = single_line(value)
        return f"{shown if len(shown) <= 60 else shown[:57] + '...'} (text)" if shown else "''"
    if isinstance(value, float):
        return f"{value!r} (number)"
    words: dict[Any, str] = {list: "a list", dict: "a mapping"}
    return words.get(type(value), f"a {type(value).__name__}")


def printable(text: str) -> str:
    """`text` without control characters, which an untrained model may generate."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
