"""Reads the pickle inside a checkpoint as data: nothing in it can name, call or import anything.

A pickle is a program for a small stack machine. `pickle.Unpickler` runs all of it; the machine here
knows only the two dozen instructions that build dictionaries, lists, tuples, numbers, text and
tensors, and three names that stand for "a tensor" and "a storage of this type". Everything else,
`GLOBAL os system` for one, is refused before anything happens. Memory is bounded by the length of
the pickle: what has been built cannot be fetched again and multiplied.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

MAX_DEPTH = 32
MAX_DIMENSIONS = 8

_TENSOR = "torch._utils _rebuild_tensor_v2"
_HOOKS = "collections OrderedDict"
STORAGE_TYPES = {
    "torch BoolStorage": torch.bool,
    "torch ByteStorage": torch.uint8,
    "torch CharStorage": torch.int8,
    "torch ShortStorage": torch.int16,
    "torch IntStorage": torch.int32,
    "torch LongStorage": torch.int64,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch FloatStorage": torch.float32,
    "torch DoubleStorage": torch.float64,
}
_LITERALS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_VALUES = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE")
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class RefusedError(Exception):
    """The pickle is not plain data; the text says what it asks for."""


class Name(NamedTuple):
    """A global the pickle mentions, as text; never looked up."""

    text: str


class Storage(NamedTuple):
    """The claim that record `key` holds `n_elements` of `dtype`."""

    key: str
    dtype: torch.dtype
    n_elements: int


class TensorClaim(NamedTuple):
    """The claim that a tensor of `shape` begins at element `offset` of `storage`, row-major."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]


def read(pickled: bytes, tensor: Callable[[TensorClaim], torch.Tensor]) -> Any:
    """Return the value that `pickled` describes; `tensor` makes each tensor, its shape checked.

    Raises:
        RefusedError: the pickle is malformed or asks for more than plain data.
    """
    try:
        value = _Machine(tensor).run(pickled)
    except (ValueError, LookupError, OverflowError, TypeError) as error:
        raise RefusedError(f"it is malformed ({type(error).__name__})") from None
    _require_plain(value)
    return value


class _Machine:
    """The stack machine: `stack` is the level being built, `outer` those a MARK set aside."""

    def __init__(self, tensor: Callable[[TensorClaim], torch.Tensor]) -> None:
        self.tensor = tensor
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, pickled: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(pickled):
            if opcode.name == "STOP":
                break
            self.step(opcode.name, argument)
        (value,) = self.stack
        return value

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _LITERALS:
            stack.append(_LITERALS[name])
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name == "MARK":
            self.outer.append(stack)
            self.stack = []
        elif name == "TUPLE" or name in _TUPLES:
            members = self.above_mark() if name == "TUPLE" else self.pop(_TUPLES[name])
            self.stack.append(tuple(members))
        elif name in ("SETITEM", "SETITEMS"):
            self.set_items(self.pop(2) if name == "SETITEM" else self.above_mark())
        elif name in ("APPEND", "APPENDS"):
            items = self.pop(1) if name == "APPEND" else self.above_mark()
            _expect(self.stack[-1], list).extend(items)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.recall(argument))
        elif name == "GLOBAL":
            stack.append(_known(argument))
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif name == "REDUCE":
            function, arguments = self.pop(2)
            stack.append(self.reduce(function, _expect(arguments, tuple)))
        elif name != "PROTO":
            raise RefusedError(f"it uses the instruction {name}, which plain data has no need of")

    def above_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.outer.pop()
        return items

    def pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise ValueError("stack is empty")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def set_items(self, items: list[Any]) -> None:
        target = _expect(self.stack[-1], dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int):
                raise RefusedError("a dictionary has a key that is neither text nor integer")
            target[key] = value

    def recall(self, index: int) -> Any:
        value = self.memo[index]
        if not isinstance(value, str | Name):
            raise RefusedError("it uses one value in several places")
        return value

    def reduce(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        if function == Name(_HOOKS) and not arguments:
            return Name("no hooks")
        if function != Name(_TENSOR) or len(arguments) != 6:
            raise RefusedError("it calls a function that plain data has no need of")
        storage, offset, shape, strides, tracked, hooks = arguments
        if tracked is not False or hooks != Name("no hooks"):
            raise RefusedError("a tensor comes with more than its values")
        return self.tensor(_tensor_claim(_expect(storage, Storage), offset, shape, strides))


def _known(name: str) -> Name:
    if name not in STORAGE_TYPES and name not in (_TENSOR, _HOOKS):
        shown = ascii(name[:80])
        raise RefusedError(f"it names {shown}, which a checkpoint of plain data never does")
    return Name(name)


def _expect(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError
    return value


def _storage(claim: Any) -> Storage:
    mark, kind, key, _location, n_elements = _expect(claim, tuple)
    if mark != "storage" or type(kind) is not Name or kind.text not in STORAGE_TYPES:
        raise RefusedError("it refers to something that is not a tensor's storage")
    if type(n_elements) is not int or n_elements < 0:
        raise RefusedError("a storage claims a length that is not a number")
    return Storage(_expect(key, str), STORAGE_TYPES[kind.text], n_elements)


def _tensor_claim(storage: Storage, offset: Any, shape: Any, strides: Any) -> TensorClaim:
    """Return the claim if the tensor lies row-major inside its storage."""
    numbers = (offset, *_expect(shape, tuple), *_expect(strides, tuple))
    if any(type(n) is not int or n < 0 or n > 2**62 for n in numbers):
        raise RefusedError("a tensor's shape is not made of whole numbers")
    if len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
        raise RefusedError(f"a tensor has {len(shape)} dimensions")
    count = 1
    expected = []
    for length in reversed(shape):
        expected.append(count)
        count *= length
    if offset + count > storage.n_elements or max((*shape, 0)) > max(storage.n_elements, 2**40):
        raise RefusedError(f"a tensor claims {count} elements of {storage.n_elements}")
    rows = zip(shape, strides, reversed(expected), strict=True)
    if count and any(stride != wanted for length, stride, wanted in rows if length > 1):
        raise RefusedError("a tensor is not stored row by row")
    return TensorClaim(storage, offset, shape)


def _require_plain(root: Any) -> None:
    """Refuse a value in which a storage or a name was left, or that is nested too deep."""
    remaining = [(root, 0)]
    while remaining:
        value, depth = remaining.pop()
        if depth > MAX_DEPTH:
            raise RefusedError(f"it is nested more than {MAX_DEPTH} deep")
        if type(value) is dict:
            remaining.extend((item, depth + 1) for item in value.values())
        elif type(value) in (list, tuple):
            remaining.extend((item, depth + 1) for item in value)
        elif value is not None and type(value) not in (bool, int, float, str, torch.Tensor):
            raise RefusedError("it holds something that is neither plain data nor a tensor")
