"""Each operation of `mantrans.ops` beside PyTorch's own way, at small sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mantrans import ops
from mantrans.ops import registration

B, T, H, H_KV, D, C, V = 2, 9, 4, 2, 6, 24, 11
BOUNDS = [0, 4, 4, 5, 9]  # of sequences one after the other, one of them empty
Inputs = dict[str, Any]


class Case(NamedTuple):
    """ours, plain: of the inputs by name, to a tensor or several. shapes: of those with a gradient;
    given: the others."""

    ours: Callable[..., Any]
    plain: Callable[..., Any]
    shapes: dict[str, tuple[int, ...]]
    given: Inputs = {}  # noqa: RUF012  (never changed)

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> Inputs:
        source = torch.Generator().manual_seed(seed)
        drawn = {n: torch.randn(s, generator=source).to(dtype) for n, s in self.shapes.items()}
        given = {n: x.to(dtype) if is_float(x) else x for n, x in self.given.items()}
        return {**drawn, **given}


def is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def plain_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    heads = (x.transpose(-3, -2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        *heads, attn_mask=seen, is_causal=seen is None, enable_gqa=True
    )
    return out.transpose(-3, -2)


def plain_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As transformers' apply_rotary_pos_emb has it."""
    cos, sin = (torch.cat((x, x), -1).unsqueeze(-2) for x in (cos, sin))

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    return turned(q), turned(k)


def split(qkv: Tensor) -> tuple[Tensor, ...]:
    return qkv.unflatten(-1, (-1, D)).split((H, H_KV, H_KV), -2)


def plain_loss(logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
    loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction=reduction)
    return loss.view(targets.shape) if reduction == "none" else loss


def _targets() -> Tensor:
    targets = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(5))
    targets[0, :3] = targets[1, -1] = -100
    return targets


