"""A rank that breaks: `train`, but in its own way on one rank.

The variable BREAK says how, on which rank and where: "kill 1 step 7", "hang 0 validation 6". When
torchrun starts it again, nothing breaks.

    where   start       from the start
            step        inside that step: its gradients are computed, nothing is exchanged yet
            validation  before the validation of that step
    how     kill, stop  by a signal to itself
            term        SIGTERM to itself, which asks to stop after the step
            sleep       for 15 seconds
            hang        its main thread sleeps, the others of the process go on
            memory      it asks for more memory than there can be
            bug         an exception that nobody expects
            nan         its loss is NaN in this step and the later ones
            off         its loss is wrong once
            bit         it turns one bit of its weights
            version     its packages have another version
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from mantrans import cli
from mantrans.training import agreement
from mantrans.training import trainer as module
from mantrans.training.trainer import Trainer

BREAK, BROKEN = "BREAK", "tests.support.broken_rank:main train"


def main() -> int:
    how, rank, where, step = os.environ[BREAK].split()
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if again or rank != os.environ.get("RANK", "0"):
        return cli.main()
    if where == "start":
        do(how, None)
    advance, measure = Trainer._advance, module.measure_stream

    def and_break(run: Trainer) -> None:
        if run.progress.step + 1 == int(step) and where == "step":
            model = run.wrapper.model
            model.forward_backward = then(model.forward_backward, how, run)  # type: ignore[method-assign]
        advance(run)

    def measure_and_break(*arguments: Any, **keywords: Any) -> Any:
        if where == "validation":
            do(how, None)
        return measure(*arguments, **keywords)

    Trainer._advance = and_break  # type: ignore[method-assign]
    module.measure_stream = measure_and_break
    return cli.main()


def then(function: Callable[..., Any], how: str, run: Trainer) -> Callable[..., Any]:
    """`function`, and when it is called first, what breaks the rank."""
    ways = [how]

    def called(*arguments: Any, **keywords: Any) -> Any:
        result = function(*arguments, **keywords)
        first = bool(ways)
        if first:
            do(ways.pop(), run)
        if how == "off" and first:
            return result * 1.001
        return result * torch.nan if how == "nan" else result

    return called


def do(how: str, run: Trainer | None) -> None:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    elif how == "hang":
        time.sleep(3600)
    elif how == "sleep":
        time.sleep(15)
    elif how == "version":
        agreement.metadata.version = lambda package: "0.0"  # type: ignore[assignment]
    elif how == "memory":
        torch.empty(1 << 50)
    elif how == "bug":
        raise KeyError("nobody expects this")
    elif how == "bit" and run is not None:
        weights = run.wrapper.model.parameters.weights
        weights.view(torch.int32)[70] ^= 1


if __name__ == "__main__":
    sys.exit(main())
