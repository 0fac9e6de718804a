"""Cross-entropy of an output projection, whose logits are never there as a whole.

The forward makes a chunk of logits, the chunk's losses and their gradients, and keeps only those
gradients, dx (N, C) and dweight (V, C) in float32. The backward multiplies them by the gradient of
the loss, which mostly is 1. To form the logits twice would cost a fourth product.
"""

from __future__ import annotations

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
    expect_like,
    expect_targets,
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
    Returns 0-d, float32 (float64 for float64). Without gradients it costs the losses alone.
    """
    check_reduction(reduction)
    expect("reduction", reduction != "none", "mean or sum", repr(reduction))
    expect_floats("x", x)
    expect("x", x.dim() > 0, "at least one axis", tuple(x.shape))
    expect_floats("weight", weight)
    x, weight = autocast(x, weight)
    expect_like("weight", weight, x, (*weight.shape[:1], x.shape[-1]))
    expect_targets(targets, x, x.shape[:-1])
    counted = targets != ignore_index
    rows = x.reshape(-1, x.shape[-1]), weight
    targets_1d = targets.long().where(counted, IGNORE_INDEX).reshape(-1)
    scale = x.new_ones((), dtype=wide_dtype(x.dtype))
    if reduction == "mean":
        scale = scale / (counted.sum() if divisor is None else divisor)
    if not torch.is_grad_enabled():
        return _loss(*rows, targets_1d) * scale
    if x.dtype == torch.float16:  # in which gradients divided by many rows could vanish
        loss, _, _ = _forward(*rows, targets_1d, torch.ones_like(scale))
        return loss * scale
    loss, _, _ = _forward(*rows, targets_1d, scale)
    return loss


def forward(
    x: Tensor, weight: Tensor, targets: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    expect_inside(targets, len(weight), IGNORE_INDEX)
    dweight = x.new_empty(weight.shape, dtype=scale.dtype)
    dense = x.contiguous(), weight.contiguous(), targets.contiguous()
    loss, dx = backend_of(x).linear_cross_entropy_forward_backward(
        *dense, scale, dweight, len(weight), accumulate=False
    )
    return loss, dx, dweight


def fake_forward(
    x: Tensor, weight: Tensor, targets: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    loss = fake_loss(x, weight, targets)
    return loss, x.new_empty(x.shape), x.new_empty(weight.shape, dtype=loss.dtype)


def loss_alone(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    expect_inside(targets, len(weight), IGNORE_INDEX)
    dense = x.contiguous(), weight.contiguous(), targets.contiguous()
    return sum_in_parts(backend_of(x).linear_cross_entropy_forward(*dense, len(weight)))


def fake_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return x.new_empty((), dtype=wide_dtype(x.dtype))


def backward(dloss: Tensor, dx: Tensor, dweight: Tensor) -> tuple[Tensor, Tensor]:
    return (dx * dloss).to(dx.dtype), (dweight * dloss).to(dx.dtype)


def fake_backward(dloss: Tensor, dx: Tensor, dweight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dx), torch.empty_like(dweight, dtype=dx.dtype)


_loss = operation("linear_cross_entropy_loss", loss_alone, fake_loss)
_forward = operation("linear_cross_entropy", forward, fake_forward)
_backward = operation("linear_cross_entropy_backward", backward, fake_backward)
differentiate(
    _forward,
    _backward,
    keep=lambda x, weight, targets, scale, loss, dx, dweight: (dx, dweight),
    wiring=(0, 1),
)
