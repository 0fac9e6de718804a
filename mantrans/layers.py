"""The layers: each has a forward, and below it the backward that mirrors it line by line.

A layer owns no memory. It holds views of its weights and of their gradients, and the module of
operations (`ops`, see `mantrans.kernels.backend`) that it computes with.

    forward(x)         -> y, saved      `saved` is what the backward needs, named as in mathematics
    backward(dy, saved) -> dx           weight gradients are added to, activation gradients returned

Tensors: B batch, T sequence, C model width, F feed-forward width; x is (B, T, C) throughout.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from mantrans.parameters import Parameters


class Weight(NamedTuple):
    """A parameter and the buffer its gradient is added to, each in its stored shape."""

    value: Tensor
    gradient: Tensor


def weight_of(parameters: Parameters, name: str) -> Weight:
    """The named parameter with its gradient."""
    return Weight(
        parameters.stored(parameters.weights, name), parameters.stored(parameters.gradients, name)
    )


def optional_weight(parameters: Parameters, name: str) -> Weight | None:
    """The named parameter, or None where the model has none (bias: false)."""
    return weight_of(parameters, name) if name in parameters.specs else None


class Linear:
    """y = x Wᵀ + b, with W (M, K)."""

    def __init__(self, ops: ModuleType, parameters: Parameters, name: str) -> None:
        self.ops = ops
        self.weight = weight_of(parameters, f"{name}.weight")
        self.bias = optional_weight(parameters, f"{name}.bias")

    def forward(self, x: Tensor) -> Tensor:
        """The input is all that the backward needs: the caller, who has it, keeps it."""
        return self.ops.linear_forward(x, self.weight.value, self.bias and self.bias.value)

    def backward(self, dy: Tensor, x: Tensor) -> Tensor:
        return self.ops.linear_backward(dy, x, *self.weight, dbias=self.bias and self.bias.gradient)


class LayerNorm:
    """y = γ x̂ + β, optionally of the sum of a residual and what a branch adds to it."""

    class Saved(NamedTuple):
        x: Tensor  # (B,T,C)
        mean: Tensor  # (N,)
        rstd: Tensor  # (N,)

    def __init__(self, ops: ModuleType, parameters: Parameters, name: str, epsilon: float) -> None:
        self.ops, self.epsilon = ops, epsilon
        self.weight = weight_of(parameters, f"{name}.weight")
        self.bias = optional_weight(parameters, f"{name}.bias")

    def forward(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Saved]:
        """y = LN(x), or LN(x + branch); the sum is in `saved.x` for whoever goes on with it."""
        bias = self.bias and self.bias.value
        if branch is None:
            y, mean, rstd = self.ops.layer_norm_forward(x, self.weight.value, bias, self.epsilon)
        else:
            y, x, mean, rstd = self.ops.add_layer_norm_forward(
                branch, x, self.weight.value, bias, self.epsilon
            )
        return y, self.Saved(x, mean, rstd)

    def backward(self, dy: Tensor, saved: Saved, dresidual: Tensor | None = None) -> Tensor:
        """The gradient of x, to which `dresidual` is added: what by-passed the norm."""
        return self.ops.layer_norm_backward(
            dy,
            saved.x,
            self.weight.value,
            saved.mean,
            saved.rstd,
            self.weight.gradient,
            self.bias and self.bias.gradient,
            dresidual,
        )


class Attention:
    """Causal multi-head self-attention between its two projections."""

    class Saved(NamedTuple):
        x: Tensor  # (B,T,C)   input of the packed projection
        qkv: Tensor  # (B,T,3C)
        out: Tensor  # (B,T,C) the heads' outputs, input of the second projection
        lse: Tensor  # (B,H,T)

    def __init__(self, ops: ModuleType, parameters: Parameters, name: str, n_heads: int) -> None:
        self.ops, self.n_heads = ops, n_heads
        self.qkv = Linear(ops, parameters, f"{name}.qkv")
        self.projection = Linear(ops, parameters, f"{name}.projection")

    def forward(self, x: Tensor, document_start: Tensor | None) -> tuple[Tensor, Saved]:
        qkv = self.qkv.forward(x)
        out, lse = self.ops.attention_forward(qkv, self.n_heads, document_start)
        y = self.projection.forward(out)
        return y, self.Saved(x, qkv, out, lse)

    def backward(self, dy: Tensor, saved: Saved, document_start: Tensor | None) -> Tensor:
        x, qkv, out, lse = saved
        dout = self.projection.backward(dy, out)
        dqkv = self.ops.attention_backward(dout, qkv, out, lse, self.n_heads, document_start)
        return self.qkv.backward(dqkv, x)

    def decode(self, x: Tensor, cache: KeyValueCache, lengths: Tensor) -> Tensor:
        """One new position per row: x (B, C) at index lengths[b] - 1. Extends the cache."""
        q, k, v = self.qkv.forward(x).chunk(3, dim=-1)
        cache.append(k, v, lengths)
        out = self.ops.decode_attention(q.contiguous(), cache.k, cache.v, lengths, self.n_heads)
        return self.projection.forward(out)


class KeyValueCache(NamedTuple):
    """The keys and values of all past positions of one attention layer: each (B, T_max, C)."""

    k: Tensor
    v: Tensor

    def fill(self, qkv: Tensor) -> None:
        """Store the keys and values of a whole prompt, qkv (B, T, 3C), from position 0 on."""
        T, C = qkv.shape[1], self.k.shape[2]
        self.k[:, :T] = qkv[..., C : 2 * C]
        self.v[:, :T] = qkv[..., 2 * C :]

    def append(self, k: Tensor, v: Tensor, lengths: Tensor) -> None:
        """Store one position per row, k and v (B, C), at index lengths[b] - 1."""
        rows = torch.arange(len(lengths), device=lengths.device)
        self.k[rows, lengths - 1] = k
        self.v[rows, lengths - 1] = v


class MLP:
    """Linear → GELU → Linear. The first bias is added by the GELU, in the same pass."""

    class Saved(NamedTuple):
        x: Tensor  # (B,T,C)
        h: Tensor  # (B,T,F)   the first product, before its bias
        a: Tensor | None  # (B,T,F)  gelu(h + b); None where it is recomputed

    def __init__(
        self, ops: ModuleType, parameters: Parameters, name: str, recompute_gelu: bool
    ) -> None:
        self.ops, self.recompute_gelu = ops, recompute_gelu
        self.up = Linear(ops, parameters, f"{name}.up")
        self.down = Linear(ops, parameters, f"{name}.down")
        self.bias, self.up.bias = self.up.bias, None  # the GELU adds it

    def forward(self, x: Tensor) -> tuple[Tensor, Saved]:
        h, a = self.hidden(x)
        y = self.down.forward(a)
        return y, self.Saved(x, h, None if self.recompute_gelu else a)

    def hidden(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The forward as far as the backward needs it: up to the last product's input."""
        h = self.up.forward(x)
        return h, self.ops.bias_gelu_forward(h, self.bias and self.bias.value)

    def backward(self, dy: Tensor, saved: Saved) -> Tensor:
        x, h, a = saved
        bias, dbias = self.bias or (None, None)
        if a is None:
            a = self.ops.bias_gelu_forward(h, bias)
        da = self.down.backward(dy, a)
        dh = self.ops.bias_gelu_backward(da, h, bias, dbias)
        return self.up.backward(dh, x)


