"""Layer norm, with a residual that is added first if there is one."""

from __future__ import annotations

import torch
from torch import Tensor

from mantrans.kernels.reference import wide_dtype
from mantrans.ops.registration import (
    backend_of,
    differentiate,
    expect,
    expect_floats,
    expect_like,
    expect_vector,
    operation,
)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = γ x̂ + β with x̂ = (x - μ) / √(σ² + ε) over the last axis (Ba, Kiros & Hinton 2016).

    x (..., C); weight γ, bias β (C,) of one dtype. Returns y (..., C) in x's dtype.
    residual (..., C), of x's dtype: x + residual is normalized; returns y and that sum.
    """
    check_norm(x, weight, eps, residual)
    if bias is not None:
        expect_like("bias", bias, weight, weight.shape)
    if residual is None:
        y, _, _ = _forward(x, weight, bias, eps)
        return y
    y, total, _, _ = _add_forward(x, residual, weight, bias, eps)
    return y, total


def check_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> None:
    """ValueError unless they fit together."""
    expect_floats("x", x)
    expect("x", x.dim() > 0 and x.shape[-1] > 0, "a last axis of at least 1", tuple(x.shape))
    expect_vector("weight", weight, x, x.shape[-1])
    expect("eps", isinstance(eps, int | float) and eps >= 0, "a number of at least 0", eps)
    if residual is not None:
        expect_like("residual", residual, x, x.shape)


def readable(x: Tensor, vector: Tensor | None) -> Tensor | None:
    """A gain or bias in a dtype in which every backend reads it beside x, without gaps."""
    if vector is None or vector.dtype == x.dtype:
        return None if vector is None else vector.contiguous()
    return vector.to(wide_dtype(x.dtype)).contiguous()


def empty_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A number for each row of x (..., C)."""
    return x.new_empty(x.shape[:-1].numel(), dtype=dtype)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    vectors = readable(x, weight), readable(x, bias)
    y, mean, rstd = backend_of(x).layer_norm_forward(x.contiguous(), *vectors, eps)
    return y, mean.double(), rstd


def fake_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    statistics = empty_rows(x, torch.float64), empty_rows(x, wide_dtype(x.dtype))
    return x.new_empty(x.shape), *statistics


def add_forward(
    branch: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    summands = branch.contiguous(), residual.contiguous()
    vectors = readable(branch, weight), readable(branch, bias)
    y, x, mean, rstd = backend_of(branch).add_layer_norm_forward(*summands, *vectors, eps)
    return y, x, mean.double(), rstd


def fake_add_forward(
    branch: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, mean, rstd = fake_forward(branch, weight, bias, eps)
    return y, torch.empty_like(y), mean, rstd


def backward(
    dy: Tensor | None,
    dresidual: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dy = torch.zeros_like(x) if dy is None else dy
    dweight = torch.zeros_like(weight, dtype=rstd.dtype)
    dbias = torch.zeros_like(dweight) if has_bias else None
    around = None if dresidual is None else dresidual.contiguous()
    dx = backend_of(x).layer_norm_backward(
        dy.contiguous(), x.contiguous(), readable(x, weight), mean, rstd, dweight, dbias, around
    )
    dbias = dweight.new_empty(0) if dbias is None else dbias
    return dx, dweight.to(weight.dtype), dbias.to(weight.dtype)


def fake_backward(
    dy: Tensor | None,
    dresidual: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dbias = weight.new_empty(weight.shape if has_bias else 0)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias


_forward = operation("layer_norm", forward, fake_forward)
_add_forward = operation("add_layer_norm", add_forward, fake_add_forward)
_backward = operation("layer_norm_backward", backward, fake_backward)
differentiate(
    _forward,
    lambda dy, *kept: _backward(dy, None, *kept),
    keep=lambda x, weight, bias, eps, y, mean, rstd: (x, weight, mean, rstd, bias is not None),
    wiring=(0, 1, 2),
)
differentiate(
    _add_forward,
    _backward,
    keep=lambda branch, residual, weight, bias, eps, y, x, mean, rstd: (
        x, weight, mean, rstd, bias is not None,
    ),
    wiring=(0, 0, 1, 2),
    upstream=2,
)  # fmt: skip
