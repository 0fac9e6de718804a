"""Tensors of the right shape whose memory is never touched, so that their size costs nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

META = torch.device("meta")
FEW = 2**16
OF_FEW_NUMBERS = (  # not worth a rule where they are
    torch.ops.aten.all.default,
    torch.ops.aten.arange.default,
    torch.ops.aten.arange.start_step,
    torch.ops.aten.linalg_vector_norm.default,
    torch.ops.aten.stack.default,
)


class ShapesOnly(TorchDispatchMode):
    """Inside, PyTorch's operations compute nothing.

    Views are made as always, with their strides and addresses. An operation that writes to an
    argument returns it unchanged. Any other returns new memory, unwritten, of the shape, strides
    and dtype that it would have. What an operation writes must not decide what is launched: a
    number that the host reads, which would wait for a GPU, is a RuntimeError.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # PyTorch would import it to skip it

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        options = options or {}
        schema = operation._schema
        if any(written(a) for a in schema.arguments):
            return outputs_of(schema, arguments, options)
        if any(returned.alias_info is not None for returned in schema.returns):
            return operation(*arguments, **options)  # a view
        if (known := without_meta(operation, arguments, options)) is not None:
            return known
        if any(a.name == "device" for a in schema.arguments):
            options = {"device": META} | options
        arguments, options = tree_map(on_meta, (arguments, options))
        return tree_map(like_meta, operation(*arguments, **options))


def written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def outputs_of(schema: Any, arguments: Any, options: Any) -> Any:
    """What an operation that writes to its arguments returns: those arguments."""
    names = {a.name: value for a, value in zip(schema.arguments, arguments, strict=False)} | options
    outputs = [names[a.name] for a in schema.arguments if written(a)]
    if len(schema.returns) == 1:
        return outputs[0]
    return tuple(outputs) if schema.returns else None


def without_meta(operation: Any, arguments: Any, options: Any) -> Any:
    """The result of the operations for whose shapes PyTorch imports its compiler, which takes a
    second and a half; None for others."""
    aten = torch.ops.aten
    tensors = [x for x in tree_leaves((arguments, options)) if isinstance(x, Tensor)]
    if operation in OF_FEW_NUMBERS and sum(x.numel() for x in tensors) <= FEW:
        return operation(*arguments, **options)
    if operation is aten.randn.generator:
        return torch.empty(arguments[0], dtype=options.get("dtype"))
    if operation is aten.addmm.default:
        return arguments[1].new_empty(arguments[1].shape[0], arguments[2].shape[1])
    in_order = all(list(x.stride()) == sorted(x.stride(), reverse=True) for x in tensors)
    if torch.Tag.pointwise not in operation.tags or not in_order:
        return None  # the result of transposed tensors is transposed
    of_one = operation(*tree_map(one_element, arguments), **tree_map(one_element, options))
    shape = torch.broadcast_shapes(*(x.shape for x in tensors))
    return tree_map(lambda x: torch.empty(shape, dtype=x.dtype), of_one)


def one_element(value: Any) -> Any:
    """A tensor of as many axes, which decide about dtypes, with one element."""
    return value.new_ones((1,) * value.dim()) if isinstance(value, Tensor) else value


def on_meta(value: Any) -> Any:
    """A tensor or device on PyTorch's device without memory; nothing is drawn at random there."""
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=META)
    if isinstance(value, torch.Generator):
        return None
    return META if isinstance(value, torch.device) else value


def like_meta(value: Any) -> Any:
    """New memory on the CPU for a tensor that has none."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")
