"""Converts a checkpoint of the first format, a zip with a pickle, to the current format.

    python -m mantrans.checkpoint.convert OLD.pt NEW.pt

Only for your own files. PyTorch reads the old file with `weights_only`, which runs no code, but a
malicious file can make it take all of the machine's memory.
"""

from __future__ import annotations

import argparse
import re
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch

from mantrans.checkpoint.state_file import reason, save
from mantrans.errors import CheckpointError, MantransError

_COMMENT = re.compile(rb"mantrans-checkpoint 1 \d{20} [0-9a-f]{64}")


def convert(old: str | Path, new: str | Path) -> None:
    """Write the state in `old`, bit for bit, to `new`; the two may be the same path.

    Raises:
        CheckpointError: `old` is missing, damaged or of another kind; or `new` cannot be written.
    """
    try:
        with zipfile.ZipFile(old) as archive:
            if not _COMMENT.fullmatch(archive.comment) or archive.testzip():
                raise zipfile.BadZipFile("its contents have changed, or another program wrote it")
        state = torch.load(old, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, pickle and torch raise many kinds for a broken file
        raise CheckpointError(
            f"{old}: expected an intact checkpoint of the first format, got one that cannot be "
            f"read ({reason(error)})"
        ) from None
    save(new, state)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, 2 after an error of one line."""
    parser = argparse.ArgumentParser(prog="python -m mantrans.checkpoint.convert")
    parser.add_argument("old", type=Path, help="your own checkpoint of the first format")
    parser.add_argument("new", type=Path, help="where to write it in the current format")
    options = parser.parse_args(arguments)
    try:
        convert(options.old, options.new)
    except MantransError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
