"""The arguments that all programs of this folder share, and the clock that bounds a stage."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from benchmarks.records import RESULTS
from mantrans.runtime import disable_malloc_trim


def arguments(description: str, seconds: float) -> argparse.Namespace:
    """--output, --seconds, --quick, --only, --providers; `seconds` is the stage's usual time.

    Everybody is measured with freed memory kept, as `train.py` asks of the C library.
    """
    disable_malloc_trim()
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--output", type=Path, default=RESULTS, help="folder of results")
    p.add_argument("--seconds", type=float, default=seconds, help="stop starting cases after this")
    p.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    p.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains TEXT")
    p.add_argument("--providers", type=_names, default=(), metavar="A,B", help="nobody else")
    return p.parse_args()


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


class Budget:
    """How much of a stage's time is left, and how it is shared among the cases still to come.

    end: when it is over, on `time.monotonic`'s clock.
    """

    def __init__(self, seconds: float, cases: int) -> None:
        self.end = time.monotonic() + seconds
        self.cases = cases

    def next_share(self) -> float:
        """Seconds for the next case; 0 or less: do not start it."""
        left = self.end - time.monotonic()
        share = left / max(1, self.cases)
        self.cases -= 1
        return share if left > 0 else 0.0
