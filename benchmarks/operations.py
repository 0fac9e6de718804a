"""What is timed: each operation with its inputs, its least cost, our way and PyTorch's.

An `Operation` says how to make its tensors, how `kernels` computes it forward and backward, and the
same as a plain function for autograd. Whatever is equal for all operations (who competes, how the
gradient is asked for) is in `providers.py`.

Costs are the mathematics' own: every input read once, every result written once, no operation
twice. Letters: B batch, T sequence, C width, H heads, F feed-forward, V vocabulary, N rows.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.adamw import adamw as functional_adamw

from benchmarks import machine

EPSILON = 1e-5
Tensors = dict[str, Any]


class Cost(NamedTuple):
    """Least arithmetic and least memory traffic of one call."""

    flops: float
    n_bytes: float


class Operation(NamedTuple):
    """See the module's text.

    make        generator -> tensors by name: inputs, upstream gradients, gradient buffers
    forward     (ops, tensors) -> results, the first ones comparable with `plain`'s
    backward    (ops, tensors, results of forward) -> gradients, in the order of `leaves`
    plain       PyTorch's way, of the tensors -> results
    leaves      names of the tensors that autograd differentiates by
    upstream    names of the gradients of `plain`'s results
    cost        direction -> Cost
    joint       forward and backward are one call (direction "forward+backward")
    """

    name: str
    shape: dict[str, int]
    dtype: str
    make: Callable[[torch.Generator], Tensors]
    forward: Callable[[ModuleType, Tensors], tuple]
    backward: Callable[[ModuleType, Tensors, tuple], tuple] | None
    plain: Callable[[Tensors], tuple]
    leaves: tuple[str, ...]
    upstream: tuple[str, ...]
    cost: dict[str, Cost]
    joint: bool = False


def normal(generator: torch.Generator, *shape: int, dtype: str, scale: float = 1.0) -> Tensor:
    """Random numbers, never zeros: on zeros hardware can be faster than it is."""
    x = torch.randn(shape, generator=generator, device=machine.device()) * scale
    return x.to(getattr(torch, dtype))


def buffer(*shape: int) -> Tensor:
    """A float32 gradient buffer, to be added to."""
    return torch.zeros(shape, device=machine.device())


def integers(generator: torch.Generator, high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=generator, device=machine.device())


def item_size(dtype: str) -> int:
    return getattr(torch, dtype).itemsize


def add_layer_norm(N: int, C: int, dtype: str) -> Operation:
    """x = residual + branch, y = layer norm of x; backward with the residual's gradient added."""
    s = item_size(dtype)

    def make(g: torch.Generator) -> Tensors:
        names = ("branch", "residual", "dy", "dresidual")
        t: Tensors = {name: normal(g, N, C, dtype=dtype) for name in names}
        t |= {name: normal(g, C, dtype=dtype) for name in ("weight", "bias")}
        return t | {"dweight": buffer(C), "dbias": buffer(C)}

    def forward(ops: ModuleType, t: Tensors) -> tuple:
        return ops.add_layer_norm_forward(
            t["branch"], t["residual"], t["weight"], t["bias"], EPSILON
        )

    def backward(ops: ModuleType, t: Tensors, saved: tuple) -> tuple:
        _, x, mean, rstd = saved
        dx = ops.layer_norm_backward(
            t["dy"], x, t["weight"], mean, rstd, t["dweight"], t["dbias"], t["dresidual"]
        )
        return dx, t["dweight"], t["dbias"]

    def plain(t: Tensors) -> tuple:
        x = t["residual"] + t["branch"]
        return F.layer_norm(x, (C,), t["weight"], t["bias"], EPSILON), x

    cost = {"forward": Cost(9 * N * C, 4 * N * C * s), "backward": Cost(15 * N * C, 4 * N * C * s)}
    return Operation(
        "add_layer_norm", {"N": N, "C": C}, dtype, make, forward, backward, plain,
        ("branch", "weight", "bias"), ("dy", "dresidual"), cost,
    )  # fmt: skip


