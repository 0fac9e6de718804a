"""python -m benchmarks COMMAND [options]: what is fast here, beside what people would use instead.

commands:
  peaks      what the machine can do: copying memory, multiplying matrices
  ops        every operation
  step       whole training steps
  scaling    how a step's cost grows with length, width, depth and vocabulary
  race       recipes that train on one text for the same seconds
  ranks      steps of several processes, beside DistributedDataParallel
  report     write docs/benchmarks.md and its figures from the newest results
  gpu        all that only a GPU can prove or measure, in nine minutes
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from benchmarks.harness import RESULTS
from mantrans.runtime import disable_malloc_trim

# command -> (module, its usual seconds)
COMMANDS = {
    "peaks": ("peaks", 10),
    "ops": ("operations", 240),
    "step": ("steps", 300),
    "scaling": ("scaling", 120),
    "race": ("race", 300),
    "ranks": ("ranks", 120),
    "report": ("report", 60),
    "gpu": ("gpu", 530),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("command", choices=COMMANDS)
    add("stages", nargs="*", help="of gpu: only these stages")
    add("--output", type=Path, default=RESULTS, help="folder of results (default: %(default)s)")
    add("--seconds", type=float, help="start no more cases after this")
    add("--quick", action="store_true", help="tiny sizes: does it run at all?")
    add("--only", default="", metavar="TEXT", help="cases whose name contains TEXT")
    add("--against", type=_names, default=(), metavar="A,B", help="ours beside these alone")
    add("--text", type=Path, help="of race: documents, separated by <|endoftext|>")
    add("--seeds", type=_integers, default=(1,), metavar="1,2", help="of race")
    add("--points", type=int, default=10, help="of a race's curves, each an evaluation")
    arguments = parser.parse_args()
    module, seconds = COMMANDS[arguments.command]
    if arguments.seconds is None:
        arguments.seconds = seconds
    disable_malloc_trim()  # as in `train.py`, for every candidate
    return importlib.import_module(f"benchmarks.{module}").main(arguments)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
