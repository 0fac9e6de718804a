"""The errors a user can cause and correct; `mantrans.cli` prints them as one line, no traceback."""

from __future__ import annotations


class MantransError(Exception):
    """Where, what was expected and what was there instead. The commands exit with status 2."""


class ConfigError(MantransError, ValueError):
    """A field of the configuration is unknown, ill-typed, or contradicts another."""


class DataError(MantransError):
    """Text, a tokenizer or a token cache is missing, unreadable, or does not fit the model."""


class CheckpointError(MantransError):
    """A checkpoint is missing, damaged, or was made for something else."""
