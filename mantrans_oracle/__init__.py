"""Gradients by PyTorch's autograd, which judge those of mantrans.

A package of its own, so that nothing in `mantrans` or `kernels` lets PyTorch differentiate. Only
`mantrans.proof` and `mantrans.explain` call it, and nothing that trains.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mantrans.models.transformer import CustomTransformer
from mantrans.proof import plain
from mantrans.proof.exact import Exact


class Gradients(NamedTuple):
    """What autograd makes of one batch.

    weights: parameter -> its gradient, in its public shape.
    values, results: name of an intermediate result (`Exact.loss`) -> itself, and its gradient.
    """

    loss: Tensor
    weights: dict[str, Tensor]
    values: dict[str, Tensor]
    results: dict[str, Tensor]


def differentiate(
    model: CustomTransformer,
    tokens: Tensor,
    targets: Tensor,
    dtype: torch.dtype = torch.float64,
) -> Gradients:
    """The gradients of the mean loss, of a float64 model on the CPU (`exact_copy`).

    tokens, targets (B, T) int64, targets shifted and -100 where there is none. dtype: what to
    compute in. The forward is made of PyTorch's own functions, so that no operation is judged by
    itself.
    """
    exact = Exact(model, plain, dtype)
    leaves = {name: w.clone().requires_grad_() for name, w in exact.weights.items()}
    values: dict[str, Tensor] = {}
    with torch.enable_grad():
        loss = exact.loss(tokens, targets, lambda name, x: values.setdefault(name, x), leaves)
        inputs = {**leaves, **values}
        found = torch.autograd.grad(loss, list(inputs.values()), materialize_grads=True)
    gradients = dict(zip(inputs, found, strict=True))
    shapes = {name: len(w) for name, w in model.named_parameters()}
    return Gradients(
        loss.detach(),
        {name: gradients[name][:rows] for name, rows in shapes.items()},
        {name: x.detach() for name, x in values.items()},
        {name: gradients[name] for name in values},
    )
