"""Causal multi-head self-attention, with its two projections and its key/value cache."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from mantrans.layers.elements import Elements
from mantrans.layers.linear import Linear
from mantrans.layers.rotary import Rotary
from mantrans.parameters import Parameter


class Attention:
    """softmax(q kᵀ / √D) v of H heads between a packed projection and a second one.

    The packed projection has M = (H + 2 H_kv)·D rows: H = n_heads heads of queries, then H_kv =
    n_kv_heads of keys and as many of values, each of width D = head_width, which need not be C / H.
    H_kv divides H: every H / H_kv neighboring heads of queries share one of keys and of values.

    rotary: what is done to the heads of q and k before they meet; None: nothing.
    window: keys that a query sees, its own included; None: all before it. `forward` and `backward`
        are told by `first_key`, which `Network` makes once for all blocks.
    """

    class Saved(NamedTuple):
        x: Tensor  # (B,T,C)     input of the packed projection
        rotary: Rotary.Saved | None
        qkv: Tensor  # (B,T,M)   what the attention reads
        out: Tensor  # (B,T,HD)  the heads' outputs, input of the second projection
        statistics: Tensor  # of the softmax, in the form of the backend that reads them again

    def __init__(
        self,
        ops: ModuleType,
        name: str,
        C: int,
        *,
        n_heads: int,
        n_kv_heads: int,
        head_width: int,
        std: float,
        residual_std: float,
        qkv_bias: bool = True,
        projection_bias: bool = True,
        rotary: Rotary | None = None,
        window: int | None = None,
    ) -> None:
        self.ops, self.n_heads, self.n_kv_heads = ops, n_heads, n_kv_heads
        self.rotary, self.window = rotary, window
        width, kv_width = n_heads * head_width, n_kv_heads * head_width
        self.widths = (width, kv_width, kv_width)  # of q, k and v
        self.qkv = Linear(ops, f"{name}.qkv", C, sum(self.widths), std=std, bias=qkv_bias)
        self.projection = Linear(
            ops,
            f"{name}.projection",
            width,
            C,
            std=residual_std,
            bias=projection_bias,
            into_residual=True,
        )

    def parameters(self) -> Iterator[Parameter]:
        yield from self.qkv.parameters()
        if self.rotary is not None:
            yield from self.rotary.parameters()
        yield from self.projection.parameters()

    def forward(self, x: Tensor, first_key: Tensor | None) -> tuple[Tensor, Saved]:
        """first_key (B, T) int32: the first key that each query sees; None: all before it."""
        qkv = self.qkv.forward(x)
        rotary = None
        if self.rotary is not None:
            qkv, rotary = self.rotary.forward(qkv)
        out, statistics = self.ops.attention_forward(qkv, self.n_heads, first_key, self.n_kv_heads)
        y = self.projection.forward(out)
        return y, self.Saved(x, rotary, qkv, out, statistics)

    def backward(
        self, dy: Tensor, saved: Saved, first_key: Tensor | None, accumulate: bool = True
    ) -> Tensor:
        x, rotary, qkv, out, statistics = saved
        dout = self.projection.backward(dy, out, accumulate)
        dqkv = self.ops.attention_backward(
            dout, qkv, out, statistics, self.n_heads, first_key, self.n_kv_heads
        )
        if self.rotary is not None and rotary is not None:
            dqkv = self.rotary.backward(dqkv, rotary)
        return self.qkv.backward(dqkv, x, accumulate)

    def decode(self, x: Tensor, cache: KeyValueCache, lengths: Tensor) -> Tensor:
        """One new position per row: x (B, C) at index lengths[b] - 1. Extends the cache."""
        qkv = self.qkv.forward(x)
        if self.rotary is not None:
            qkv = self.rotary.forward(qkv[:, None], lengths[:, None] - 1)[0][:, 0]
        q, k, v = qkv.split(self.widths, dim=-1)
        cache.append(k, v, lengths)
        heads = self.n_heads, self.n_kv_heads
        out = self.ops.decode_attention(
            q.contiguous(), cache.k, cache.v, lengths, *heads, self.window
        )
        return self.projection.forward(out)

    def new_cache(self, batch_size: int, length: int) -> KeyValueCache:
        """Room for the keys and values of `length` positions."""
        weight = self.qkv.weight.value
        shape = (batch_size, length, self.widths[1])
        return KeyValueCache(weight.new_empty(shape), weight.new_empty(shape))

    def flops(self, T: int) -> float:
        """Projections; scores and weighted sum over the keys that a query sees, on average."""
        W = T if self.window is None else min(self.window, T)
        keys = W - (W - 1) * W / (2 * T)  # the first W - 1 queries see 1, 2, ... instead of W
        return self.qkv.flops() + self.projection.flops() + 4 * self.widths[0] * keys

    def kept(self) -> Elements:
        M, C = self.qkv.weight.shape
        own = Elements(narrow=C + M + self.widths[0], wide=2 * self.n_heads)
        return own if self.rotary is None else own + self.rotary.kept()

    def workspace(self) -> int:
        """dy, dout, dqkv, and the three inputs of the kernels that are copies, of H heads each."""
        M, C = self.qkv.weight.shape
        return C + M + 4 * self.widths[0]


class KeyValueCache(NamedTuple):
    """The keys and values of all past positions of one attention layer: each (B, T_max, H_kv·D)."""

    k: Tensor
    v: Tensor

    def fill(self, qkv: Tensor) -> None:
        """Store the keys and values of a whole prompt, qkv (B, T, M), from position 0 on."""
        T, width = qkv.shape[1], self.k.shape[2]
        self.k[:, :T] = qkv[..., -2 * width : -width]
        self.v[:, :T] = qkv[..., -width:]

    def append(self, k: Tensor, v: Tensor, lengths: Tensor) -> None:
        """Store one position per row, k and v (B, H_kv·D), at index lengths[b] - 1."""
        B, T, _ = self.k.shape
        last = torch.arange(-1, B * T - 1, T, device=lengths.device) + lengths  # T·b + length - 1
        self.k.view(B * T, -1).index_copy_(0, last, k)
        self.v.view(B * T, -1).index_copy_(0, last, v)