_position = torch.arange(T)
_causal = _position <= _position[:, None]
_WINDOW = _causal & (_position > _position[:, None] - 3)
_document = torch.bucketize(_position, torch.tensor(BOUNDS[1:]), right=True)
_DOCUMENTS = _causal & (_document == _document[:, None])
_angle = torch.randn(T, D // 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
ANGLES = {"cos": _angle.cos(), "sin": _angle.sin()}
_angles = _angle * torch.tensor([1.0, -2.0])[:, None, None]
EACH_ROW = {"cos": _angles.cos(), "sin": _angles.sin()}
CU_SEQLENS = torch.tensor(BOUNDS, dtype=torch.int32)
_x, _norm = {"x": (B, T, C)}, {"x": (B, T, C), "weight": (C,)}
_qkv = {"q": (B, T, H, D), "k": (B, T, H_KV, D), "v": (B, T, H_KV, D)}
_varlen = {name: shape[1:] for name, shape in _qkv.items()}
_residual = {**_norm, "residual": (B, T, C)}

CASES = {
    "layer_norm": Case(
        ops.layer_norm, lambda x, weight, bias: F.layer_norm(x, (C,), weight, bias),
        {**_norm, "bias": (C,)},
    ),
    "layer_norm, no bias": Case(
        ops.layer_norm, lambda x, weight: F.layer_norm(x, (C,), weight), _norm
    ),
    "layer_norm, residual": Case(
        ops.layer_norm,
        lambda x, weight, bias, residual: (
            F.layer_norm(x + residual, (C,), weight, bias), x + residual,
        ),
        {**_residual, "bias": (C,)},
    ),
    "rms_norm": Case(ops.rms_norm, lambda x, weight: F.rms_norm(x, (C,), weight, 1e-6), _norm),
    "rms_norm, residual": Case(
        ops.rms_norm,
        lambda x, weight, residual: (F.rms_norm(x + residual, (C,), weight, 1e-6), x + residual),
        _residual,
    ),
    "rope": Case(ops.rope, plain_rope, {n: _qkv[n] for n in "qk"}, ANGLES),
    "rope, tables of each row": Case(
        ops.rope,
        lambda q, k, cos, sin: plain_rope(q, k, *(x[..., : D // 2] for x in (cos, sin))),
        {n: _qkv[n] for n in "qk"}, {name: torch.cat((x, x), -1) for name, x in EACH_ROW.items()},
    ),
    "swiglu": Case(
        ops.swiglu, lambda gate, up: F.silu(gate) * up, {"gate": (B, T, C), "up": (B, T, C)}
    ),
    "swiglu, packed": Case(
        lambda x: ops.swiglu(x), lambda x: F.silu(x[..., : C // 2]) * x[..., C // 2 :], _x
    ),
    "bias_gelu": Case(
        ops.bias_gelu, lambda h, bias: F.gelu(h + bias, approximate="tanh"),
        {"h": (B, T, C), "bias": (C,)},
    ),
    "bias_gelu, no bias": Case(
        ops.bias_gelu, lambda h: F.gelu(h, approximate="tanh"), {"h": (B, T, C)}
    ),
    **{
        f"cross_entropy, {reduction}": Case(
            ops.cross_entropy, plain_loss, {"logits": (B, T, V)},
            {"targets": _targets(), "reduction": reduction},
        )
        for reduction in ("mean", "sum", "none")
    },
    **{
        f"linear_cross_entropy, {reduction}": Case(
            ops.linear_cross_entropy,
            lambda x, weight, **rest: plain_loss(x @ weight.T, **rest),
            {"x": (B, T, C), "weight": (V, C)}, {"targets": _targets(), "reduction": reduction},
        )
        for reduction in ("mean", "sum")
    },
    "attention": Case(ops.attention, plain_attention, _qkv),
    "attention, window": Case(
        lambda q, k, v: ops.attention(q, k, v, window=3),
        lambda q, k, v: plain_attention(q, k, v, _WINDOW), _qkv,
    ),
    "attention, cu_seqlens": Case(
        ops.attention,
        lambda q, k, v, cu_seqlens: plain_attention(q[None], k[None], v[None], _DOCUMENTS)[0],
        _varlen, {"cu_seqlens": CU_SEQLENS},
    ),
    "attention, both": Case(
        lambda q, k, v, cu_seqlens: ops.attention(q, k, v, window=3, cu_seqlens=cu_seqlens),
        lambda q, k, v, cu_seqlens: plain_attention(
            q[None], k[None], v[None], _DOCUMENTS & _WINDOW)[0],
        _varlen, {"cu_seqlens": CU_SEQLENS.long()},
    ),
    "attention, packed": Case(
        lambda qkv: ops.packed_attention(qkv, H, H_KV),
        lambda qkv: plain_attention(*split(qkv)).flatten(-2),
        {"qkv": (B, T, (H + 2 * H_KV) * D)},
    ),
}  # fmt: skip
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
# The interpreter takes longest for attention, whose kernels have fast tests of their own.
each_case_interpreted = pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=n, marks=pytest.mark.slow if n.startswith("attention, ") else ())
     for n, case in CASES.items()],
)  # fmt: skip


def outputs_and_gradients(call: Callable[..., Any], inputs: Inputs, case: Case) -> list[Tensor]:
    """Of a weighted sum of all outputs: the same weights whoever computes them."""
    leaves = {n: inputs[n].clone().requires_grad_() for n in case.shapes}
    found = call(**{**inputs, **leaves})
    outputs = found if isinstance(found, tuple) else (found,)
    source = torch.Generator().manual_seed(7)
    total = sum((y.double() * torch.randn(y.shape, generator=source)).sum() for y in outputs)
    return [*(y.detach() for y in outputs), *torch.autograd.grad(total, list(leaves.values()))]


@contextmanager
def on_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, tensors on the CPU go to the interpreted kernels."""
    with monkeypatch.context() as patched:
        patched.setitem(registration.BACKENDS, "cpu", "triton")
        yield