def attention(B: int, T: int, H: int, D: int, dtype: str) -> Operation:
    """Causal attention on a packed projection, as the model calls it."""
    C, s = H * D, item_size(dtype)

    def make(g: torch.Generator) -> Tensors:
        qkv = normal(g, B, T, 3 * C, dtype=dtype)
        return {"qkv": qkv, "dout": normal(g, B, T, C, dtype=dtype)}

    def forward(ops: ModuleType, t: Tensors) -> tuple:
        return ops.attention_forward(t["qkv"], H, None)

    def backward(ops: ModuleType, t: Tensors, saved: tuple) -> tuple:
        return (ops.attention_backward(t["dout"], t["qkv"], *saved, H, None),)

    def plain(t: Tensors) -> tuple:
        q, k, v = t["qkv"].view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return (out.transpose(1, 2).reshape(B, T, C),)

    product = 2 * B * H * D * T * (T + 1) / 2  # one of QKᵀ, PV, ..., the visible half of it
    tensor = B * T * C * s
    cost = {
        "forward": Cost(2 * product, 4 * tensor),
        "backward": Cost(5 * product, 8 * tensor),
    }
    return Operation(
        "attention", {"B": B, "T": T, "H": H, "D": D}, dtype, make, forward, backward, plain,
        ("qkv",), ("dout",), cost,
    )  # fmt: skip


def bias_gelu(N: int, width: int, dtype: str) -> Operation:
    """gelu(h + b), tanh form; backward with the bias gradient."""
    s = item_size(dtype)

    def make(g: torch.Generator) -> Tensors:
        t: Tensors = {name: normal(g, N, width, dtype=dtype) for name in ("h", "dy")}
        return t | {"bias": normal(g, width, dtype=dtype), "dbias": buffer(width)}

    def forward(ops: ModuleType, t: Tensors) -> tuple:
        return (ops.bias_gelu_forward(t["h"], t["bias"]),)

    def backward(ops: ModuleType, t: Tensors, saved: tuple) -> tuple:
        return ops.bias_gelu_backward(t["dy"], t["h"], t["bias"], t["dbias"]), t["dbias"]

    def plain(t: Tensors) -> tuple:
        return (F.gelu(t["h"] + t["bias"], approximate="tanh"),)

    n = N * width
    cost = {"forward": Cost(12 * n, 2 * n * s), "backward": Cost(22 * n, 3 * n * s)}
    return Operation(
        "bias_gelu", {"N": N, "F": width}, dtype, make, forward, backward, plain,
        ("h", "bias"), ("dy",), cost,
    )  # fmt: skip


def linear(N: int, K: int, M: int, dtype: str) -> Operation:
    """y = x Wᵀ + b; our backward adds the weight gradient into a float32 buffer."""
    s = item_size(dtype)

    def make(g: torch.Generator) -> Tensors:
        t: Tensors = {"x": normal(g, N, K, dtype=dtype), "dy": normal(g, N, M, dtype=dtype)}
        t["weight"] = normal(g, M, K, dtype=dtype, scale=K**-0.5)
        return t | {"bias": normal(g, M, dtype=dtype), "dweight": buffer(M, K), "dbias": buffer(M)}

    def forward(ops: ModuleType, t: Tensors) -> tuple:
        return (ops.linear_forward(t["x"], t["weight"], t["bias"]),)

    def backward(ops: ModuleType, t: Tensors, saved: tuple) -> tuple:
        dx = ops.linear_backward(t["dy"], t["x"], t["weight"], t["dweight"], t["dbias"])
        return dx, t["dweight"], t["dbias"]

    def plain(t: Tensors) -> tuple:
        return (F.linear(t["x"], t["weight"], t["bias"]),)

    flops, x, w, y = 2 * N * M * K, N * K * s, M * K * s, N * M * s
    cost = {
        "forward": Cost(flops, x + w + y),
        "backward": Cost(2 * flops, 2 * x + w + y + M * K * 4),
    }
    return Operation(
        "linear", {"N": N, "K": K, "M": M}, dtype, make, forward, backward, plain,
        ("x", "weight", "bias"), ("dy",), cost,
    )  # fmt: skip


