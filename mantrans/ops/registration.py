"""What every operation here shares: its backend, how PyTorch learns of it, how inputs are refused.

PyTorch differentiates an operation of ours by calling another one, our own backward. Both are
opaque to it: `torch.compile` sees the shapes that a fake implementation gives, and calls them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef, custom_op

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
BACKENDS = {"cpu": "native", "cuda": "triton"}  # for all but float64, which is native


def backend_of(x: Tensor) -> ModuleType:
    """The backend that serves x's device and dtype."""
    served = x.dtype != torch.float64 and x.device.type in BACKENDS
    return import_module(f"mantrans.kernels.{BACKENDS[x.device.type] if served else 'native'}")


def operation(name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> CustomOpDef:
    """torch.ops.mantrans.NAME. Its results share no memory with its inputs.

    function: its annotations are the schema; under autocast it computes as it does without. fake:
    the same with empty results.
    """

    @functools.wraps(function)
    def as_written(*args: Any) -> Any:
        device = next(x.device.type for x in args if isinstance(x, Tensor))
        if not torch.is_autocast_enabled(device):
            return _no_views(function(*args))
        with torch.autocast(device, enabled=False):
            return _no_views(function(*args))

    registered = custom_op(f"mantrans::{name}", as_written, mutates_args=())
    registered.register_fake(fake)
    return registered


def _no_views(found: Any) -> Any:
    """The same results, in tensors of their own: PyTorch lets nobody change a view in place that
    was made inside an operation."""
    if isinstance(found, tuple):
        return tuple(map(_no_views, found))
    return found.new_empty(0).set_(found) if found._is_view() else found


def differentiate(
    forward: CustomOpDef,
    backward: Callable[..., Any],
    keep: Callable[..., Sequence[Any]],
    wiring: Sequence[int],
    upstream: int = 1,
) -> None:
    """Let autograd call `backward` for `forward`.

    keep(*inputs, *outputs): what is kept, the arguments of `backward` after the upstream gradients.
    wiring: for each of the first inputs, which result of `backward` is its gradient.
    upstream: how many of the first outputs have a gradient; it is None where nobody used one.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        kept = keep(*inputs, *outputs)
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in kept))
        ctx.numbers = [None if isinstance(x, Tensor) else x for x in kept]
        ctx.given = [x is not None for x in inputs]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*outputs[upstream:])

    def gradients(ctx: Any, *of_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(x is None for x in of_outputs[:upstream]):
            return (None,) * len(ctx.given)
        pairs = zip(ctx.saved_tensors, ctx.numbers, strict=True)
        kept = [number if tensor is None else tensor for tensor, number in pairs]
        found = backward(*of_outputs[:upstream], *kept)
        results = found if isinstance(found, tuple) else (found,)
        wired = [results[i] for i in wiring] + [None] * (len(ctx.given) - len(wiring))
        return tuple(x if given else None for x, given in zip(wired, ctx.given, strict=True))

    forward.register_autograd(gradients, setup_context=setup_context)


def autocast(*tensors: Any) -> list[Any]:
    """Tensors in the dtype of autocast where it is on; of float64, and what is none, as it is."""
    first = tensors[0]
    if first.is_meta or first.dtype == torch.float64:
        return list(tensors)
    if not torch.is_autocast_enabled(first.device.type):
        return list(tensors)
    dtype = torch.get_autocast_dtype(first.device.type)
    return [x.to(dtype) if isinstance(x, Tensor) else x for x in tensors]


# --------------------------------------------------------------------------------------- inputs


def expect(name: str, holds: bool, expected: object, got: object) -> None:
    """ValueError "NAME: expected X, got Y" unless it holds."""
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {got}")


def expect_floats(name: str, x: Any) -> None:
    """ValueError unless x is a tensor of one of FLOATS, without a derivative in forward mode: that
    of a result would be taken for 0."""
    _expect_tensor(name, x)
    names = ", ".join(_name(dtype) for dtype in FLOATS)
    expect(name, x.dtype in FLOATS, f"one of {names}", _name(x.dtype))
    if not torch.compiler.is_compiling():
        example = x
        while torch._C._functorch.is_batchedtensor(example):
            example = torch._C._functorch.get_unwrapped(example)
        _, tangent = torch._VF._unpack_dual(example, level=0)  # type: ignore[attr-defined]
        expect(name, tangent is None, "no derivative in forward mode", "one")


def expect_like(name: str, x: Any, like: Tensor, shape: Sequence[int]) -> None:
    """ValueError unless x has this shape, and the dtype and the device of `like`."""
    expect_floats(name, x)
    expect(name, x.dtype == like.dtype, _name(like.dtype), _name(x.dtype))
    _expect_place(name, x, like, shape)


def expect_vector(name: str, x: Any, like: Tensor, length: int) -> None:
    """ValueError unless x is (length,), of any of FLOATS, on the device of `like`."""
    expect_floats(name, x)
    _expect_place(name, x, like, (length,))


def expect_integers(name: str, x: Any, like: Tensor, shape: Sequence[int] | None = None) -> None:
    """ValueError unless x is int64 or int32, of this shape (None: of one axis), on the device of
    `like`."""
    _expect_tensor(name, x)
    expect(name, x.dtype in (torch.int64, torch.int32), "int64 or int32", _name(x.dtype))
    expect(name, shape is not None or x.dim() == 1, "one axis", tuple(x.shape))
    _expect_place(name, x, like, x.shape if shape is None else shape)


def expect_number(name: str, x: Any) -> None:
    """ValueError unless x is a Python number or a 0-d tensor."""
    number = x.dim() == 0 if isinstance(x, Tensor) else isinstance(x, int | float)
    expect(name, number, "a number or a 0-d tensor", shape_of(x))


def shape_of(x: Any) -> object:
    """How an error names what should be a tensor of another shape."""
    return tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__


def expect_inside(targets: Tensor, n: int, ignore_index: int) -> None:
    """ValueError unless each target is below n, or ignored. Not asked on a GPU: that would wait."""
    if targets.device.type == "cpu" and targets.numel():
        outside = ((targets < 0) | (targets >= n)) & (targets != ignore_index)
        if outside.any():
            expected = f"0 to {n - 1}, or {ignore_index}"
            raise ValueError(f"targets: expected {expected}, got {int(targets[outside][0])}")


def _expect_tensor(name: str, x: Any) -> None:
    expect(name, isinstance(x, Tensor), "a torch.Tensor", type(x).__name__)


def _expect_place(name: str, x: Tensor, like: Tensor, shape: Sequence[int]) -> None:
    expect(name, x.device == like.device, f"device {like.device}", x.device)
    expect(name, tuple(x.shape) == tuple(shape), f"shape {tuple(shape)}", tuple(x.shape))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
