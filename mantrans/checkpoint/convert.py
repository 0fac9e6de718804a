"""Converts a checkpoint of the first format, a zip with a pickle, to the current format.

    mantrans convert OLD.pt NEW.pt

Only for your own files. PyTorch reads the old file with `weights_only`, which runs no code, but a
malicious file can make it take all of the machine's memory.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import torch

from mantrans.checkpoint.state_file import reason, save
from mantrans.errors import CheckpointError

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
        state = torch.load(old, map_location="cpu", weights_only=True)  # noqa: TID251
    except Exception as error:  # zipfile, pickle and torch raise many kinds for a broken file
        raise CheckpointError(
            f"{old}: expected an intact checkpoint of the first format, got one that cannot be "
            f"read ({reason(error)})"
        ) from None
    save(new, state)