def embedding(B: int, T: int, C: int, V: int, dtype: str) -> Operation:
    """Token plus position; the gradient of both tables."""
    s = item_size(dtype)

    def make(g: torch.Generator) -> Tensors:
        t: Tensors = {"tokens": integers(g, V, B, T), "dx": normal(g, B, T, C, dtype=dtype)}
        t |= {"table": normal(g, V, C, dtype=dtype), "places": normal(g, T, C, dtype=dtype)}
        return t | {"dtable": buffer(V, C), "dplaces": buffer(T, C)}

    def forward(ops: ModuleType, t: Tensors) -> tuple:
        return (ops.embedding_forward(t["tokens"], t["table"], t["places"]),)

    def backward(ops: ModuleType, t: Tensors, saved: tuple) -> tuple:
        ops.embedding_backward(t["dx"], t["tokens"], t["dtable"], t["dplaces"])
        return t["dtable"], t["dplaces"]

    def plain(t: Tensors) -> tuple:
        return (F.embedding(t["tokens"], t["table"]) + t["places"],)

    n, rows = B * T * C, min(B * T, V) * C
    cost = {
        "forward": Cost(n, 2 * n * s + T * C * s + 8 * B * T),
        # the rows of the table that occur are read and written, in float32
        "backward": Cost(2 * n, n * s + 8 * rows + 8 * T * C + 8 * B * T),
    }
    return Operation(
        "embedding", {"B": B, "T": T, "C": C, "V": V}, dtype, make, forward, backward, plain,
        ("table", "places"), ("dx",), cost,
    )  # fmt: skip


def cross_entropy(N: int, V: int, dtype: str) -> Operation:
    """Softmax cross-entropy from the logits to their gradient, which ours writes over them."""
    s = item_size(dtype)

    def make(g: torch.Generator) -> Tensors:
        one = torch.ones((), device=machine.device())
        return {"logits": normal(g, N, V, dtype=dtype), "targets": integers(g, V, N), "scale": one}

    def both(ops: ModuleType, t: Tensors) -> tuple:
        ops.cross_entropy_forward_backward(t["logits"], t["targets"], t["scale"], V)
        return (t["logits"],)

    def plain(t: Tensors) -> tuple:
        return (F.cross_entropy(t["logits"].float(), t["targets"], reduction="sum"),)

    # read for the sum, read again for the gradient, written: the row does not fit on chip
    cost = {"forward+backward": Cost(8 * N * V, 3 * N * V * s)}
    return Operation(
        "cross_entropy", {"N": N, "V": V}, dtype, make, both, None, plain,
        ("logits",), ("scale",), cost, joint=True,
    )  # fmt: skip


def linear_cross_entropy(N: int, C: int, V: int, dtype: str) -> Operation:
    """Output projection and loss, with the gradients of x and of the weight."""
    s = item_size(dtype)

    def make(g: torch.Generator) -> Tensors:
        t: Tensors = {"x": normal(g, N, C, dtype=dtype), "targets": integers(g, V, N)}
        t["weight"] = normal(g, V, C, dtype=dtype, scale=0.02)
        scale = torch.full((), 1 / N, device=machine.device())
        return t | {"dweight": buffer(V, C), "scale": scale}

    def both(ops: ModuleType, t: Tensors) -> tuple:
        _, dx = ops.linear_cross_entropy_forward_backward(
            t["x"], t["weight"], t["targets"], t["scale"], t["dweight"], V
        )
        return dx, t["dweight"]

    def plain(t: Tensors) -> tuple:
        logits = F.linear(t["x"], t["weight"])
        return (F.cross_entropy(logits.float(), t["targets"], reduction="sum"),)

    n_bytes = 2 * N * C * s + V * C * (s + 8)
    cost = {"forward+backward": Cost(6 * N * V * C, n_bytes)}
    return Operation(
        "linear_cross_entropy", {"N": N, "C": C, "V": V}, dtype, make, both, None, plain,
        ("x", "weight"), ("scale",), cost, joint=True,
    )  # fmt: skip


