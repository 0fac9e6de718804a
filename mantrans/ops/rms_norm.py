"""RMS norm, with a residual that is added first if there is one."""

from __future__ import annotations

import torch
from torch import Tensor

from mantrans.kernels.reference import wide_dtype
from mantrans.ops.layer_norm import check_norm, empty_rows, readable
from mantrans.ops.registration import backend_of, differentiate, operation


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """y = γ x / √(mean(x²) + ε) over the last axis (Zhang & Sennrich 2019).

    x (..., C); weight γ (C,). Returns y (..., C) in x's dtype.
    residual (..., C), of x's dtype: x + residual is normalized; returns y and that sum.
    """
    check_norm(x, weight, eps, residual)
    if residual is None:
        y, _ = _forward(x, weight, eps)
        return y
    y, total, _ = _add_forward(x, residual, weight, eps)
    return y, total


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return backend_of(x).rms_norm_forward(x.contiguous(), readable(x, weight), eps)


def fake_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), empty_rows(x, wide_dtype(x.dtype))


def add_forward(
    branch: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    summands = branch.contiguous(), residual.contiguous()
    return backend_of(branch).add_rms_norm_forward(*summands, readable(branch, weight), eps)


def fake_add_forward(
    branch: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, rstd = fake_forward(branch, weight, eps)
    return y, torch.empty_like(y), rstd


def backward(
    dy: Tensor | None, dresidual: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    dy = torch.zeros_like(x) if dy is None else dy
    dweight = torch.zeros_like(weight, dtype=rstd.dtype)
    around = None if dresidual is None else dresidual.contiguous()
    dx = backend_of(x).rms_norm_backward(
        dy.contiguous(), x.contiguous(), readable(x, weight), rstd, dweight, around
    )
    return dx, dweight.to(weight.dtype)


def fake_backward(
    dy: Tensor | None, dresidual: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


_forward = operation("rms_norm", forward, fake_forward)
_add_forward = operation("add_rms_norm", add_forward, fake_add_forward)
_backward = operation("rms_norm_backward", backward, fake_backward)
differentiate(
    _forward,
    lambda dy, *kept: _backward(dy, None, *kept),
    keep=lambda x, weight, eps, y, rstd: (x, weight, rstd),
    wiring=(0, 1),
)
differentiate(
    _add_forward,
    _backward,
    keep=lambda branch, residual, weight, eps, y, x, rstd: (x, weight, rstd),
    wiring=(0, 0, 1),
    upstream=2,
)
