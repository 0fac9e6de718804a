"""Finds the first value or gradient of a step that is not finite."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any

from torch import Tensor

from mantrans.models.transformer import CustomTransformer
from mantrans.training.step import MicroBatch


def first_non_finite(model: CustomTransformer, batch: Iterable[MicroBatch]) -> str:
    """Run a batch through the model by micro-batches, as the step does, and describe the place.

    Checks the weights first, then what each layer keeps, in the order of the forward, then the
    gradients in the order of the backward. Overwrites the model's gradients.
    """
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            return f"the weights {name} are not finite"
    for i, part in enumerate(batch):
        broken = first_value(model, part)
        if broken:
            return f"the first value that is not finite is {broken}"
        loss = model.forward_backward(*part, accumulate=i > 0)
        if not loss.isfinite():
            return "all values up to the loss are finite, but the loss is not"
    for name, gradient in reversed(list(model.named_gradients())):
        if not gradient.isfinite().all():
            return f"the first gradient that is not finite is that of {name}"
    return "when the batch is run again, all values are finite"


def first_value(model: CustomTransformer, part: MicroBatch) -> str | None:
    """The first value of the forward that is not finite, None if all are.

    Values are named by the layer and the field of what it saves: "blocks.3.attention.qkv".
    """
    broken: list[str] = []

    def look(name: str, saved: Any) -> None:
        broken.extend(n for n, value in tensors(name, saved) if not value.isfinite().all())

    number = count()
    y, final_norm = model.network.forward(
        part.tokens, part.document_start, lambda saved: look(f"blocks.{next(number)}", saved)
    )
    look("final_norm", final_norm)
    if not model.output.forward(y).isfinite().all():
        broken.append("the logits")
    return broken[0] if broken else None


def tensors(name: str, saved: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested NamedTuples, with the path of field names that leads to each."""
    for field, value in saved._asdict().items():
        if isinstance(value, Tensor):
            yield f"{name}.{field}", value
        elif value is not None:
            yield from tensors(f"{name}.{field}", value)
