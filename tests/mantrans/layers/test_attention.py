"""The attention layer with fewer key and value heads than query heads, and heads of any width.

What it computes is tested with its operations; here: that layer, cache and counts fit together.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mantrans.kernels import native, reference
from mantrans.layers import Attention
from mantrans.parameters import Parameters
from tests.support.compare import assert_close

B, T, C, H, D = 2, 7, 10, 6, 5  # D is not C / H


def layer(H_kv: int, ops=native) -> Attention:
    """In float64, with random weights and biases."""
    attention = Attention(
        ops, "a", C, n_heads=H, n_kv_heads=H_kv, head_width=D, std=1.0, residual_std=1.0
    )
    parameters = Parameters(attention.parameters(), torch.float64, torch.device("cpu"))
    torch.manual_seed(0)
    for p in parameters.by_name.values():
        p.value.copy_(torch.randn(p.shape) / C**0.5)
    return attention


def plain(attention: Attention, H_kv: int, x: Tensor) -> Tensor:
    """The same by PyTorch's own operations."""
    linear, qkv, projection = torch.nn.functional.linear, attention.qkv, attention.projection
    packed = linear(x, qkv.weight.value, qkv.bias.value)
    q, k, v = packed.view(B, T, -1, D).transpose(1, 2).split([H, H_kv, H_kv], 1)
    attend = torch.nn.functional.scaled_dot_product_attention
    out = attend(q, k, v, is_causal=True, enable_gqa=True)
    return linear(out.transpose(1, 2).flatten(2), projection.weight.value, projection.bias.value)


@pytest.mark.parametrize("ops", [reference, native], ids=["reference", "native"])
@pytest.mark.parametrize("H_kv", [2, 1, 6])
def test_attention_backward(H_kv: int, ops) -> None:
    attention = layer(H_kv, ops)
    x, dy = torch.randn(2, B, T, C, dtype=torch.float64)
    weights = [p.value for p in attention.parameters()]
    leaves = [t.requires_grad_() for t in (x, *weights)]
    expected = plain(attention, H_kv, x)
    gradients = torch.autograd.grad(expected, leaves, dy)
    for leaf in leaves:
        leaf.requires_grad_(False)

    y, saved = attention.forward(x, None)
    dx = attention.backward(dy, saved, None)
    assert_close(y, expected.detach(), 1e-12, "y")
    assert_close(dx, gradients[0], 1e-12, "dx")
    for p, wanted in zip(attention.parameters(), gradients[1:], strict=True):
        if p is not attention.projection.bias:  # the norm that follows sums it
            assert_close(p.gradient, wanted, 1e-12, p.name)


@pytest.mark.parametrize("H_kv", [2, 1, 6])
def test_attention_decode(H_kv: int) -> None:
    attention = layer(H_kv)
    x = torch.randn(B, T, C, dtype=torch.float64)
    expected, _ = attention.forward(x, None)
    _, saved = attention.forward(x[:, : T - 2], None)
    cache = attention.new_cache(B, T)
    assert cache.k.shape == cache.v.shape == (B, T, H_kv * D)
    cache.fill(saved.qkv)
    for t in (T - 2, T - 1):
        y = attention.decode(x[:, t], cache, torch.full((B,), t + 1))
        assert_close(y, expected[:, t], 1e-12)


@pytest.mark.parametrize("H_kv", [2, 1, 6])
def test_attention_counts(H_kv: int) -> None:
    """What it keeps and computes is what it counts."""
    attention = layer(H_kv, reference)  # which keeps as many statistics as a GPU, native fewer
    _, saved = attention.forward(torch.randn(B, T, C, dtype=torch.float64), None)
    kept = attention.kept()
    assert kept.narrow * B * T == saved.x.numel() + saved.qkv.numel() + saved.out.numel()
    assert kept.wide * B * T == saved.statistics.numel()
    products = 2 * C * (H + 2 * H_kv) * D + 2 * H * D * C
    assert attention.flops(T) == products + 2 * H * 2 * D * (T + 1) / 2
