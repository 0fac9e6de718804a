"""Types of command-line options, for argparse: numbers in a range."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable

COUNT = 10**12  # the largest count that a configuration accepts too


def integer(low: int, high: int = COUNT) -> Callable[[str], int]:
    """The type of an integer from `low` to `high`."""

    def read(text: str) -> int:
        number = int(text) if re.fullmatch(r"[-+]?[0-9]{1,30}", text) else None
        if number is None or not low <= number <= high:
            raise argparse.ArgumentTypeError(
                f"expected an integer from {low} to {high}, got {text[:40]!r}"
            )
        return number

    return read


def share(text: str) -> float:
    """The type of a number from 0 to below 1."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0.0 <= number < 1.0:
        raise argparse.ArgumentTypeError(
            f"expected a number of at least 0 and below 1, got {text[:40]!r}"
        )
    return number
