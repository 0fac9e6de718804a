"""Every operation of a step, recorded with all its tensors, under the names of the source.

The layers compute with `ops`, a module of operations. While a wrapper is recorded, a `Recorder`
stands in its place in every layer: it calls the same function and keeps what went in, what came out
and the function's local variables, such as p, dp and ds of `attention_backward`. So nothing of the
mathematics is written twice, and no layer knows that it is recorded.

    with recording(wrapper) as calls:
        wrapper.model.forward(tokens)
    calls[0].layer, calls[0].operation, calls[0].values
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor

from mantrans.layers import Linear, Rotary
from mantrans.models.network import Network
from mantrans.wrapper import CustomTransformerWrapper


@dataclass(frozen=True)
class Call:
    """One operation that a layer has called.

    layer: "embedding", "blocks.0.attention.qkv", ..., "final_norm", "output"; "loss", "update".
    function: the operation, such as `mantrans.kernels.reference.linear_backward`.
    caller: file and line of the layer's call.
    inputs: arguments by name; without the weights' and the gradients' views.
    values: local variables at the end, inputs included. Memory that a function writes over, as
        `cross_entropy_backward` does with the logits, has its last values.
    results: what it returned.
    parameters, gradients: argument -> name of the parameter that it is, or whose gradient.
    """

    layer: str
    function: Callable
    caller: tuple[str, int]
    inputs: dict[str, Tensor]
    values: dict[str, Tensor]
    results: tuple[Tensor, ...]
    parameters: dict[str, str]
    gradients: dict[str, str]

    @property
    def operation(self) -> str:
        return self.function.__name__


class Recorder:
    """The operations of `ops`, whose calls are appended to `calls`.

    views: address in memory -> name, of every parameter and of every gradient.
    """

    def __init__(
        self,
        ops: ModuleType,
        layer: str,
        calls: list[Call],
        views: tuple[dict[int, str], dict[int, str]],
    ) -> None:
        self._ops, self._layer, self._calls, self._views = ops, layer, calls, views

    def __getattr__(self, operation: str) -> Callable:
        function = getattr(self._ops, operation)

        def record(*arguments: Any, **named: Any) -> Any:
            frame = sys._getframe(1)
            results, values = with_locals(function, *arguments, **named)
            bound = inspect.signature(function).bind(*arguments, **named).arguments
            tensors = {name: x for name, x in bound.items() if isinstance(x, Tensor)}
            parameters, gradients = (
                {n: view[x.data_ptr()] for n, x in tensors.items() if x.data_ptr() in view}
                for view in self._views
            )
            own = parameters | gradients
            self._calls.append(
                Call(
                    self._layer,
                    function,
                    (frame.f_code.co_filename, frame.f_lineno),
                    {n: x for n, x in tensors.items() if n not in own},
                    {n: x for n, x in values.items() if isinstance(x, Tensor) and n not in own},
                    results if isinstance(results, tuple) else (results,),
                    parameters,
                    gradients,
                )
            )
            return results

        return record


def with_locals(function: Callable, *arguments: Any, **named: Any) -> tuple[Any, dict[str, Any]]:
    """What `function`, written in Python, returns, and its local variables when it did."""
    kept: dict[str, Any] = {}

    def see(frame: Any, event: str, _: Any) -> None:
        if event == "return" and frame.f_code is function.__code__:
            kept.update(frame.f_locals)

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        return function(*arguments, **named), kept
    finally:
        sys.setprofile(before)


def named_layers(network: Network) -> Iterator[tuple[str, Any]]:
    """(name, layer) of all that call operations, in the order of the model's code."""
    yield "embedding", network.embedding
    for i, block in enumerate(network.blocks):
        for name, part in vars(block).items():
            yield f"blocks.{i}.{name}", part
            for own, inner in vars(part).items():
                if isinstance(inner, Linear):
                    yield inner.weight.name.removesuffix(".weight"), inner
                elif isinstance(inner, Rotary):
                    yield f"blocks.{i}.{name}.{own}", inner
    yield "final_norm", network.final_norm
    yield "output", network.output


@contextmanager
def recording(wrapper: CustomTransformerWrapper) -> Iterator[list[Call]]:
    """The calls of all layers until the end of the `with`, in their order.

    Those of `wrapper.model.ops` itself are of the layer "loss", those of its optimizer "update".
    """
    p = wrapper.model.parameters
    kinds = ("value", "gradient") if p.training else ("value",)
    views = [{getattr(x, kind).data_ptr(): n for n, x in p.by_name.items()} for kind in kinds]
    layers = [*named_layers(wrapper.model.network), ("loss", wrapper.model)]
    if wrapper.optimizer is not None:
        layers.append(("update", wrapper.optimizer))
    calls: list[Call] = []
    ops = wrapper.model.ops
    for name, layer in layers:
        layer.ops = Recorder(ops, name, calls, (views[0], views[-1] if p.training else {}))
    try:
        yield calls
    finally:
        for _, layer in layers:
            layer.ops = ops