def decode_attention(B: int, T: int, H: int, D: int, dtype: str) -> Operation:
    """One new position per row against T cached keys, all of them in use."""
    C, s = H * D, item_size(dtype)

    def make(g: torch.Generator) -> Tensors:
        t: Tensors = {name: normal(g, B, T, C, dtype=dtype) for name in "kv"}
        full = torch.full((B,), T, device=machine.device())
        return t | {"q": normal(g, B, C, dtype=dtype), "lengths": full}

    def forward(ops: ModuleType, t: Tensors) -> tuple:
        return (ops.decode_attention(t["q"], t["k"], t["v"], t["lengths"], H),)

    def plain(t: Tensors) -> tuple:
        q, k, v = (t[name].reshape(B, -1, H, D).transpose(1, 2) for name in "qkv")
        return (F.scaled_dot_product_attention(q, k, v).reshape(B, C),)

    cost = {"forward": Cost(4 * B * T * C, 2 * B * T * C * s)}
    return Operation(
        "decode_attention", {"B": B, "T": T, "H": H, "D": D}, dtype, make, forward, None, plain,
        (), (), cost,
    )  # fmt: skip


def gradient_norm(P: int) -> Operation:
    """The L2 norm over one flat buffer."""

    def make(g: torch.Generator) -> Tensors:
        return {"gradients": normal(g, P, dtype="float32")}

    def forward(ops: ModuleType, t: Tensors) -> tuple:
        return (ops.gradient_norm(t["gradients"]),)

    def plain(t: Tensors) -> tuple:
        return (torch.nn.utils.get_total_norm([t["gradients"]]),)

    cost = {"forward": Cost(2 * P, 4 * P)}
    return Operation("gradient_norm", {"P": P}, "float32", make, forward, None, plain, (), (), cost)


def adamw(P: int, dtype: str) -> Operation:
    """One update of P weights; for bfloat16 weights with their float32 masters.

    PyTorch's fused AdamW updates float32 weights and leaves the bfloat16 copy to autocast.
    """
    low = dtype != "float32"

    def make(g: torch.Generator) -> Tensors:
        names = ("master", "gradients", "exp_avg")
        t: Tensors = {name: normal(g, P, dtype="float32") for name in names}
        t |= {"exp_avg_sq": t["exp_avg"].square(), "weights": t["master"].to(getattr(torch, dtype))}
        scalars = {"step": 10.0, "steps_done": 9.0, "learning_rate": 1e-3, "clip": 1.0}
        t |= {name: torch.tensor(x, device=machine.device()) for name, x in scalars.items()}
        return t | {"finite": torch.tensor(True, device=machine.device())}

    def forward(ops: ModuleType, t: Tensors) -> tuple:
        master = t["master"] if low else None
        ops.adamw_update(
            t["weights"], master, t["gradients"], t["exp_avg"], t["exp_avg_sq"], t["step"],
            t["learning_rate"], t["clip"], t["finite"], 0.9, 0.95, 1e-8, 0.1,
        )  # fmt: skip
        return (t["master"] if low else t["weights"],)

    def plain(t: Tensors) -> tuple:
        functional_adamw(
            [t["master"]], [t["gradients"]], [t["exp_avg"]], [t["exp_avg_sq"]], [],
            [t["steps_done"]], fused=True, amsgrad=False, beta1=0.9, beta2=0.95, lr=1e-3,
            weight_decay=0.1, eps=1e-8, maximize=False,
        )  # fmt: skip
        return (t["master"],)

    cost = {"update": Cost(16 * P, (30 if low else 28) * P)}
    return Operation("adamw", {"P": P}, dtype, make, forward, None, plain, (), (), cost)
