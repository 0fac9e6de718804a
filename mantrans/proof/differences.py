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
STEP = 2e-3
_ELEMENTS = 2**21  # that are computed with at once: 16 MiB, which a processor's cache can hold


class Slopes(NamedTuple):
    """values (n,); uncertainty (n,): what a stencil of two points fewer gives is as far away, and
    rounding is added. NaN for a stencil of two points."""

    values: Tensor
    uncertainty: Tensor


def differences(
    model: CustomTransformer,
    tokens: Tensor,
    targets: Tensor,
    name: str,
    indices: Sequence[Sequence[int]],
    step: float = STEP,
    order: int = 8,
) -> Slopes:
    """d loss / d x of some elements of x, a weight or an intermediate result, from the loss near x.

    model: float64 on the CPU (`exact_copy`). tokens, targets (B, T) int64, as for `Exact.loss`.
    name: a parameter's, or a result's of `Exact.loss`. indices: n elements, each a tuple of ints.
    step: h, the distance of neighboring points. order: 2, 4, 6 or 8; the loss is computed at as
    many points an element, and is wrong by h^order; rounding adds about 1e-16 loss / h.
    """
    exact = Exact(model, reference)
    named = exact.weights if name in exact.weights else exact.results(tokens, targets)
    start = named[name]

    def loss(x: Tensor) -> Tensor:
        see = lambda found, own: x if found == name else own  # noqa: E731
        return exact.loss(tokens, targets, see, {name: x})

    def rise(part: Tensor, distance: float) -> Tensor:
        """f(x + distance) - f(x - distance) for each element."""
        points = start.expand(2, len(part), *start.shape).clone()
        for sign, moved in zip((1, -1), points, strict=True):
            moved[(torch.arange(len(part)), *part.T)] += sign * distance
        above, below = (torch.vmap(loss)(moved) for moved in points)
        return above - below

    each = start.numel() + tokens.numel() * (model.config.d_model + model.vocab_size)
    parts = torch.tensor(indices).split(max(1, _ELEMENTS // each))
    numbers = range(1, order // 2 + 1)
    rises = torch.stack([torch.cat([rise(x, n * step) for x in parts]) for n in numbers])
    values = slopes(rises, step, order)
    if order == 2:
        return Slopes(values, torch.full_like(values, torch.nan))
    rounding = torch.finfo(start.dtype).eps * exact.loss(tokens, targets).abs() / step
    return Slopes(values, (values - slopes(rises, step, order - 2)).abs() + rounding)


def slopes(rises: Tensor, step: float, order: int) -> Tensor:
    """(order / 2 or more, n) -> (n,)"""
    weights = torch.tensor(STENCILS[order], dtype=rises.dtype)
    return weights @ rises[: len(weights)] / step
