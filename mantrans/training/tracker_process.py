"""The process in which trackio or wandb works: `python -m mantrans.training.tracker_process`.

Standard input has lines of JSON: first what the run is, then [step, numbers] until the end of the
run, or of the process that trains. Standard output has the one line that says why it ended early.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any


def main() -> None:
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what the library prints
    try:
        run = begin(**json.loads(sys.stdin.buffer.readline()))
        for line in sys.stdin.buffer:
            step, values = json.loads(line)
            run.log(values, step=step)
        run.finish()
    except BaseException as error:  # SystemExit too: it is the library's, not ours
        answer.write(f"{type(error).__name__}: {error}")
        answer.close()
        sys.exit(1)


def begin(library: str, folder: str, name: str, number: str, **given: Any) -> Any:
    """The library's run: a new one, or that of this number again.

    given: project and config.
    """
    module = importlib.import_module(library)
    if library == "trackio":  # knows a run by its name
        named = f"{name}-{number}"
        return module.init(
            name=named, resume="allow", auto_log_gpu=False, auto_log_cpu=False, **given
        )
    return module.init(
        name=name,
        id=number,
        resume="allow",
        dir=os.environ.get("WANDB_DIR", folder),
        settings=module.Settings(silent=True, console="off"),
        **given,
    )


if __name__ == "__main__":
    main()
