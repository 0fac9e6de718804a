"""SwiGLU."""

from __future__ import annotations

import torch
from torch import Tensor

from mantrans.ops.registration import (
    backend_of,
    differentiate,
    expect,
    expect_floats,
    expect_like,
    operation,
)


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) · up, with silu(g) = g σ(g) (Shazeer 2020).

    gate, up (..., F); or without up, gate (..., 2F) holds both: gate first, then up. That needs no
    copy. Returns (..., F).
    """
    expect_floats("gate", gate)
    if up is not None:
        expect_like("up", up, gate, gate.shape)
        return _forward(torch.cat((gate, up), -1))
    even = gate.dim() > 0 and gate.shape[-1] % 2 == 0
    expect("gate", even, "an even last axis: gate and up", tuple(gate.shape))
    return _forward(gate)


def forward(h: Tensor) -> Tensor:
    return backend_of(h).swiglu_forward(h.contiguous())


def fake_forward(h: Tensor) -> Tensor:
    return h.new_empty(*h.shape[:-1], h.shape[-1] // 2)


def backward(dy: Tensor, h: Tensor) -> Tensor:
    return backend_of(h).swiglu_backward(dy.contiguous(), h.contiguous())


def fake_backward(dy: Tensor, h: Tensor) -> Tensor:
    return h.new_empty(h.shape)


_forward = operation("swiglu", forward, fake_forward)
_backward = operation("swiglu_backward", backward, fake_backward)
differentiate(_forward, _backward, keep=lambda h, y: (h,), wiring=(0,))
