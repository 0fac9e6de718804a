"""Converts a state to JSON text and named tensors, and back, without losing a bit.

A tensor's name is the path of keys that leads to it, `optimizer_state.exp_avg.output.weight`; the
text has {"$tensor": name} in its place. JSON lacks three more things:

    {"$tuple": [...]}               a tuple
    {"$float": "7ff0000000000000"}  the bits of a number that is not finite
    {"$dict": [[key, value], ...]}  a dictionary with integer keys, or with keys that start with $
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mantrans.checkpoint.tensor_file import (
    MAX_DIMENSIONS,
    METADATA,
    NAMES,
    SEAL,
    FormatError,
    parse_json,
    shown,
)

MAX_DEPTH = 32
MAX_BITS = 2048


def flatten(state: dict[str, Any]) -> tuple[str, dict[str, Tensor]]:
    """Return `state` as text, and the tensors that the text names.

    Raises:
        TypeError: `state` holds something that is neither plain data nor a tensor; names its place.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_flatten(state, ("state",), tensors), allow_nan=False, separators=(",", ":"))
    return text, tensors


def _flatten(value: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    where = ".".join(path)
    if len(path) > MAX_DEPTH + 1:
        raise TypeError(f"{where}: nested more than {MAX_DEPTH} deep")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and value.bit_length() <= MAX_BITS:
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": struct.pack(">d", value).hex()}
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Tensor):
        return {"$tensor": _store(value, path, tensors)}
    if isinstance(value, list | tuple):
        items = [_flatten(v, (*path, str(i)), tensors) for i, v in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, dict) and all(type(key) in (str, int) for key in value):
        items = [[key, _flatten(v, (*path, str(key)), tensors)] for key, v in value.items()]
        is_plain = all(type(key) is str and not key.startswith("$") for key in value)
        return dict(items) if is_plain else {"$dict": items}
    raise TypeError(f"{where}: {type(value).__name__} is neither plain data nor a tensor")


def _store(tensor: Tensor, path: tuple[str, ...], tensors: dict[str, Tensor]) -> str:
    where = ".".join(path)
    if tensor.dtype not in NAMES or tensor.layout != torch.strided:
        raise TypeError(f"{where}: a {tensor.layout} tensor of {tensor.dtype} is not saved")
    if tensor.dim() > MAX_DIMENSIONS:
        raise TypeError(f"{where}: a tensor of {tensor.dim()} dimensions is not saved")
    name = ".".join(path[1:])
    while name in tensors or name in (METADATA, SEAL):
        name += "'"
    tensors[name] = tensor
    return name


def restore(text: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Undo `flatten`; each of `tensors` must be used once.

    Raises:
        FormatError: the text is not what `flatten` writes.
    """
    remaining = dict(tensors)
    try:
        state = _restore(parse_json(text), remaining, 0)
    except (TypeError, ValueError, struct.error):
        raise FormatError("its state is malformed") from None
    if not isinstance(state, dict):
        raise FormatError(f"it holds a {type(state).__name__}, not a state")
    if remaining:
        raise FormatError(f"nothing refers to the tensor {shown(next(iter(remaining)))}")
    return state


def _restore(value: Any, tensors: dict[str, Tensor], depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise FormatError(f"it is nested more than {MAX_DEPTH} deep")
    if isinstance(value, list):
        return [_restore(item, tensors, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    if not any(key.startswith("$") for key in value):
        return {key: _restore(item, tensors, depth + 1) for key, item in value.items()}
    ((kind, content),) = value.items()
    if kind == "$tensor" and isinstance(content, str):
        if content not in tensors:
            raise FormatError(f"the tensor {shown(content)} is missing, or in two places")
        return tensors.pop(content)
    if kind == "$float":
        return struct.unpack(">d", bytes.fromhex(content))[0]
    if kind == "$tuple" and isinstance(content, list):
        return tuple(_restore(item, tensors, depth + 1) for item in content)
    if kind == "$dict" and isinstance(content, list):
        restored = {key: _restore(item, tensors, depth + 1) for key, item in content}
        if len(restored) == len(content) and all(type(key) in (str, int) for key in restored):
            return restored
    raise ValueError(kind)
