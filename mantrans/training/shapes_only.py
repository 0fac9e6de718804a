"""Tensors of the right shape whose memory is never touched, so that their size costs nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

META = torch.device("meta")


class ShapesOnly(TorchDispatchMode):
    """Inside, PyTorch's operations compute nothing.

    Views are made as always, with their strides and addresses. An operation that writes to an
    argument returns it unchanged. Any other returns new memory, unwritten, of the shape, strides
    and dtype that it would have. What an operation writes must not decide what is launched: a
    number that the host reads, which would wait for a GPU, is a RuntimeError.
    """

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        options = options or {}
        schema = operation._schema
        if any(written(a) for a in schema.arguments):
            return outputs_of(schema, arguments, options)
        if any(returned.alias_info is not None for returned in schema.returns):
            return operation(*arguments, **options)  # a view
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
