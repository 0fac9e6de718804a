"""`python -m tools.gate`: see the package's docstring."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor

import triton

from tools import gate
from tools.gate import report
from tools.gate.cards import CARDS
from tools.gate.run import Result, gather_all, gather_small


def main() -> int:
    """Compile, check, and say what was found; the exit status says whether all is well."""
    parser = argparse.ArgumentParser(prog="python -m tools.gate", description=gate.__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--arch", type=int, nargs="+", choices=CARDS, default=list(CARDS))
    parser.add_argument("--small", action="store_true", help="one small step for sm_90, no more")
    parser.add_argument("--write", action="store_true", help="write the record and docs/kernels.md")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: kernels that are interpreted cannot be compiled")
    if arguments.small:
        return say(90, gather_small())

    # A new process for each: spawned, for LLVM does not survive a fork with threads.
    workers = min(len(arguments.arch), os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")
    failed = 0
    with ProcessPoolExecutor(workers, context, max_tasks_per_child=1) as pool:
        results = pool.map(gather_all, arguments.arch)
        for capability, result in zip(arguments.arch, results, strict=True):
            failed |= say(capability, result)
            report.full_list(capability, result)
            if arguments.write:
                report.write(capability, result)
    return failed


def say(capability: int, result: Result) -> int:
    """Print a line for the run, and one for each violation; 1 if there is one, or no launch."""
    print(
        f"{CARDS[capability].architecture}: {len(result.rows)} kernels, {result.launches} launches "
        f"with Triton {triton.__version__}, {len(result.broken)} violations",
        flush=True,
    )
    for line in result.broken:
        print(f"error: {line}", file=sys.stderr)
    return int(bool(result.broken) or not result.rows)


if __name__ == "__main__":
    sys.exit(main())
