"""Finds the first value or gradient of a step that is not finite."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any

from torch import Tensor

from mantrans.finite import all_finite
from mantrans.models.transformer import CustomTransformer
from mantrans.training.batches import MicroBatch

FINITE = "when the batch is run again, all values are finite"


def first_non_finite(model: CustomTransformer, batch: Iterable[MicroBatch]) -> str:
    """Run a batch through the model by micro-batches, as the step does, and describe the place.

    Checks the weights first, then what each layer keeps, in the order of the forward, then the
    gradients in the order of the backward. Names the first value that is not finite and the one
    before it: the cause is between them. Overwrites the model's gradients.
    """
    for name, weight in model.named_parameters():
        if not all_finite(weight):
            return f"the weights {name} are not finite"
    p = model.parameters
    broken_gradients: set[str] = set()

    def look(bucket: str) -> None:
        bad = (name for name, g in p.gradients_in(bucket) if not all_finite(g))
        broken_gradients.update(bad)

    for i, part in enumerate(batch):
        broken = first_value(model, part)
        if broken:
            return f"the first value that is not finite is {broken}"
        adds = i > 0 and p.divided != "gradients"  # else blocks write over other blocks'
        loss = model.forward_backward(*part, accumulate=adds, finished=look)
        if not all_finite(loss):
            return "all values up to the loss are finite, but the loss is not"
    for name in reversed(p.by_name):
        if name in broken_gradients:
            return f"the first gradient that is not finite is that of {name}"
    return FINITE


def first_value(model: CustomTransformer, part: MicroBatch) -> str | None:
    """The first value of the forward that is not finite and the one before it; None if all are.

    Values are named by the layer and the field of what it saves: "blocks.3.attention.qkv".
    """
    names, finite = ["the tokens"], [True]

    def look(name: str, value: Any) -> None:
        for path, tensor in tensors(name, value):
            names.append(path)
            finite.append(bool(all_finite(tensor)))

    number = count()
    y, final_norm, _ = model.network.forward(
        part.tokens, part.document_start, lambda saved: look(f"blocks.{next(number)}", saved)
    )
    look("final_norm", final_norm)
    look("the logits", model.output.forward(y))
    if all(finite):
        return None
    first = finite.index(False)
    return f"{names[first]}, right after {names[first - 1]}"


def tensors(name: str, saved: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested NamedTuples, with the path of field names that leads to each."""
    if isinstance(saved, Tensor):
        yield name, saved
    elif saved is not None:
        for field, value in saved._asdict().items():
            yield from tensors(f"{name}.{field}", value)
