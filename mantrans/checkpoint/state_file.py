"""Saves and loads a state so that no crash, full disk or flipped bit costs what was saved before.

A state is plain data and tensors: dictionaries with text or integer keys, lists, tuples, text,
numbers, true, false, None. `save` replaces the file atomically; `load` verifies every byte before
it believes any, and never runs anything the file contains.

Setting MANTRANS_TEST_SLOW_WRITE to a number of seconds makes each write of a save wait that long;
the tests use it to kill a process inside one.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import time
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from mantrans.checkpoint import archive, plain_pickle
from mantrans.checkpoint.atomic import replacing, write_all
from mantrans.errors import CheckpointError, MantransError
from mantrans.runtime import is_out_of_memory

SLOW_WRITE_VARIABLE = "MANTRANS_TEST_SLOW_WRITE"
_SAVABLE = frozenset(plain_pickle.STORAGE_TYPES.values())


def save(path: str | Path, state: dict[str, Any]) -> None:
    """Write `state` to `path`, replacing what was there only when all of it is on the disk.

    Tensors may be on any device and are saved as CPU tensors; views of one buffer are saved as one
    buffer and loaded as its views. `torch.load(path, weights_only=True)` reads the file as well.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; `path` is as it was.
        TypeError: `state` holds something that is neither plain data nor a tensor.
    """
    path = Path(path)
    portable = _Portable().copy(state, "state")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            sink = _Sink(file)
            sink.take(portable)
            archive.seal(file)
    except (OSError, archive.DamagedError) as error:
        raise CheckpointError(
            f"{path}: the checkpoint could not be written ({reason(error)}); "
            "what was saved before is intact"
        ) from None


def load(path: str | Path) -> dict[str, Any]:
    """Return the state saved at `path`, every byte of it verified; tensors are on the CPU.

    Memory is bounded by the file's size, whatever the file claims.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it is not plain data.
    """
    return _read(path, keep=True)


def verify(path: str | Path) -> None:
    """Read all of `path` without keeping any of it.

    Raises:
        CheckpointError: as for `load`.
    """
    _read(path, keep=False)


@contextlib.contextmanager
def understood(path: str | Path) -> Iterator[None]:
    """Around code that takes a loaded state apart: what it finds missing or of another kind is a
    CheckpointError about `path`. A file may be intact and still not be what it is taken for.
    Full memory is not the file's fault and passes through."""
    try:
        yield
    except MantransError as error:
        if str(error).isprintable():
            raise
        raise CheckpointError(f"{path}: {reason(error)}") from None  # it quotes the file
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
            f"{path}: its state cannot be used ({type(error).__name__}: {reason(error)}); "
            "accepted: a checkpoint that train.py saved"
        ) from None


class _Portable:
    """Copies a state's containers, and brings its tensors to the CPU, one buffer at a time."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[torch.device, int], torch.Tensor] = {}

    def copy(self, value: Any, where: str, depth: int = 0) -> Any:
        if depth > plain_pickle.MAX_DEPTH:
            raise TypeError(f"{where}: nested more than {plain_pickle.MAX_DEPTH} deep")
        if isinstance(value, torch.Tensor):
            return self.tensor(value, where)
        if value is None or isinstance(value, bool):
            return value
        for kind in (int, float, str):
            # A NumPy number is a float by inheritance; only the plain kind is pickled as plain.
            if isinstance(value, kind):
                return kind(value)
        if isinstance(value, list | tuple):
            items = [
                self.copy(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)
            ]
            return items if isinstance(value, list) else tuple(items)
        if isinstance(value, dict) and all(type(key) in (str, int) for key in value):
            return {
                key: self.copy(item, f"{where}.{key}", depth + 1) for key, item in value.items()
            }
        raise TypeError(f"{where}: {type(value).__name__} is neither plain data nor a tensor")

    def tensor(self, tensor: torch.Tensor, where: str) -> torch.Tensor:
        if tensor.dtype not in _SAVABLE or tensor.layout != torch.strided:
            raise TypeError(f"{where}: a {tensor.layout} tensor of {tensor.dtype} is not saved")
        if tensor.dim() > plain_pickle.MAX_DIMENSIONS:
            raise TypeError(f"{where}: a tensor of {tensor.dim()} dimensions is not saved")
        tensor = tensor.detach()
        if not tensor.is_contiguous() or tensor.numel() == 0:
            return tensor.to("cpu").contiguous().clone()
        storage = tensor.untyped_storage()
        key = (tensor.device, storage.data_ptr())
        if key not in self.buffers:
            whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            self.buffers[key] = whole.set_(storage).to("cpu")
        buffer = self.buffers[key]
        if buffer.dtype != tensor.dtype:
            return tensor.to("cpu").clone()
        return buffer.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


class _Sink:
    """What `torch.save` writes to. After an error it pretends to go on, and raises it at the end:
    torch's own writer would turn a full disk into an internal error, or end the process."""

    def __init__(self, file: FileIO) -> None:
        self.file = file
        self.error: BaseException | None = None
        self.delay = float(os.environ.get(SLOW_WRITE_VARIABLE) or 0.0)

    def write(self, data: bytes | memoryview) -> int:
        if self.error is None:
            try:
                time.sleep(self.delay)
                write_all(self.file, data)
            except BaseException as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        """Nothing to do: the file is unbuffered."""

    def take(self, state: Any) -> None:
        """Write `state`; raise the file's own error if it had one."""
        try:
            torch.save(state, self)  # type: ignore[arg-type]
        except RuntimeError:
            if self.error is None:
                raise
        if self.error is not None:
            raise self.error


