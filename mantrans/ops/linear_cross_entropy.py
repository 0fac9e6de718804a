"""Cross-entropy of an output projection, whose logits are never there as a whole.

The forward makes a chunk of logits, the chunk's losses and their gradients, and keeps only those
gradients, dx (N, C) and dweight (V, C) in float32. The backward multiplies them by the gradient of
the loss, which mostly is 1. To form the logits twice would cost a fourth product. Which gradients
are wanted the forward cannot know: that of a frozen table is made too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mantrans.kernels.reference import IGNORE_INDEX, sum_in_parts, wide_dtype
from mantrans.ops.cross_entropy import check_reduction
from mantrans.ops.registration import (
    autocast,
    backend_of,
    differentiate,
    expect,
    expect_floats,
    expect_inside,
    expect_integers,
    expect_like,
    expect_number,
    operation,
)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    divisor: Tensor | int | None = None,
) -> Tensor:
    """`cross_entropy` of logits = x Wᵀ, some rows of logits at a time.

    x (..., C); weight W (V, C); targets (...), integers, not shifted. reduction: "mean" or "sum".
    divisor: what the mean divides by, 0-d or a number; None: how many targets count.
    Under autocast x and W are cast to its dtype, as those of `F.linear` are.
    Returns 0-d, float32 (float64 for float64). Under torch.no_grad() it costs the losses alone.
    RuntimeError for a backward with create_graph=True.
    """
    check_reduction(reduction)
    expect("reduction", reduction != "none", "mean or sum", repr(reduction))
    expect_floats("x", x)
    some = x.dim() > 0 and x.shape[-1] > 0
    expect("x", some, "a last axis of at least 1", tuple(x.shape))
    expect_floats("weight", weight)
    expect("weight", weight.dim() == 2 and len(weight) > 0, "(V, C)", tuple(weight.shape))
    x, weight = autocast(x, weight)
    expect_like("weight", weight, x, (len(weight), x.shape[-1]))
    expect_integers("targets", targets, x, x.shape[:-1])
    rows = x.reshape(-1, x.shape[-1]), weight, targets.reshape(-1).long()
    scale = x.new_ones((), dtype=wide_dtype(x.dtype))
    if divisor is not None:
        expect("divisor", reduction == "mean", "None for a sum", divisor)
        expect_number("divisor", divisor)
        scale = scale / divisor
    elif reduction == "mean":
        scale = scale / (targets != ignore_index).sum()
    if not torch.is_grad_enabled():
        return _loss(*rows, ignore_index) * scale
    if x.dtype == torch.float16:  # in which gradients divided by many rows could vanish
        loss, _, _ = _forward(*rows, torch.ones_like(scale), ignore_index)
        return loss * scale
    loss, _, _ = _forward(*rows, scale, ignore_index)
    return loss


def checked(targets: Tensor, weight: Tensor, ignore_index: int) -> Tensor:
    """Targets with the index that the backends ignore; ValueError for one outside the table."""
    expect_inside(targets, len(weight), ignore_index)
    return targets.where(targets != ignore_index, IGNORE_INDEX)


def forward(
    x: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    dweight = x.new_empty(weight.shape, dtype=scale.dtype)
    dense = x.contiguous(), weight.contiguous(), checked(targets, weight, ignore_index)
    loss, dx = backend_of(x).linear_cross_entropy_forward_backward(
        *dense, scale, dweight, len(weight), accumulate=False
    )
    return loss, dx, dweight


def fake_forward(
    x: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    loss = fake_loss(x, weight, targets, ignore_index)
    return loss, x.new_empty(x.shape), x.new_empty(weight.shape, dtype=loss.dtype)


def loss_alone(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    dense = x.contiguous(), weight.contiguous(), checked(targets, weight, ignore_index)
    return sum_in_parts(backend_of(x).linear_cross_entropy_forward(*dense, len(weight)))


def fake_loss(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    return x.new_empty((), dtype=wide_dtype(x.dtype))


def backward(
    dloss: Tensor, dx: Tensor, dweight: Tensor, targets: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    # without a target gradients are 0, as PyTorch's: also those of a mean, whose dloss is infinite
    dloss = dloss.where((targets != ignore_index).any(), 0)
    return (dx * dloss).to(dx.dtype), (dweight * dloss).to(dx.dtype)


def fake_backward(
    dloss: Tensor, dx: Tensor, dweight: Tensor, targets: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dx), torch.empty_like(dweight, dtype=dx.dtype)


def once(dloss: Tensor, *kept: Any) -> tuple[Tensor, Tensor]:
    """`backward`, refused where PyTorch would differentiate it: it would take for constant what the
    forward has made."""
    if torch.is_grad_enabled():
        raise RuntimeError("linear_cross_entropy: expected create_graph=False, got True")
    return _backward(dloss, *kept)


_loss = operation("linear_cross_entropy_loss", loss_alone, fake_loss)
_forward = operation("linear_cross_entropy", forward, fake_forward)
_backward = operation("linear_cross_entropy_backward", backward, fake_backward)
differentiate(
    _forward,
    once,
    keep=lambda x, weight, targets, scale, ignore_index, loss, dx, dweight: (
        dx, dweight, targets, ignore_index,
    ),
    wiring=(0, 1),
)  # fmt: skip
