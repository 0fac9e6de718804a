"""Finds where numbers break: the first value or gradient of a step that is not finite."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from mantrans.models.transformer import CustomTransformer
from mantrans.training.step import MicroBatch


def first_non_finite(model: CustomTransformer, batch: Iterable[MicroBatch]) -> str:
    """Runs a batch through the model as the step does, by micro-batches, and says what broke.

    Weights are looked at first, then what each layer keeps, in the order of the forward, then
    gradients in the order of the backward. What broke lies between the value that is named and the
    one before it, which is named too. The model's gradients are overwritten.
    """
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            return f"the weights {name} are not finite"
    for i, part in enumerate(batch):
        before = "the tokens"
        for name, value in activations(model, part.tokens, part.document_start):
            if not value.isfinite().all():
                return f"the first value that is not finite is {name}, right after {before}"
            before = name
        loss = model.forward_backward(*part, accumulate=i > 0)
        if not loss.isfinite():
            return "all values up to the loss are finite, but the loss is not"
    for name, gradient in reversed(list(model.named_gradients())):
        if not gradient.isfinite().all():
            return f"the first gradient that is not finite is that of {name}"
    return "run alone, the batch is finite from end to end"


def activations(
    model: CustomTransformer, tokens: Tensor, document_start: Tensor | None
) -> Iterator[tuple[str, Tensor]]:
    """(name, value) of what every layer keeps, in the order of the forward.

    Names are the layer's, and the field's of what it saves: "blocks.3.attention.qkv".
    """
    x, branch = model.embedding.forward(tokens), None
    yield "the embedding's output", x
    for i, block in enumerate(model.blocks):
        x, branch, saved = block.forward(x, branch, document_start)
        yield from tensors(f"blocks.{i}", saved)
        yield f"blocks.{i}'s output", branch
    y, saved_norm = model.final_norm.forward(x, branch)
    yield from tensors("final_norm", saved_norm)
    yield "the logits", model.output.forward(y)


def tensors(name: str, saved: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested NamedTuples, with the path of field names that leads to each."""
    for field, value in saved._asdict().items():
        if isinstance(value, Tensor):
            yield f"{name}.{field}", value
        elif value is not None:
            yield from tensors(f"{name}.{field}", value)
