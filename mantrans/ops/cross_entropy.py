"""Softmax cross-entropy of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from mantrans.kernels.reference import IGNORE_INDEX, sum_in_parts, wide_dtype
from mantrans.ops.registration import (
    backend_of,
    differentiate,
    expect,
    expect_floats,
    expect_inside,
    expect_integers,
    operation,
)

REDUCTIONS = ("mean", "sum", "none")


def cross_entropy(
    logits: Tensor, targets: Tensor, ignore_index: int = IGNORE_INDEX, reduction: str = "mean"
) -> Tensor:
    """log Σ_v exp(z_v) - z_target of each row, and their mean or sum.

    logits (..., V); targets (...), integers, not shifted; ignore_index counts for nothing. The mean
    of no target is NaN, as in PyTorch. On a GPU targets are not checked.
    Returns 0-d, or (...) for "none"; float32 (float64 for float64), whatever the logits are.
    """
    check_reduction(reduction)
    expect_floats("logits", logits)
    some = logits.dim() > 0 and logits.shape[-1] > 0
    expect("logits", some, "a last axis of at least 1", tuple(logits.shape))
    expect_integers("targets", targets, logits, logits.shape[:-1])
    rows, targets_1d = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1).long()
    loss, _ = _forward(rows, targets_1d, ignore_index, reduction != "none")
    if reduction == "none":
        return loss.view(targets.shape)
    return loss if reduction == "sum" else loss / (targets != ignore_index).sum()


def check_reduction(reduction: str) -> None:
    """ValueError for an unknown one."""
    expect("reduction", reduction in REDUCTIONS, ", ".join(REDUCTIONS), repr(reduction))


def forward(
    logits: Tensor, targets: Tensor, ignore_index: int, summed: bool
) -> tuple[Tensor, Tensor]:
    V = logits.shape[1]
    expect_inside(targets, V, ignore_index)
    losses, normalizer = backend_of(logits).cross_entropy_forward(
        logits.contiguous(), targets.contiguous(), V, ignore_index
    )
    return sum_in_parts(losses) if summed else losses, normalizer


def fake_forward(
    logits: Tensor, targets: Tensor, ignore_index: int, summed: bool
) -> tuple[Tensor, Tensor]:
    wide, N = wide_dtype(logits.dtype), logits.shape[0]
    loss = logits.new_empty(() if summed else (N,), dtype=wide)
    return loss, logits.new_empty(N, 2, dtype=wide)


def backward(
    dloss: Tensor, logits: Tensor, targets: Tensor, normalizer: Tensor, ignore_index: int
) -> Tensor:
    one = dloss.dim() == 0
    dtype = logits.dtype if one else normalizer.dtype  # is multiplied once more, and then rounded
    dlogits = logits.to(dtype, copy=True, memory_format=torch.contiguous_format)  # written over
    scale = dloss if one else dloss.new_ones(())
    backend_of(logits).cross_entropy_backward(
        dlogits, targets.contiguous(), normalizer, scale, logits.shape[1], ignore_index
    )
    if one:
        return dlogits
    of_rows = dloss.where(targets != ignore_index, 0)  # an ignored one may be infinite: 0 · inf
    return dlogits.mul_(of_rows[:, None]).to(logits.dtype)


def fake_backward(
    dloss: Tensor, logits: Tensor, targets: Tensor, normalizer: Tensor, ignore_index: int
) -> Tensor:
    return logits.new_empty(logits.shape)


_forward = operation("cross_entropy", forward, fake_forward)
_backward = operation("cross_entropy_backward", backward, fake_backward)
differentiate(
    _forward,
    _backward,
    keep=lambda logits, targets, ignore_index, summed, loss, normalizer: (
        logits, targets, normalizer, ignore_index,
    ),
    wiring=(0,),
)  # fmt: skip