def _read(path: str | Path, *, keep: bool) -> dict[str, Any]:
    """Read and verify a checkpoint; with `keep` False its tensors come back empty."""
    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise archive.DamagedError("it is not a regular file")
        with open(path, "rb", buffering=0) as file:
            return _Records(file, keep).state()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; accepted: a checkpoint (*.pt)") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({reason(error)})") from None
    except archive.DamagedError as error:
        raise CheckpointError(
            f"{path}: is damaged or not a checkpoint: {error}; use another one, or "
            "--resume latest, which takes the newest that is intact"
        ) from None
    except (plain_pickle.RefusedError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"{path}: is refused: {reason(error)}; accepted: a file that mantrans saved"
        ) from None


class _Records:
    """An open checkpoint's tensor storages, each read and verified once."""

    def __init__(self, file: FileIO, keep: bool) -> None:
        self.file = file
        self.keep = keep
        self.entries = archive.open_sealed(file)
        self.buffers: dict[str, torch.Tensor] = {}

    def state(self) -> dict[str, Any]:
        order = archive.read_entry(self.file, self.entry("byteorder"), 16)
        if order.decode("ascii", "replace") != sys.byteorder:
            raise archive.DamagedError("it comes from a machine with another byte order")
        pickled = archive.read_entry(self.file, self.entry("data.pkl"), archive.MAX_PICKLE_BYTES)
        state = plain_pickle.read(pickled, self.tensor)
        if not isinstance(state, dict):
            raise plain_pickle.RefusedError(f"it holds a {type(state).__name__}, not a state")
        for name, entry in self.entries.items():
            if entry.is_record and name.removeprefix("data/") not in self.buffers:
                raise plain_pickle.RefusedError(f"nothing refers to {name}")
        return state

    def tensor(self, claim: plain_pickle.TensorClaim) -> torch.Tensor:
        storage = claim.storage
        entry = self.entry(f"data/{storage.key}")
        if storage.n_elements * storage.dtype.itemsize != entry.size:
            raise plain_pickle.RefusedError(
                f"{entry.name} has {entry.size} bytes, not {storage.n_elements} of {storage.dtype}"
            )
        if storage.key not in self.buffers:
            buffer = torch.empty(entry.size if self.keep else 0, dtype=torch.uint8)
            into = memoryview(buffer.numpy().data) if self.keep else None
            archive.read_record(self.file, entry, into)
            self.buffers[storage.key] = buffer
        if not self.keep:
            return torch.empty(0)
        flat = self.buffers[storage.key].view(storage.dtype)
        return flat[claim.offset :][: _product(claim.shape)].view(claim.shape)

    def entry(self, name: str) -> archive.Entry:
        if name not in self.entries:
            raise archive.DamagedError(f"{name} is missing from it")
        return self.entries[name]


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


def reason(error: BaseException) -> str:
    """Return what went wrong in a few words, on one line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())[:200]
