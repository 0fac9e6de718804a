"""The errors a user can cause and mend; the command line prints them as one line, no traceback."""

from __future__ import annotations


class MantransError(Exception):
    """What was found, where, and what is accepted instead. `train.py` and `evaluate.py` exit 2."""


class ConfigError(MantransError, ValueError):
    """A field of the configuration is unknown, ill-typed, or contradicts another."""


class DataError(MantransError):
    """Text, a tokenizer or a token cache is missing, unreadable, or does not fit the model."""


class CheckpointError(MantransError):
    """A checkpoint is missing, damaged, or was made for something else."""


def printable(text: str) -> str:
    """`text` without control characters: an untrained model writes what would move the cursor."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
