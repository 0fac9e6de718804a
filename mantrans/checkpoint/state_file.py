"""Saves and loads a state so that no crash, full disk or flipped bit destroys an earlier save.

A state is plain data and tensors: dictionaries with text or integer keys, lists, tuples, text,
numbers, true, false, None. `save` replaces the file atomically; `load` verifies every byte before
it uses any. Loading runs no code from the file, which holds only JSON and numbers.

Setting MANTRANS_TEST_SLOW_WRITE to a number of seconds makes each write of a save wait that long;
the tests use it to kill a process during a save.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mantrans.checkpoint import plain, tensor_file
from mantrans.checkpoint.atomic import replacing, write_all
from mantrans.checkpoint.tensor_file import FormatError, shown
from mantrans.errors import CheckpointError, MantransError, single_line
from mantrans.runtime import is_out_of_memory

SLOW_WRITE_VARIABLE = "MANTRANS_TEST_SLOW_WRITE"
FORMAT = "mantrans checkpoint 2"
_ZIP = b"PK\x03\x04"


class Order(NamedTuple):
    """Which of a run's checkpoints is newer: the greater. Neither names nor times decide."""

    saves: int  # of the run until then, this one included; 0 in files from before it was counted
    step: int


def save(path: str | Path, state: dict[str, Any], *, saves: int = 0) -> None:
    """Write `state` to `path`; an earlier file is replaced only when all of it is on the disk.

    saves: how many times the run has been saved, see `Order`; 0 if it is not counted.

    Tensors may be on any device and may be views; each is stored completely, under the path of keys
    that leads to it. The package safetensors can read the file too.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; `path` is as it was.
        TypeError: `state` holds something that is neither plain data nor a tensor.
    """
    path = Path(path)
    text, tensors = plain.flatten(state)
    delay = float(os.environ.get(SLOW_WRITE_VARIABLE) or 0.0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:

            def put(data: bytes | memoryview) -> None:
                time.sleep(delay)
                write_all(file, data)

            facts = {"format": FORMAT, "state": text}
            tensor_file.write(put, facts | ({"saves": str(saves)} if saves else {}), tensors)
    except (OSError, FormatError) as error:
        raise CheckpointError(
            f"{_shown(path)}: the checkpoint could not be written ({reason(error)}); "
            "what was saved before is intact"
        ) from None


def load(path: str | Path) -> dict[str, Any]:
    """Return the state saved at `path`, after verifying every byte.

    Its tensors are on the CPU and map the file's bytes into memory: writing to one takes memory and
    does not change the file. The rest takes no more memory than a header's largest size.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it is of another format.
    """
    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise FormatError("it is not a regular file")
        with open(path, "rb") as file:
            if file.read(len(_ZIP)) == _ZIP:
                raise CheckpointError(
                    f"{_shown(path)}: expected {FORMAT}, got the first format, a pickle, which is "
                    "not read; if the file is your own, convert it: "
                    f"python -m mantrans convert {_shown(path)} NEW.pt"
                )
            metadata, tensors = tensor_file.read(file)
        if metadata.get("format") != FORMAT:
            raise FormatError(f"expected {FORMAT}, got {shown(metadata.get('format', 'none'))}")
        return plain.restore(metadata.get("state", ""), tensors)
    except FileNotFoundError:
        raise CheckpointError(
            f"{_shown(path)}: expected a checkpoint (*.pt), got no such file"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{_shown(path)}: cannot be read ({reason(error)})") from None
    except FormatError as error:
        raise CheckpointError(
            f"{_shown(path)}: is damaged or not a checkpoint: {error}; use another one, or "
            "--resume latest, which takes the newest that is intact"
        ) from None


def order(path: Path) -> Order | None:
    """Where the checkpoint stands among its run's; None if the file does not say.

    Only the header is read, and nothing is verified.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return None
        with open(path, "rb") as file:
            metadata = tensor_file.read_metadata(file)
        saves = metadata.get("saves", "0")
        if metadata.get("format") != FORMAT or not (saves.isdecimal() and len(saves) < 19):
            return None
        step: Any = tensor_file.parse_json(metadata["state"])
        for name in ("progress", "step"):
            step = step.get(name) if isinstance(step, dict) else None
        return Order(int(saves), step if type(step) is int else 0)
    except (OSError, KeyError, FormatError):
        return None


def verify(path: str | Path) -> None:
    """Verify `path` without keeping anything in memory.

    Raises:
        CheckpointError: as for `load`.
    """
    load(path)  # a map takes no memory until it is used


@contextlib.contextmanager
def understood(path: str | Path) -> Iterator[None]:
    """For code that uses a loaded state: a missing or wrong item becomes a CheckpointError about
    `path`, because an intact file may still hold something else. Out-of-memory errors pass through.
    """
    try:
        yield
    except MantransError as error:
        if str(error).isprintable():
            raise
        raise CheckpointError(f"{_shown(path)}: {reason(error)}") from None  # it quotes the file
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        RuntimeError,
        OverflowError,
    ) as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"{_shown(path)}: expected a checkpoint that train.py saved, got another state "
            f"({type(error).__name__}: {reason(error)})"
        ) from None


def reason(error: BaseException) -> str:
    """Return what went wrong, on one short line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())[:200]


def _shown(path: str | Path) -> str:
    return single_line(str(path))
