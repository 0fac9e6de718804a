"""Finite differences: the slope of the loss, from the loss alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mantrans.kernels import reference
from mantrans.models.transformer import CustomTransformer
from mantrans.proof.exact import Exact

# Weights of (f(x + n h) - f(x - n h)) / h, n = 1, 2, ...: the difference from the slope is of the
# order of h^ORDER (Fornberg 1988, table 1).
STENCILS = {
    2: (1 / 2,),
    4: (2 / 3, -1 / 12),
    6: (3 / 4, -3 / 20, 1 / 60),
    8: (4 / 5, -1 / 5, 4 / 105, -1 / 280),
}
# Distances of points at which rounding and the error of the stencil are both small, for weights of
# 0.1 and more: the loss varies over about as much.
STEPS = {2: 1e-4, 4: 5e-4, 6: 1e-3, 8: 2e-3}
_ELEMENTS = 2**21  # that are computed with at once: 16 MiB, which a processor's cache can hold


class Slopes(NamedTuple):
    """values (n,): the slopes of the loss at n elements.

    uncertainty (n,): what a stencil of two points fewer gives is as far away, and rounding is
        added. NaN for a stencil of two points.
    above, below (n, order / 2): the losses with the element raised, lowered by 1, 2, ... steps.
    step: the distance of neighboring points.
    """

    values: Tensor
    uncertainty: Tensor
    above: Tensor
    below: Tensor
    step: float


def differences(
    model: CustomTransformer,
    tokens: Tensor,
    targets: Tensor,
    name: str,
    indices: Sequence[Sequence[int]],
    step: float | None = None,
    order: int = 8,
) -> Slopes:
    """d loss / d x of some elements of x, a weight or an intermediate result, from the loss near x.

    model: float64 on the CPU (`exact_copy`). tokens, targets (B, T) int64, as for `Exact.loss`.
    name: a parameter's, or a result's of `Exact.loss`. indices: n elements, each a tuple of ints.
    step: h, the distance of neighboring points; by default one that suits the order and the size
    of x. order: 2, 4, 6 or 8; the loss is computed at as many points an element, and the slope is
    wrong by something like h^order; rounding adds about 1e-16 loss / h.
    """
    exact = Exact(model, reference)
    named = exact.weights if name in exact.weights else exact.results(tokens, targets)
    start = named[name]
    step = suitable_step(start, order) if step is None else step

    def loss(x: Tensor) -> Tensor:
        def see(result: str, own: Tensor) -> Tensor:
            return x if result == name else own

        return exact.loss(tokens, targets, see, {name: x})

    distances = step * torch.arange(1, order // 2 + 1, dtype=start.dtype)
    shifts = torch.stack((distances, -distances), 1).flatten()
    elements = torch.tensor(indices).repeat_interleave(len(shifts), 0)
    each = start.numel() + tokens.numel() * (model.config.d_model + model.vocab_size)
    losses = []
    for part in torch.arange(len(elements)).split(max(1, _ELEMENTS // each)):
        points = start.expand(len(part), *start.shape).clone()
        moved = (torch.arange(len(part)), *elements[part].T)
        points[moved] += shifts[part % len(shifts)]
        losses.append(torch.vmap(loss)(points))
    above, below = torch.cat(losses).view(len(indices), -1, 2).unbind(-1)
    values = slopes(above - below, step, order)
    uncertainty = torch.full_like(values, torch.nan)
    if order > 2:
        uncertainty = (values - slopes(above - below, step, order - 2)).abs()
        uncertainty += torch.finfo(start.dtype).eps * above[:, 0].abs() / step
    return Slopes(values, uncertainty, above, below, step)


def suitable_step(x: Tensor, order: int) -> float:
    """Shorter where the elements of x are small, for a function of them varies over less."""
    size = x.square().mean().sqrt().item()
    return STEPS[order] * (min(1.0, 10 * size) if size else 1.0)


def slopes(rises: Tensor, step: float, order: int) -> Tensor:
    """f(x + n h) - f(x - n h), (elements, order / 2 or more) -> (elements,)."""
    weights = torch.tensor(STENCILS[order], dtype=rises.dtype)
    return rises[:, : len(weights)] @ weights / step
