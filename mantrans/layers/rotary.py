"""Rotary position embeddings, and norms of the heads of q and k, between projection and attention.

RoPE (Su et al. 2021) turns each pair of a head's elements by an angle, position · frequency, so
that q · k depends on how far apart the two are. It needs no parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from mantrans.layers.elements import Elements
from mantrans.parameters import Parameter

PART = 8192  # positions whose angles are computed at once


class Scaling(NamedTuple):
    """Llama 3.1's frequencies for contexts longer than the original (Dubey et al. 2024).

    A pair that makes fewer turns than `low` in the original context turns `factor` times slower;
    one that makes more than `high` is left as it is; between them the two are mixed.
    """

    factor: float
    low: float
    high: float
    original_length: int


class Angles:
    """cos and sin of every position's angles, (T_max, D/2): constants, the same for all blocks.

    theta: pair i has the frequency theta^(-2i / D); None: no pair is turned.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self, T_max: int, D: int, theta: float | None, scaling: Scaling | None = None
    ) -> None:
        self.shape, self.theta, self.scaling = (T_max, D // 2), theta, scaling

    def frequencies(self) -> Tensor:
        """Radians per position of each pair: (D/2,) float64."""
        pairs = self.shape[1]
        if self.theta is None:
            return torch.zeros(pairs, dtype=torch.float64)
        frequency = self.theta ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
        if self.scaling is None:
            return frequency
        factor, low, high, length = self.scaling
        turns = length * frequency / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return frequency * (kept + (1 - kept) / factor)

    def elements(self) -> int:
        """Numbers in both tables."""
        return 2 * self.shape[0] * self.shape[1]

    def allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        """Compute both in float64, a part at a time, and keep them in `dtype` on the model's
        device."""
        self.cos, self.sin = torch.empty(2, *self.shape, dtype=dtype, device=device)
        positions = torch.arange(self.shape[0], dtype=torch.float64)
        parts = (x.split(PART) for x in (positions, self.cos, self.sin))
        for rows, cos, sin in zip(*parts, strict=True):
            angles = torch.outer(rows, self.frequencies())
            cos.copy_(angles.cos())
            sin.copy_(angles.sin())


class Rotary:
    """qkv (B, T, (H + 2 H_kv)·D) -> the same with each head of q and k turned by its position.

    norm_epsilon: that of an RMS norm of each of these heads before it is turned, with one gain for
        all heads of q and one for those of k (Qwen3); None: no norms.
    """

    class Saved(NamedTuple):
        qkv: Tensor | None = None  # (B,T,M)       the input, if heads are normalized
        rstd: Tensor | None = None  # (N,H+H_kv)

    def __init__(
        self,
        ops: ModuleType,
        name: str,
        angles: Angles,
        *,
        n_heads: int,
        n_kv_heads: int,
        norm_epsilon: float | None = None,
    ) -> None:
        self.ops, self.angles, self.heads = ops, angles, (n_heads, n_kv_heads)
        self.norm_epsilon = norm_epsilon
        names = [] if norm_epsilon is None else [f"{name}.q_norm.weight", f"{name}.k_norm.weight"]
        self.gains = [Parameter(n, (2 * angles.shape[1],), constant=1.0) for n in names]

    def parameters(self) -> Iterator[Parameter]:
        yield from self.gains

    def forward(self, qkv: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Saved]:
        """positions (B, T) int64; None: 0 .. T-1. May write over `qkv`."""
        tables = self.angles.cos, self.angles.sin
        if not self.gains:
            return self.ops.rotary_forward(qkv, *tables, *self.heads, positions), self.Saved()
        gains = [p.value for p in self.gains]
        turned, rstd = self.ops.norm_rotary_forward(
            qkv, *gains, *tables, self.norm_epsilon, *self.heads, positions
        )
        return turned, self.Saved(qkv, rstd)

    def backward(self, dqkv: Tensor, saved: Saved) -> Tensor:
        """For positions 0 .. T-1. May write over `dqkv`."""
        tables = self.angles.cos, self.angles.sin
        if not self.gains:
            return self.ops.rotary_backward(dqkv, *tables, *self.heads)
        gains = [p.value for p in self.gains]
        dgains = [p.gradient for p in self.gains]
        return self.ops.norm_rotary_backward(
            dqkv, saved.qkv, *gains, saved.rstd, *tables, *dgains, *self.heads
        )

    def kept(self) -> Elements:
        """With norms the whole input, beside the output that the attention keeps."""
        H, H_kv = self.heads
        M = (H + 2 * H_kv) * 2 * self.angles.shape[1]
        return Elements(narrow=M, wide=H + H_kv) if self.gains else Elements(0)
