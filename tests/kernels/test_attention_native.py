"""Native attention in bfloat16: scores are rounded where that costs nothing, and only there."""

from __future__ import annotations

import pytest
import torch

from mantrans.kernels import native, reference
from tests.support.compare import relative_error


@pytest.mark.parametrize(
    ("size", "offset", "T", "documents"),
    [
        (1.0, 0.0, 300, False),
        (3.0, 0.0, 40, True),
        (8.0, 0.0, 300, True),
        (8.0, 0.0, 40, False),
        (1.0, 1e3, 40, True),
        (1.0, -1e3, 40, False),
        (0.1, -30.0, 300, True),
    ],
)
def test_attention_any_scores(size: float, offset: float, T: int, documents: bool) -> None:
    """Against float64, at most 3 times the error of PyTorch's kernel, which never rounds scores.

    size: of queries and keys. offset: what all scores have in common."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, T, 4, 16, generator=generator)
    q, k = q * size, k * size
    q[..., 0], k[..., 0] = 4 * abs(offset) ** 0.5, offset / max(abs(offset), 1) ** 0.5
    qkv = torch.cat([x.flatten(2) for x in (q, k, v)], -1).bfloat16()
    dout = torch.randn(2, T, 64, generator=generator).bfloat16()
    starts = torch.zeros(2, T, dtype=torch.int32)
    starts[:, T // 3 :] = T // 3

    def ours(ops, dtype: torch.dtype) -> list[torch.Tensor]:
        x, dy, start = qkv.to(dtype), dout.to(dtype), starts if documents else None
        out, saved = ops.attention_forward(x, 4, start)
        return [out, *ops.attention_backward(dy, x, out, saved, 4, start).chunk(3, -1)]

    leaf = qkv.clone().requires_grad_()
    heads = (x.unflatten(2, (4, 16)).transpose(1, 2) for x in leaf.chunk(3, -1))
    seen = reference.visible(T, starts, qkv.device) if documents else None
    out = torch.nn.functional.scaled_dot_product_attention(*heads, seen, is_causal=not documents)
    out = out.transpose(1, 2).flatten(2)
    theirs = [out.detach(), *torch.autograd.grad(out, leaf, dout)[0].chunk(3, -1)]
    exact = ours(reference, torch.float64)
    for name, a, b, x in zip(
        ("out", "dq", "dk", "dv"), ours(native, torch.bfloat16), theirs, exact, strict=True
    ):
        assert relative_error(a, x) <= max(3 * relative_error(b, x), 2**-8), name
