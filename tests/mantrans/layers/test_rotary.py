"""Rotary angles, and the attention layer with them: with head norms, shared keys, a window.

What the operations compute is tested with them; here: that layer, cache and counts fit together.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mantrans.kernels import native, reference
from mantrans.kernels.reference import window_starts
from mantrans.layers import Angles, Attention, Rotary, Scaling, rotary
from mantrans.parameters import Parameters
from tests.support.compare import assert_close

B, T, C, H, D, EPS = 2, 9, 10, 6, 6, 1e-3
CPU = torch.device("cpu")


def test_angles_float64() -> None:
    length = rotary.PART + 17  # more than one part
    angles = Angles(length, 4, 10_000.0)
    angles.allocate(torch.float32, CPU)
    assert angles.cos.shape == angles.sin.shape == (length, 2)
    assert angles.elements() == angles.cos.numel() + angles.sin.numel()
    for position in (0, 1, 17, rotary.PART - 1, rotary.PART, length - 1):
        for pair, frequency in enumerate((1.0, 0.01)):
            # the product in float32 would be off by 2e-4 radians at the last positions
            expected = torch.tensor(
                [math.cos(position * frequency), math.sin(position * frequency)]
            )
            found = torch.stack([angles.cos[position, pair], angles.sin[position, pair]])
            assert torch.equal(found, expected)
    angles.allocate(torch.float64, CPU)
    assert angles.cos.dtype == torch.float64


def test_angles_llama3_scaling() -> None:
    """Slow ones a factor slower, fast ones unchanged, those between mixed, all in order."""
    theta, pairs = 500_000.0, 64
    plain = Angles(8, 2 * pairs, theta).frequencies()
    scaled = Angles(8, 2 * pairs, theta, Scaling(8.0, 1.0, 4.0, 8192)).frequencies()
    turns = 8192 * plain / (2 * math.pi)
    slow, fast = turns < 1, turns > 4
    assert slow.sum() > 20 and fast.sum() > 20 and (~slow & ~fast).sum() >= 4
    assert torch.equal(scaled[fast], plain[fast])
    assert_close(scaled[slow], plain[slow] / 8, 1e-15)
    assert (scaled.diff() < 0).all()
    between = ~slow & ~fast
    smooth = (turns[between] - 1) / 3
    mixed = (1 - smooth) * plain[between] / 8 + smooth * plain[between]
    assert_close(scaled[between], mixed, 1e-15)


def layer(H_kv: int, norms: bool, window: int | None, ops=native, theta=20.0) -> Attention:
    """In float64, with random weights, biases and gains."""
    angles = Angles(T, D, theta)
    angles.allocate(torch.float64, CPU)
    turning = Rotary(
        ops, "a", angles, n_heads=H, n_kv_heads=H_kv, norm_epsilon=EPS if norms else None
    )
    attention = Attention(
        ops, "a", C, n_heads=H, n_kv_heads=H_kv, head_width=D, std=1.0, residual_std=1.0,
        projection_bias=False, rotary=turning, window=window,
    )  # fmt: skip
    parameters = Parameters(attention.parameters(), torch.float64, CPU)
    assert ("a.q_norm.weight" in parameters.by_name) == norms
    torch.manual_seed(0)
    for p in parameters.by_name.values():
        p.value.copy_(torch.randn(p.shape) / C**0.5 + ("norm" in p.name))
    return attention


def first_key(x: Tensor, window: int | None) -> Tensor | None:
    return None if window is None else window_starts(x[..., 0], window)


def plain(attention: Attention, H_kv: int, x: Tensor, leaves: dict[str, Tensor]) -> Tensor:
    """The same by PyTorch's own operations, and complex numbers for the rotation."""
    F = torch.nn.functional
    packed = F.linear(x, leaves["a.qkv.weight"], leaves["a.qkv.bias"])
    q, k, v = packed.view(B, T, -1, D).transpose(1, 2).split([H, H_kv, H_kv], 1)
    if "a.q_norm.weight" in leaves:
        q = F.rms_norm(q, (D,), leaves["a.q_norm.weight"], EPS)
        k = F.rms_norm(k, (D,), leaves["a.k_norm.weight"], EPS)
    frequency = 20.0 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    turn = torch.polar(torch.ones(T, D // 2).double(), torch.arange(T).outer(frequency))
    q, k = (
        torch.cat((turned.real, turned.imag), -1)
        for y in (q, k)
        for turned in [torch.complex(*y.chunk(2, -1)) * turn]
    )
    distance = torch.arange(T)[:, None] - torch.arange(T)
    seen = (distance >= 0) & (distance < (attention.window or T))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    return F.linear(out.transpose(1, 2).flatten(2), leaves["a.projection.weight"])


CASES = [(2, True, None), (1, False, 3), (6, True, 1), (3, True, 99), (6, False, None)]


@pytest.mark.parametrize("ops", [reference, native], ids=["reference", "native"])
@pytest.mark.parametrize(("H_kv", "norms", "window"), CASES)
def test_attention_backward(H_kv: int, norms: bool, window: int | None, ops) -> None:
    attention = layer(H_kv, norms, window, ops)
    x, dy = torch.randn(2, B, T, C, dtype=torch.float64)
    leaves = {p.name: p.value.clone().requires_grad_() for p in attention.parameters()}
    x_leaf = x.clone().requires_grad_()
    expected = plain(attention, H_kv, x_leaf, leaves)
    wanted = torch.autograd.grad(expected, [x_leaf, *leaves.values()], dy)

    y, saved = attention.forward(x, first_key(x, window))
    dx = attention.backward(dy, saved, first_key(x, window))
    assert_close(y, expected.detach(), 1e-12, "y")
    assert_close(dx, wanted[0], 1e-12, "dx")
    largest = max(w.norm() for w in wanted)
    for p, w in zip(attention.parameters(), wanted[1:], strict=True):
        error = (p.gradient - w).norm()
        # of one key the softmax is 1: q and k have no gradient, on either side but rounding
        assert error <= 1e-12 * (largest if window == 1 else w.norm()), p.name


@pytest.mark.parametrize("ops", [reference, native], ids=["reference", "native"])
@pytest.mark.parametrize(("H_kv", "norms", "window"), CASES)
def test_attention_decode(H_kv: int, norms: bool, window: int | None, ops) -> None:
    """Rows of different lengths: each new position is turned by its own angle."""
    attention = layer(H_kv, norms, window, ops)
    x = torch.randn(B, T, C, dtype=torch.float64)
    expected, _ = attention.forward(x, first_key(x, window))
    _, saved = attention.forward(x[:, : T - 2], first_key(x[:, : T - 2], window))
    cache = attention.new_cache(B, T)
    cache.fill(saved.qkv)
    for lengths in (torch.tensor([T - 1, T - 4]), torch.tensor([T, T - 3])):
        rows = torch.arange(B)
        y = attention.decode(x[rows, lengths - 1], cache, lengths)
        assert_close(y, expected[rows, lengths - 1], 1e-12)


@pytest.mark.parametrize(("H_kv", "norms", "window"), CASES)
def test_attention_counts(H_kv: int, norms: bool, window: int | None) -> None:
    """What it keeps and computes is what it counts."""
    attention = layer(H_kv, norms, window, reference)
    x = torch.randn(B, T, C, dtype=torch.float64)
    _, saved = attention.forward(x, first_key(x, window))
    narrow = [saved.x, saved.qkv, saved.out, saved.rotary.qkv]
    wide = [saved.statistics, saved.rotary.rstd]
    assert (saved.rotary.qkv is not None) == norms
    kept = attention.kept()
    assert kept.narrow * B * T == sum(t.numel() for t in narrow if t is not None)
    assert kept.wide * B * T == sum(t.numel() for t in wide if t is not None)
    keys = sum(min(t + 1, window or T) for t in range(T)) / T
    products = 2 * C * (H + 2 * H_kv) * D + 2 * H * D * C
    assert attention.flops(T) == pytest.approx(products + 4 * H * D * keys, rel=1e-14)


def test_attention_without_theta() -> None:
    """Without theta no pair is turned."""
    angles = Angles(T, D, None)
    angles.allocate(torch.float64, CPU)
    turning = Rotary(reference, "a", angles, n_heads=H, n_kv_heads=2, norm_epsilon=None)
    qkv = torch.randn(B, T, (H + 4) * D, dtype=torch.float64)
    assert torch.equal(turning.forward(qkv)[0], qkv)