class Block:
    """x ← x + attention(LN(x));  x ← x + mlp(LN(x)).

    Between blocks travel the residual x and the output of the last branch, not yet added to it: the
    next norm adds the two while it reads them. The gradient of that sum is the gradient of either.
    """

    class Saved(NamedTuple):
        norm_1: LayerNorm.Saved
        attention: Attention.Saved
        norm_2: LayerNorm.Saved
        mlp: MLP.Saved

    def __init__(
        self,
        ops: ModuleType,
        parameters: Parameters,
        name: str,
        n_heads: int,
        epsilon: float,
        recompute_gelu: bool = False,
    ) -> None:
        self.norm_1 = LayerNorm(ops, parameters, f"{name}.norm_1", epsilon)
        self.attention = Attention(ops, parameters, f"{name}.attention", n_heads)
        self.norm_2 = LayerNorm(ops, parameters, f"{name}.norm_2", epsilon)
        self.mlp = MLP(ops, parameters, f"{name}.mlp", recompute_gelu)

    def forward(
        self, x: Tensor, branch: Tensor | None, document_start: Tensor | None
    ) -> tuple[Tensor, Tensor, Saved]:
        """x, branch (B, T, C) -> the residual, and the MLP's output that is still to be added."""
        y, norm_1, attention, norm_2 = self._up_to_mlp(x, branch, document_start)
        branch, mlp = self.mlp.forward(y)
        return norm_2.x, branch, self.Saved(norm_1, attention, norm_2, mlp)

    def recompute(self, x: Tensor, document_start: Tensor | None) -> Saved:
        """The `Saved` of a forward, from its `norm_1.x`. The MLP's last product, a third of a
        block's arithmetic, is left out: nobody reads its result again."""
        y, norm_1, attention, norm_2 = self._up_to_mlp(x, None, document_start)
        return self.Saved(norm_1, attention, norm_2, self.mlp.Saved(y, *self.mlp.hidden(y)))

    def _up_to_mlp(
        self, x: Tensor, branch: Tensor | None, document_start: Tensor | None
    ) -> tuple[Tensor, LayerNorm.Saved, Attention.Saved, LayerNorm.Saved]:
        y, norm_1 = self.norm_1.forward(x, branch)
        branch, attention = self.attention.forward(y, document_start)
        y, norm_2 = self.norm_2.forward(norm_1.x, branch)
        return y, norm_1, attention, norm_2

    def backward(self, dx: Tensor, saved: Saved, document_start: Tensor | None) -> Tensor:
        """dx: of the sum of the block's two outputs. Returns that of the sum of its two inputs."""
        dy = self.mlp.backward(dx, saved.mlp)
        dx = self.norm_2.backward(dy, saved.norm_2, dresidual=dx)
        dy = self.attention.backward(dx, saved.attention, document_start)
        return self.norm_1.backward(dy, saved.norm_1, dresidual=dx)

    def decode(
        self, x: Tensor, branch: Tensor | None, cache: KeyValueCache, lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The forward for one new position per row, x (B, C), against the cache."""
        y, norm_1 = self.norm_1.forward(x, branch)
        y, norm_2 = self.norm_2.forward(norm_1.x, self.attention.decode(y, cache, lengths))
        return norm_2.x, self.mlp.forward(y)[0]
