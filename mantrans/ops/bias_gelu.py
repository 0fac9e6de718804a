"""GELU of a matrix product with its bias."""

from __future__ import annotations

import torch
from torch import Tensor

from mantrans.kernels.reference import wide_dtype
from mantrans.ops.registration import (
    backend_of,
    differentiate,
    expect,
    expect_floats,
    expect_vector,
    operation,
)


def bias_gelu(h: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU in its tanh form (Hendrycks & Gimpel 2016, GPT-2's) of h + bias.

    h (..., F): a matrix product before its bias; bias (F,), read in h's dtype. Returns (..., F).
    """
    expect_floats("h", h)
    some = h.dim() > 0 and h.shape[-1] > 0
    expect("h", some, "a last axis of at least 1", tuple(h.shape))
    if bias is not None:
        expect_vector("bias", bias, h, h.shape[-1])
        bias = bias.to(h.dtype).contiguous()
    return _forward(h, bias)


def forward(h: Tensor, bias: Tensor | None) -> Tensor:
    return backend_of(h).bias_gelu_forward(h.contiguous(), bias)


def fake_forward(h: Tensor, bias: Tensor | None) -> Tensor:
    return h.new_empty(h.shape)


def backward(dy: Tensor, h: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    dbias = None if bias is None else torch.zeros_like(bias, dtype=wide_dtype(h.dtype))
    dh = backend_of(h).bias_gelu_backward(dy.contiguous(), h.contiguous(), bias, dbias)
    return dh, h.new_empty(0) if dbias is None else dbias.to(h.dtype)


def fake_backward(dy: Tensor, h: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape), h.new_empty(0 if bias is None else bias.shape)


_forward = operation("bias_gelu", forward, fake_forward)
_backward = operation("bias_gelu_backward", backward, fake_backward)
differentiate(_forward, _backward, keep=lambda h, bias, y: (h, bias), wiring=(0, 1))
