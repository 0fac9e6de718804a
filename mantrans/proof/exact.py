"""A network on the CPU whose weights and intermediate results have names, mostly in float64.

It is the model's own code over other operations: nothing of a layer is written twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from mantrans.kernels import reference
from mantrans.kernels.reference import IGNORE_INDEX
from mantrans.models import build
from mantrans.models.transformer import CustomTransformer
from mantrans.proof.plain import See
from mantrans.recording import named_layers

CPU = torch.device("cpu")
# The first result of each operation, as it is called in its layer. The others are statistics.
RESULT = {
    "embedding_forward": "x",
    "linear_forward": "y",
    "layer_norm_forward": "y",
    "rms_norm_forward": "y",
    "rotary_forward": "rotated",
    "norm_rotary_forward": "rotated",
    "attention_forward": "out",
    "bias_gelu_forward": "a",
    "swiglu_forward": "a",
}


def exact_copy(model: CustomTransformer) -> CustomTransformer:
    """The same function in float64, on the CPU and the reference: the weights that `model` computes
    with, without masters or optimizer."""
    config = model.config.model_copy(update={"dtype": "float64"})
    copy = CustomTransformer(config, reference, dtype=torch.float64, device=CPU)
    for name, value in model.named_parameters():
        copy.parameters.write(name, value)
    return copy


class Exact:
    """The loss of a network as a function of each weight and each intermediate result.

    model: a float64 model on the CPU (`exact_copy`). ops: the operations to compute with. dtype:
        what to compute in.
    weights: name -> tensor, as stored: those of `model`.
    """

    def __init__(
        self, model: CustomTransformer, ops: Any, dtype: torch.dtype = torch.float64
    ) -> None:
        self.ops, self.network = ops, build(model.config, ops)
        self.layers = dict(named_layers(self.network))
        del self.layers["output"]  # its result is the logits without padding
        if self.network.angles is not None:
            self.network.angles.allocate(reference.wide_dtype(dtype), CPU)
        p = model.parameters
        self.weights = {name: p.stored(p.weights, name).to(dtype) for name in p.by_name}

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        see: See = lambda name, x: x,
        weights: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> Tensor:
        """The mean loss, 0-d. tokens, targets (B, T) int64, targets shifted and -100 for none.

        weights: those that take the place of the model's own.
        see: called with every result of an operation, such as "blocks.0.mlp.a", "blocks.0.norm_2.x"
        (the residual) or "logits"; what it returns takes the result's place. With `plain` also with
        what is inside: "blocks.0.attention.scores".
        """
        for parameter in self.network.parameters():
            parameter.value = weights.get(parameter.name, self.weights[parameter.name])
        for name, layer in self.layers.items():
            layer.ops = Seen(self.ops, name, see)
        y, *_ = self.network.forward(tokens)
        logits = see("logits", self.network.output.forward(y)).flatten(0, 1)
        losses, _ = self.ops.cross_entropy_forward(logits, targets.flatten(), logits.shape[-1])
        return losses.sum() / (targets != IGNORE_INDEX).sum()

    def results(self, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The intermediate results by name, in the order of the forward."""
        found: dict[str, Tensor] = {}
        self.loss(tokens, targets, lambda name, x: found.setdefault(name, x))
        return found


class Seen:
    """The operations of one layer; `see` is called with what they return, and may replace it."""

    def __init__(self, ops: Any, layer: str, see: See) -> None:
        self.ops, self.layer, self.see = ops, layer, see

    def __getattr__(self, operation: str) -> Callable:
        if operation.startswith("add_"):
            return self._add_norm(operation.removeprefix("add_"))
        function, name = getattr(self.ops, operation), RESULT[operation]
        shown = {"see": self._see} if "see" in signature(function).parameters else {}

        def call(*args: Any) -> Any:
            results = function(*args, **shown)
            if isinstance(results, Tensor):
                return self._see(name, results)
            return self._see(name, results[0]), *results[1:]

        return call

    def _see(self, name: str, x: Tensor) -> Tensor:
        return self.see(f"{self.layer}.{name}", x)

    def _add_norm(self, norm: str) -> Callable:
        """The sum and its norm, one after the other: the sum is a result too, the residual."""

        def call(branch: Tensor, residual: Tensor, *args: Any) -> tuple:
            x = self._see("x", residual + branch)
            y, *statistics = getattr(self, norm)(x, *args)
            return y, x, *statistics

        return call
