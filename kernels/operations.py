"""Each operation described once: inputs, forward and backward, PyTorch's own way, least cost.

The self-check runs these descriptions with a backend and with the reference, the tests compare them
with autograd, and the benchmarks time them. Dimensions are those of `Shapes`.

An operation's tensors are a dictionary by name. Gradients of weights are buffers that are added to:
they start at 1, so that overwriting one is found. Costs are the mathematics' own: every input read
once, every result written once, nothing computed twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.adamw import adamw as functional_adamw

from mantrans.kernels import reference
from mantrans.kernels.reference import IGNORE_INDEX

EPS = 1e-5
BETAS, ADAM_EPS, WEIGHT_DECAY = (0.9, 0.95), 1e-8, 0.1
LEARNING_RATE, CLIP, STEP = 1e-2, 0.5, 3.0
MOMENTUM, MUON_SCALE = 0.95, 0.2
Inputs = Mapping[str, Any]
Results = dict[str, Any]


class Shapes(NamedTuple):
    """Sizes: B batch, T sequence, H heads (H_kv of keys and values) of width D, C model width,
    F feed-forward width, V vocabulary (Vp padded), N rows, P parameters."""

    B: int = 1
    T: int = 1
    H: int = 1
    H_kv: int = 1
    D: int = 1
    C: int = 1
    F: int = 1
    V: int = 1
    Vp: int = 1
    N: int = 1
    P: int = 1


class Cost(NamedTuple):
    """Least arithmetic and least memory traffic of one call."""

    flops: float
    n_bytes: float


class Draw:
    """Random inputs, the same for the same seed: normal numbers unless said otherwise. Never
    zeros: on zeros hardware can be faster than it is."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int = 20201) -> None:
        self.dtype, self.device = dtype, device
        self.wide = reference.wide_dtype(dtype)
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        x = torch.randn(*shape, device=self.device, dtype=self.wide, generator=self.generator)
        return (x * std).to(dtype or self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, device=self.device, generator=self.generator)

    def number(self, value: float) -> Tensor:
        return torch.tensor(value, device=self.device, dtype=self.wide)

    def buffer(self, *shape: int) -> Tensor:
        """A gradient buffer that already holds something."""
        return self.number(1).repeat(*shape)

    def targets(self, high: int, n: int) -> Tensor:
        """Labels, every fifth of them ignored."""
        targets = self.integers(high, n)
        targets[::5] = IGNORE_INDEX
        return targets


class Operation:
    """What is common. A subclass describes one operation.

    calls       the backend's functions that `forward` and `backward` call
    leaves      names of the inputs that have a gradient; `backward` gives "d" + name for each
    upstream    name of a result of `plain` -> name of the input that holds its gradient
    vectors     names of the gradients that training collects in partial sums
    """

    name: ClassVar[str]
    dims: ClassVar[tuple[str, ...]]
    calls: ClassVar[tuple[str, ...]]
    leaves: ClassVar[tuple[str, ...]] = ()
    upstream: ClassVar[Mapping[str, str]] = {}
    vectors: ClassVar[tuple[str, ...]] = ()

    def inputs(self, s: Shapes, draw: Draw) -> Inputs:
        """The tensors of one call by name, upstream gradients and gradient buffers included."""
        raise NotImplementedError

    def forward(self, ops: Any, i: Inputs) -> Results:
        """Run the backend `ops`; where forward and backward are one call, both."""
        raise NotImplementedError

    def backward(self, ops: Any, i: Inputs, saved: Results) -> Results:
        """The gradients; saved: what `forward` gave."""
        raise NotImplementedError

    def plain(self, i: Inputs) -> Results:
        """PyTorch's own way, for autograd; names as in `forward`."""
        raise NotImplementedError

    def cost(self, s: Shapes, size: int) -> dict[str, Cost]:
        """Direction -> cost; size: bytes of one number."""
        raise NotImplementedError


class Embedding(Operation):
    """Token plus position; the gradient of both tables."""

    name, dims = "embedding", ("B", "T", "C", "V")
    calls: ClassVar[tuple[str, ...]] = ("embedding_forward", "embedding_backward")
    leaves: ClassVar[tuple[str, ...]] = ("token_table", "position_table")
    upstream: ClassVar[Mapping[str, str]] = {"x": "dx"}

    def inputs(self, s: Shapes, draw: Draw) -> Inputs:
        return {
            "tokens": draw.integers(s.V, s.B, s.T),
            "token_table": draw.normal(s.Vp, s.C),
            "position_table": draw.normal(s.T, s.C),
            "dx": draw.normal(s.B, s.T, s.C),
            "dtoken_table": draw.buffer(s.Vp, s.C),
            "dposition_table": draw.buffer(s.T, s.C),
        }

    def forward(self, ops: Any, i: Inputs) -> Results:
        x = ops.embedding_forward(i["tokens"], *(i[name] for name in self.leaves))
        return {"x": x}

    def backward(self, ops: Any, i: Inputs, saved: Results) -> Results:
        gradients = {f"d{name}": i[f"d{name}"] for name in self.leaves}
        ops.embedding_backward(i["dx"], i["tokens"], *gradients.values())
        return gradients

    def plain(self, i: Inputs) -> Results:
        return {"x": F.embedding(i["tokens"], i["token_table"]) + i["position_table"]}

    def cost(self, s: Shapes, size: int) -> dict[str, Cost]:
        n, rows = s.B * s.T * s.C, min(s.B * s.T, s.V) * s.C
        tokens, positions = 8 * s.B * s.T, s.T * s.C
        return {
            "forward": Cost(n, 2 * n * size + positions * size + tokens),
            # the rows of the table that occur are read and written, in float32
            "backward": Cost(2 * n, n * size + 8 * rows + 8 * positions + tokens),
        }


class TokenEmbedding(Embedding):
    """Without learned positions."""

    name = "embedding without positions"
    leaves = ("token_table",)

    def plain(self, i: Inputs) -> Results:
        return {"x": F.embedding(i["tokens"], i["token_table"])}

    def cost(self, s: Shapes, size: int) -> dict[str, Cost]:
        n, rows, tokens = s.B * s.T * s.C, min(s.B * s.T, s.V) * s.C, 8 * s.B * s.T
        return {
            "forward": Cost(0, 2 * n * size + tokens),
            "backward": Cost(n, n * size + 8 * rows + tokens),
        }


class Linear(Operation):
    """y = x Wᵀ + b; backward adds the weight gradient into a float32 buffer."""

    name, dims = "linear", ("N", "C", "F")
    calls: ClassVar[tuple[str, ...]] = ("linear_forward", "linear_backward")
    leaves, upstream = ("x", "weight", "bias"), {"y": "dy"}
    vectors: ClassVar[tuple[str, ...]] = ("dbias",)

    def inputs(self, s: Shapes, draw: Draw) -> Inputs:
        return {
            "x": draw.normal(s.N, s.C),
            "weight": draw.normal(s.F, s.C, std=s.C**-0.5),
            "bias": draw.normal(s.F),
            "dy": draw.normal(s.N, s.F),
            "dweight": draw.buffer(s.F, s.C),
            "dbias": draw.buffer(s.F),
        }

    def forward(self, ops: Any, i: Inputs) -> Results:
        return {"y": ops.linear_forward(i["x"], i["weight"], i["bias"])}

    def backward(self, ops: Any, i: Inputs, saved: Results) -> Results:
        dweight, dbias = i["dweight"], i["dbias"]
        dx = ops.linear_backward(i["dy"], i["x"], i["weight"], dweight, dbias)
        return {"dx": dx, "dweight": dweight, "dbias": dbias}

    def plain(self, i: Inputs) -> Results:
        return {"y": F.linear(i["x"], i["weight"], i["bias"])}

    def cost(self, s: Shapes, size: int) -> dict[str, Cost]:
        flops = 2 * s.N * s.C * s.F
        x, weight, y = s.N * s.C * size, s.F * s.C * size, s.N * s.F * size
        return {
            "forward": Cost(flops, x + weight + y),
            "backward": Cost(2 * flops, 2 * x + weight + y + 4 * s.F * s.C),
        }


class AddLayerNorm(Operation):
    """x = residual + branch, y = layer norm of x; backward adds what x gets from elsewhere."""

    name, dims = "add_layer_norm", ("N", "C")
    calls: ClassVar[tuple[str, ...]] = ("add_layer_norm_forward", "layer_norm_backward")
    leaves, upstream = ("branch", "weight", "bias"), {"y": "dy", "x": "dx"}
    vectors: ClassVar[tuple[str, ...]] = ("dweight", "dbias")

    def inputs(self, s: Shapes, draw: Draw) -> Inputs:
        return {
            "branch": draw.normal(s.N, s.C),
            "residual": draw.normal(s.N, s.C) + 1,
            "weight": draw.normal(s.C),
            "bias": draw.normal(s.C),
            "dy": draw.normal(s.N, s.C),
            "dx": draw.normal(s.N, s.C),
            "dweight": draw.buffer(s.C),
            "dbias": draw.buffer(s.C),
        }

    def forward(self, ops: Any, i: Inputs) -> Results:
        results = ops.add_layer_norm_forward(
            i["branch"], i["residual"], i["weight"], i["bias"], EPS
        )
        return dict(zip(("y", "x", "mean", "rstd"), results, strict=True))

    def backward(self, ops: Any, i: Inputs, saved: Results) -> Results:
        vectors = {name: i[name] for name in self.vectors}
        dx = ops.layer_norm_backward(
            i["dy"], saved["x"], i["weight"], saved["mean"], saved["rstd"],
            i["dweight"], i["dbias"], i["dx"], vectors.get("dbranch_bias"),
        )  # fmt: skip
        return {f"d{self.leaves[0]}": dx, **vectors}

    def plain(self, i: Inputs) -> Results:
        x = i["residual"] + i["branch"]
        return {"y": F.layer_norm(x, x.shape[-1:], i["weight"], i["bias"], EPS), "x": x}

    def cost(self, s: Shapes, size: int) -> dict[str, Cost]:
        n = s.N * s.C
        return {"forward": Cost(9 * n, 4 * n * size), "backward": Cost(15 * n, 4 * n * size)}


class LayerNorm(AddLayerNorm):
    """Without a branch, as a model begins. Backward also gives the bias that ended the branch its
    gradient, the sum of dx over the rows."""

    name = "layer_norm"
    calls: ClassVar[tuple[str, ...]] = ("layer_norm_forward", "layer_norm_backward")
    leaves = ("residual", "weight", "bias")
    vectors: ClassVar[tuple[str, ...]] = ("dweight", "dbias", "dbranch_bias")

    def inputs(self, s: Shapes, draw: Draw) -> Inputs:
        return {**super().inputs(s, draw), "dbranch_bias": draw.buffer(s.C)}

    def forward(self, ops: Any, i: Inputs) -> Results:
        y, mean, rstd = ops.layer_norm_forward(i["residual"], i["weight"], i["bias"], EPS)
        return {"y": y, "x": i["residual"], "mean": mean, "rstd": rstd}

    def plain(self, i: Inputs) -> Results:
        x = i["residual"]
        return {"y": F.layer_norm(x, x.shape[-1:], i["weight"], i["bias"], EPS), "x": x}


class Rotary(Operation):
    """RoPE of the heads of q and k in a packed projection, which it may overwrite; v stays."""

    name, dims = "rotary", ("B", "T", "H", "D")
    calls: ClassVar[tuple[str, ...]] = ("rotary_forward", "rotary_backward")
    leaves: ClassVar[tuple[str, ...]] = ("qkv",)
    upstream: ClassVar[Mapping[str, str]] = {"rotated": "drotated"}

    def inputs(self, s: Shapes, draw: Draw) -> Inputs:
        cos, sin = rotations(s.T, s.D, draw)
        return {
            "qkv": draw.normal(s.B, s.T, (s.H + 2 * s.H_kv) * s.D),
            "drotated": draw.normal(s.B, s.T, (s.H + 2 * s.H_kv) * s.D),
            "cos": cos,
            "sin": sin,
            "heads": (s.H, s.H_kv),
        }

    def forward(self, ops: Any, i: Inputs) -> Results:
        return {"rotated": ops.rotary_forward(i["qkv"], i["cos"], i["sin"], *i["heads"])}

    def backward(self, ops: Any, i: Inputs, saved: Results) -> Results:
        return {"dqkv": ops.rotary_backward(i["drotated"], i["cos"], i["sin"], *i["heads"])}

    def plain(self, i: Inputs) -> Results:
        q, k, v = split_heads(i["qkv"], *i["heads"])
        return {"rotated": rotated_and_packed(q, k, v, i)}

    def cost(self, s: Shapes, size: int) -> dict[str, Cost]:
        n, table = s.B * s.T * (s.H + s.H_kv) * s.D, 4 * s.T * s.D
        cost = Cost(3 * n, 2 * n * size + table)
        return {"forward": cost, "backward": cost}


class NormRotary(Rotary):
    """RMS norm of each head of q and k, then RoPE, in one pass; v is copied."""

    name = "norm_rotary"
    calls: ClassVar[tuple[str, ...]] = ("norm_rotary_forward", "norm_rotary_backward")
    leaves = ("qkv", "q_weight", "k_weight")
    vectors: ClassVar[tuple[str, ...]] = ("dq_weight", "dk_weight")

    def inputs(self, s: Shapes, draw: Draw) -> Inputs:
        return {
            **super().inputs(s, draw),
            "q_weight": draw.normal(s.D),
            "k_weight": draw.normal(s.D),
            "dq_weight": draw.buffer(s.D),
            "dk_weight": draw.buffer(s.D),
        }

    def forward(self, ops: Any, i: Inputs) -> Results:
        weights, angles = (i["q_weight"], i["k_weight"]), (i["cos"], i["sin"])
        rotated, rstd = ops.norm_rotary_forward(i["qkv"], *weights, *angles, EPS, *i["heads"])
        return {"rotated": rotated, "rstd": rstd}

    def backward(self, ops: Any, i: Inputs, saved: Results) -> Results:
        dqkv = ops.norm_rotary_backward(
            i["drotated"], i["qkv"], i["q_weight"], i["k_weight"], saved["rstd"],
            i["cos"], i["sin"], i["dq_weight"], i["dk_weight"], *i["heads"],
        )  # fmt: skip
        return {"dqkv": dqkv, "dq_weight": i["dq_weight"], "dk_weight": i["dk_weight"]}

    def plain(self, i: Inputs) -> Results:
        q, k, v = split_heads(i["qkv"], *i["heads"])
        q, k = (
            F.rms_norm(x, x.shape[-1:], weight, EPS)
            for x, weight in ((q, i["q_weight"]), (k, i["k_weight"]))
        )
        return {"rotated": rotated_and_packed(q, k, v, i)}

    def cost(self, s: Shapes, size: int) -> dict[str, Cost]:
        turned, table = s.B * s.T * (s.H + s.H_kv) * s.D, 4 * s.T * s.D
        v = s.B * s.T * s.H_kv * s.D
        rstd = 4 * turned // s.D
        return {
            "forward": Cost(7 * turned, 2 * (turned + v) * size + table + rstd),
            # written over the upstream gradient, in which that of v lies already
            "backward": Cost(13 * turned, 3 * turned * size + table + rstd),
        }


def rotations(T: int, D: int, draw: Draw) -> tuple[Tensor, Tensor]:
    """cos and sin (T, D/2) of position · 10,000^(-2i/D), in the dtype in which sums are formed."""
    frequency = 10_000.0 ** -(torch.arange(0, D, 2, dtype=torch.float64) / D)
    angle = torch.arange(T, dtype=torch.float64)[:, None] * frequency
    cos, sin = (f(angle).to(draw.device, draw.wide) for f in (torch.cos, torch.sin))
    return cos, sin


def rotated_and_packed(q: Tensor, k: Tensor, v: Tensor, i: Inputs) -> Tensor:
    """RoPE as PyTorch programs write it, in the layout of halves: x cos + (-x_2, x_1) sin.
    q, k, v (B, heads, T, D) -> (B, T, (H + 2 H_kv)·D)."""
    cos, sin = (torch.cat([i[name]] * 2, -1).to(q.dtype) for name in ("cos", "sin"))

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    return torch.cat([turned(q), turned(k), v], 1).transpose(1, 2).flatten(2)


class AddRmsNorm(Operation):
    """x = residual + branch, y = RMS norm of x; backward adds what x gets from elsewhere."""

    name, dims = "add_rms_norm", ("N", "C")
    calls: ClassVar[tuple[str, ...]] = ("add_rms_norm_forward", "rms_norm_backward")
    leaves, upstream = ("branch", "weight"), {"y": "dy", "x": "dx"}
    vectors: ClassVar[tuple[str, ...]] = ("dweight",)

    def inputs(self, s: Shapes, draw: Draw) -> Inputs:
        return {
            "branch": draw.normal(s.N, s.C),
            "residual": draw.normal(s.N, s.C) + 1,
            "weight": draw.normal(s.C),
            "dy": draw.normal(s.N, s.C),
            "dx": draw.normal(s.N, s.C),
            "dweight": draw.buffer(s.C),
        }

    def forward(self, ops: Any, i: Inputs) -> Results:
        results = ops.add_rms_norm_forward(i["branch"], i["residual"], i["weight"], EPS)
        return dict(zip(("y", "x", "rstd"), results, strict=True))

    def backward(self, ops: Any, i: Inputs, saved: Results) -> Results:
        vectors = {name: i[name] for name in self.vectors}
        dx = ops.rms_norm_backward(
            i["dy"], saved["x"], i["weight"], saved["rstd"],
            i["dweight"], i["dx"], vectors.get("dbranch_bias"),
        )  # fmt: skip
        return {f"d{self.leaves[0]}": dx, **vectors}

    def plain(self, i: Inputs) -> Results:
        x = i["residual"] + i["branch"]
        return {"y": F.rms_norm(x, x.shape[-1:], i["weight"], EPS), "x": x}

    def cost(self, s: Shapes, size: int) -> dict[str, Cost]:
        n = s.N * s.C
        return {"forward": Cost(5 * n, 4 * n * size), "backward": Cost(11 * n, 4 * n * size)}


class RmsNorm(AddRmsNorm):
    """Without a branch, and with the gradient of the bias that ended it, as in `LayerNorm`."""

    name = "rms_norm"
    calls: ClassVar[tuple[str, ...]] = ("rms_norm_forward", "rms_norm_backward")
    leaves = ("residual", "weight")
    vectors: ClassVar[tuple[str, ...]] = ("dweight", "dbranch_bias")

    def inputs(self, s: Shapes, draw: Draw) -> Inputs:
        return {**super().inputs(s, draw), "dbranch_bias": draw.buffer(s.C)}

    def forward(self, ops: Any, i: Inputs) -> Results:
        y, rstd = ops.rms_norm_forward(i["residual"], i["weight"], EPS)
        return {"y": y, "x": i["residual"], "rstd": rstd}

    def plain(self, i: Inputs) -> Results:
        x = i["residual"]
        return {"y": F.rms_norm(x, x.shape[-1:], i["weight"], EPS), "x": x}


class Attention(Operation):
    """Causal attention on a packed projection, as the model calls it."""

    name, dims = "attention", ("B", "T", "H", "D")
    calls: ClassVar[tuple[str, ...]] = ("attention_forward", "attention_backward")
    leaves, upstream = ("qkv",), {"out": "dout"}

    def inputs(self, s: Shapes, draw: Draw) -> Inputs:
        return {
            "qkv": draw.normal(s.B, s.T, (s.H + 2 * s.H_kv) * s.D),
            "dout": draw.normal(s.B, s.T, s.H * s.D),
            "heads": (s.H, s.H_kv),
            "starts": None,
        }

    def forward(self, ops: Any, i: Inputs) -> Results:
        H, H_kv = i["heads"]
        out, saved = ops.attention_forward(i["qkv"], H, i["starts"], H_kv)
        return {"out": out, "saved": saved}

    def backward(self, ops: Any, i: Inputs, saved: Results) -> Results:
        H, H_kv = i["heads"]
        dqkv = ops.attention_backward(
            i["dout"], i["qkv"], saved["out"], saved["saved"], H, i["starts"], H_kv
        )
        return {"dqkv": dqkv}

    def plain(self, i: Inputs) -> Results:
        q, k, v = split_heads(i["qkv"], *i["heads"])
        mask = None if i["starts"] is None else visible(i["starts"])
        out = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
        )
        return {"out": out.transpose(1, 2).flatten(2)}

    def cost(self, s: Shapes, size: int) -> dict[str, Cost]:
        product = s.B * s.H * s.D * s.T * (s.T + 1)  # one of QKᵀ, PV, ..., its visible half
        query = s.B * s.T * s.H * s.D * size
        all_of_them = 2 * query + 2 * query * s.H_kv / s.H  # q, k, v and out, or their gradients
        return {
            "forward": Cost(2 * product, all_of_them),
            "backward": Cost(5 * product, 2 * all_of_them),
        }


class DocumentAttention(Attention):
    """Attention that ends where a document begins: three documents a row."""

    name = "attention with documents"

    def inputs(self, s: Shapes, draw: Draw) -> Inputs:
        starts = torch.zeros(s.B, s.T, dtype=torch.int32, device=draw.device)
        starts[:, s.T // 3 :] = s.T // 3
        starts[:, s.T // 2 :] = s.T // 2
        return {**super().inputs(s, draw), "starts": starts}


class WindowAttention(Attention):
    """Attention to the last few keys, a quarter of the sequence."""

    name = "attention with a window"

    def inputs(self, s: Shapes, draw: Draw) -> Inputs:
        tokens = torch.zeros(s.B, s.T, dtype=torch.int64, device=draw.device)
        starts = reference.window_starts(tokens, self.window(s))
        return {**super().inputs(s, draw), "starts": starts}

    def window(self, s: Shapes) -> int:
        return max(1, s.T // 4)

    def cost(self, s: Shapes, size: int) -> dict[str, Cost]:
        W = self.window(s)
        seen = (W * s.T - W * (W - 1) / 2) / (s.T * (s.T + 1) / 2)  # of the causal scores
        return {
            direction: Cost(cost.flops * seen, cost.n_bytes)
            for direction, cost in super().cost(s, size).items()
        }


def split_heads(qkv: Tensor, H: int, H_kv: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, (H + 2 H_kv) D) -> q (B, H, T, D) and k, v (B, H_kv, T, D), as views."""
    D = qkv.shape[-1] // (H + 2 * H_kv)
    q, k, v = qkv.unflatten(-1, (-1, D)).transpose(1, 2).split([H, H_kv, H_kv], dim=1)
    return q, k, v


def visible(starts: Tensor) -> Tensor:
    """Document starts (B, T) -> (B, 1, T, T) bool: which keys a query sees."""
    place = torch.arange(starts.shape[1], device=starts.device)
    return ((place <= place[:, None]) & (place >= starts[:, :, None]))[:, None]


class DecodeAttention(Operation):
    """One new position per row against its cached keys, all of them in use."""

    name, dims = "decode_attention", ("B", "T", "H", "D")
    calls: ClassVar[tuple[str, ...]] = ("decode_attention",)

    def inputs(self, s: Shapes, draw: Draw) -> Inputs:
        return {
            "q": draw.normal(s.B, s.H * s.D),
            "k": draw.normal(s.B, s.T, s.H_kv * s.D),
            "v": draw.normal(s.B, s.T, s.H_kv * s.D),
            "lengths": torch.full((s.B,), s.T, device=draw.device),
            "heads": (s.H, s.H_kv),
        }

    def forward(self, ops: Any, i: Inputs) -> Results:
        return {"out": ops.decode_attention(i["q"], i["k"], i["v"], i["lengths"], *i["heads"])}

    def plain(self, i: Inputs) -> Results:
        H, H_kv = i["heads"]
        q = i["q"].unflatten(-1, (H, 1, -1))
        k, v = (i[name].unflatten(-1, (H_kv, -1)).transpose(1, 2) for name in "kv")
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=H_kv != H)
        return {"out": out.flatten(1)}

    def cost(self, s: Shapes, size: int) -> dict[str, Cost]:
        n = s.B * s.T * s.H_kv * s.D
        return {"forward": Cost(4 * n * s.H / s.H_kv, 2 * n * size)}


class RaggedDecodeAttention(DecodeAttention):
    """Rows of every length; what lies beyond a row's length was never written."""

    name = "decode_attention of ragged rows"

    def inputs(self, s: Shapes, draw: Draw) -> Inputs:
        i = {**super().inputs(s, draw), "lengths": draw.integers(s.T, s.B) + 1}
        i["lengths"][0], i["lengths"][-1] = 1, s.T
        unwritten = torch.arange(s.T, device=draw.device) >= i["lengths"][:, None]
        i["k"][unwritten] = i["v"][unwritten] = math.nan
        return i

    def plain(self, i: Inputs) -> Results:
        position = torch.arange(i["k"].shape[1], device=i["lengths"].device)
        return {"out": masked_decode(i, position < i["lengths"][:, None])}


class WindowDecodeAttention(DecodeAttention):
    """Rows of every length that see a quarter of the cache; beyond it nothing is finite."""

    name = "decode_attention with a window"

    def inputs(self, s: Shapes, draw: Draw) -> Inputs:
        i = {**super().inputs(s, draw), "lengths": draw.integers(s.T, s.B) + 1}
        i["lengths"][0], i["lengths"][-1] = 1, s.T
        i["window"] = max(1, s.T // 4)
        i["k"][~self.seen(i)] = i["v"][~self.seen(i)] = math.nan
        return i

    def seen(self, i: Inputs) -> Tensor:
        """(B, T) bool: the positions that a row sees."""
        lengths = i["lengths"][:, None]
        position = torch.arange(i["k"].shape[1], device=lengths.device)
        return (position < lengths) & (position >= lengths - i["window"])

    def forward(self, ops: Any, i: Inputs) -> Results:
        out = ops.decode_attention(
            i["q"], i["k"], i["v"], i["lengths"], *i["heads"], window=i["window"]
        )
        return {"out": out}

    def plain(self, i: Inputs) -> Results:
        return {"out": masked_decode(i, self.seen(i))}

    def cost(self, s: Shapes, size: int) -> dict[str, Cost]:
        return super().cost(s._replace(T=max(1, s.T // 4)), size)


def masked_decode(i: Inputs, seen: Tensor) -> Tensor:
    """PyTorch's own way to decode rows that see some positions and not others: seen (B, T) bool."""
    k, v = (i[name].masked_fill(~seen[..., None], 0) for name in "kv")
    (H, H_kv), q = i["heads"], i["q"]
    k, v = (x.unflatten(-1, (H_kv, -1)).transpose(1, 2) for x in (k, v))
    out = F.scaled_dot_product_attention(
        q.unflatten(-1, (H, 1, -1)), k, v, seen[:, None, None], enable_gqa=H_kv != H
    )
    return out.flatten(1)


class BiasGelu(Operation):
    """gelu(h + b), tanh form; backward with the bias gradient."""

    name, dims = "bias_gelu", ("N", "F")
    calls: ClassVar[tuple[str, ...]] = ("bias_gelu_forward", "bias_gelu_backward")
    leaves, upstream = ("h", "bias"), {"y": "dy"}
    vectors: ClassVar[tuple[str, ...]] = ("dbias",)

    def inputs(self, s: Shapes, draw: Draw) -> Inputs:
        return {
            "h": draw.normal(s.N, s.F),
            "bias": draw.normal(s.F),
            "dy": draw.normal(s.N, s.F),
            "dbias": draw.buffer(s.F),
        }

    def forward(self, ops: Any, i: Inputs) -> Results:
        return {"y": ops.bias_gelu_forward(i["h"], i["bias"])}

    def backward(self, ops: Any, i: Inputs, saved: Results) -> Results:
        dh = ops.bias_gelu_backward(i["dy"], i["h"], i["bias"], i["dbias"])
        return {"dh": dh, "dbias": i["dbias"]}

    def plain(self, i: Inputs) -> Results:
        h = i["h"] if i["bias"] is None else i["h"] + i["bias"]
        return {"y": F.gelu(h, approximate="tanh")}

    def cost(self, s: Shapes, size: int) -> dict[str, Cost]:
        n = s.N * s.F
        return {"forward": Cost(12 * n, 2 * n * size), "backward": Cost(22 * n, 3 * n * size)}


class SwiGLU(Operation):
    """silu(gate) · up of the packed product (gate, up); backward recomputes the sigmoid."""

    name, dims = "swiglu", ("N", "F")
    calls: ClassVar[tuple[str, ...]] = ("swiglu_forward", "swiglu_backward")
    leaves, upstream = ("h",), {"y": "dy"}

    def inputs(self, s: Shapes, draw: Draw) -> Inputs:
        return {"h": draw.normal(s.N, 2 * s.F), "dy": draw.normal(s.N, s.F)}

    def forward(self, ops: Any, i: Inputs) -> Results:
        return {"y": ops.swiglu_forward(i["h"])}

    def backward(self, ops: Any, i: Inputs, saved: Results) -> Results:
        return {"dh": ops.swiglu_backward(i["dy"], i["h"])}

    def plain(self, i: Inputs) -> Results:
        gate, up = i["h"].chunk(2, dim=-1)
        return {"y": F.silu(gate) * up}

    def cost(self, s: Shapes, size: int) -> dict[str, Cost]:
        n = s.N * s.F
        return {"forward": Cost(5 * n, 3 * n * size), "backward": Cost(10 * n, 5 * n * size)}


class CrossEntropy(Operation):
    """Softmax cross-entropy in two calls; the gradient is written over the logits."""

    name, dims = "cross_entropy in two calls", ("N", "V")
    calls: ClassVar[tuple[str, ...]] = ("cross_entropy_forward", "cross_entropy_backward")
    leaves, upstream = ("logits",), {"loss": "scale"}

    def inputs(self, s: Shapes, draw: Draw) -> Inputs:
        return {
            "logits": draw.normal(s.N, s.Vp, std=2.0),
            "targets": draw.targets(s.V, s.N),
            "scale": draw.number(1 / s.N),
            "V": s.V,
        }

    def forward(self, ops: Any, i: Inputs) -> Results:
        losses, saved = ops.cross_entropy_forward(i["logits"], i["targets"], i["V"])
        return {"losses": losses, "saved": saved}

    def backward(self, ops: Any, i: Inputs, saved: Results) -> Results:
        dlogits = ops.cross_entropy_backward(
            i["logits"], i["targets"], saved["saved"], i["scale"], i["V"]
        )
        return {"dlogits": dlogits}

    def plain(self, i: Inputs) -> Results:
        logits = reference.widen(i["logits"][:, : i["V"]])
        return {"loss": F.cross_entropy(logits, i["targets"], reduction="sum")}

    def cost(self, s: Shapes, size: int) -> dict[str, Cost]:
        n = s.N * s.V
        return {"forward": Cost(4 * n, n * size), "backward": Cost(4 * n, 2 * n * size)}


class FusedCrossEntropy(CrossEntropy):
    """The loss and, over the logits, its gradient in one call, as in training."""

    name = "cross_entropy"
    calls: ClassVar[tuple[str, ...]] = ("cross_entropy_forward_backward",)

    def forward(self, ops: Any, i: Inputs) -> Results:
        losses = ops.cross_entropy_forward_backward(i["logits"], i["targets"], i["scale"], i["V"])
        return {"losses": losses, "dlogits": i["logits"]}

    def cost(self, s: Shapes, size: int) -> dict[str, Cost]:
        # read for the sum, read again for the gradient, written: the row does not fit on chip
        return {"forward+backward": Cost(8 * s.N * s.V, 3 * s.N * s.V * size)}


class LinearCrossEntropy(Operation):
    """Output projection and loss, with the gradients of x and of the weight, in one call."""

    name, dims = "linear_cross_entropy", ("N", "C", "V")
    calls: ClassVar[tuple[str, ...]] = ("linear_cross_entropy_forward_backward",)
    leaves, upstream = ("x", "weight"), {"loss": "scale"}

    def inputs(self, s: Shapes, draw: Draw) -> Inputs:
        return {
            "x": draw.normal(s.N, s.C),
            "weight": draw.normal(s.Vp, s.C, std=s.C**-0.5),
            "targets": draw.targets(s.V, s.N),
            "scale": draw.number(1 / s.N),
            "dweight": draw.number(1 / s.N).repeat(s.Vp, s.C),
            "V": s.V,
        }

    def forward(self, ops: Any, i: Inputs) -> Results:
        loss, dx = ops.linear_cross_entropy_forward_backward(
            i["x"], i["weight"], i["targets"], i["scale"], i["dweight"], i["V"]
        )
        return {"loss": loss, "dx": dx, "dweight": i["dweight"]}

    def plain(self, i: Inputs) -> Results:
        logits = reference.widen(F.linear(i["x"], i["weight"])[:, : i["V"]])
        return {"loss": F.cross_entropy(logits, i["targets"], reduction="sum")}

    def cost(self, s: Shapes, size: int) -> dict[str, Cost]:
        n_bytes = 2 * s.N * s.C * size + s.V * s.C * (size + 8)
        return {"forward+backward": Cost(6 * s.N * s.V * s.C, n_bytes)}


class GradientNorms(Operation):
    """The L2 norms of 64 pieces of one flat buffer."""

    name, dims = "gradient_norm", ("P",)
    calls: ClassVar[tuple[str, ...]] = ("gradient_norms",)

    def inputs(self, s: Shapes, draw: Draw) -> Inputs:
        return {"gradients": draw.normal(-(-s.P // 64) * 64, dtype=draw.wide), "pieces": 64}

    def forward(self, ops: Any, i: Inputs) -> Results:
        return {"norms": ops.gradient_norms(i["gradients"], i["pieces"])}

    def plain(self, i: Inputs) -> Results:
        pieces = i["gradients"].view(i["pieces"], -1)
        return {"norms": torch.linalg.vector_norm(pieces, dim=1)}

    def cost(self, s: Shapes, size: int) -> dict[str, Cost]:
        return {"forward": Cost(2 * s.P, 4 * s.P)}


class Update(Operation):
    """What the two optimizers' updates have in common."""

    dims = ("P",)
    moments: ClassVar[tuple[str, ...]] = ()

    def inputs(self, s: Shapes, draw: Draw) -> Inputs:
        master = draw.normal(s.P, std=0.02, dtype=draw.wide)
        low = draw.dtype != draw.wide
        return {
            "weights": master.to(draw.dtype),
            "master": master if low else None,
            "gradients": draw.normal(s.P, std=0.1, dtype=draw.wide),
            "exp_avg": draw.normal(s.P, std=0.1, dtype=draw.wide),
            "exp_avg_sq": draw.normal(s.P, std=0.1, dtype=draw.wide).square(),
            "step": draw.number(STEP),
            "rates": (draw.number(LEARNING_RATE), draw.number(CLIP)),
            "finite": torch.tensor(True, device=draw.device),
        }

    def update(self, ops: Any, i: Inputs, **rounding: Any) -> None:
        """One update in place. rounding: rounding_seed and offset, without a master."""
        raise NotImplementedError

    def forward(self, ops: Any, i: Inputs) -> Results:
        self.update(ops, i)
        return {"weights": i["weights"] if i["master"] is None else i["master"]}


class Sgd(Update):
    """One SGD update of P weights; for bfloat16 weights with their float32 masters."""

    name, calls = "sgd", ("sgd_update",)

    def update(self, ops: Any, i: Inputs, **rounding: Any) -> None:
        ops.sgd_update(
            i["weights"], i["master"], i["gradients"], *i["rates"], i["finite"], WEIGHT_DECAY,
            **rounding,
        )  # fmt: skip

    def cost(self, s: Shapes, size: int) -> dict[str, Cost]:
        return {"update": Cost(4 * s.P, (12 if size == 4 else 14) * s.P)}


class AdamW(Update):
    """One AdamW update of P weights; for bfloat16 weights with their float32 masters.

    PyTorch's fused AdamW updates float32 weights and leaves the bfloat16 copy to autocast.
    """

    name, calls = "adamw", ("adamw_update",)
    moments = ("exp_avg", "exp_avg_sq")

    def update(self, ops: Any, i: Inputs, **rounding: Any) -> None:
        ops.adamw_update(
            i["weights"], i["master"], i["gradients"], i["exp_avg"], i["exp_avg_sq"], i["step"],
            *i["rates"], i["finite"], *BETAS, ADAM_EPS, WEIGHT_DECAY, **rounding,
        )  # fmt: skip

    def plain(self, i: Inputs) -> Results:
        weights = i["weights"] if i["master"] is None else i["master"]
        functional_adamw(
            [weights], [i["gradients"] * CLIP], [i["exp_avg"]], [i["exp_avg_sq"]], [],
            [i["step"] - 1], fused=True, amsgrad=False, beta1=BETAS[0], beta2=BETAS[1],
            lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, eps=ADAM_EPS, maximize=False,
        )  # fmt: skip
        return {"weights": weights}

    def cost(self, s: Shapes, size: int) -> dict[str, Cost]:
        return {"update": Cost(16 * s.P, (28 if size == 4 else 30) * s.P)}


class NesterovMomentum(Operation):
    """Muon's momentum of P gradients."""

    name, dims = "nesterov_momentum", ("P",)
    calls: ClassVar[tuple[str, ...]] = ("nesterov_momentum",)

    def inputs(self, s: Shapes, draw: Draw) -> Inputs:
        return {
            "exp_avg": draw.normal(s.P, std=0.1, dtype=draw.wide),
            "gradients": draw.normal(s.P, std=0.1, dtype=draw.wide),
            "clip": draw.number(CLIP),
            "finite": torch.tensor(True, device=draw.device),
            "update": draw.normal(s.P),
        }

    def forward(self, ops: Any, i: Inputs) -> Results:
        ops.nesterov_momentum(
            i["exp_avg"], i["gradients"], i["clip"], i["finite"], MOMENTUM, i["update"]
        )
        return {"exp_avg": i["exp_avg"], "update": i["update"]}

    def plain(self, i: Inputs) -> Results:
        g = i["gradients"] * CLIP
        m = i["exp_avg"].lerp_(g, 1 - MOMENTUM)
        return {"exp_avg": m, "update": g.lerp(m, MOMENTUM).to(i["update"].dtype)}

    def cost(self, s: Shapes, size: int) -> dict[str, Cost]:
        return {"update": Cost(6 * s.P, (12 + size) * s.P)}


class Orthogonalize(Operation):
    """Newton–Schulz steps of B matrices (F, C)."""

    name, dims = "orthogonalize", ("B", "F", "C")
    calls: ClassVar[tuple[str, ...]] = ("orthogonalize",)

    def inputs(self, s: Shapes, draw: Draw) -> Inputs:
        return {"matrices": draw.normal(s.B, s.F, s.C, std=1e-3)}

    def forward(self, ops: Any, i: Inputs) -> Results:
        ops.orthogonalize(i["matrices"], MUON_SCALE)
        return {"matrices": i["matrices"]}

    def plain(self, i: Inputs) -> Results:
        a, b, c = reference.NEWTON_SCHULZ
        found = []
        for matrix in i["matrices"]:
            tall = matrix.shape[0] > matrix.shape[1]
            x = matrix.T if tall else matrix
            x = x / x.norm()
            for _ in range(reference.NEWTON_SCHULZ_STEPS):
                gram = x @ x.T
                x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
            found.append(MUON_SCALE * (x.T if tall else x))
        return {"matrices": torch.stack(found)}

    def cost(self, s: Shapes, size: int) -> dict[str, Cost]:
        flops = s.B * reference.orthogonalize_flops(s.F, s.C)
        return {"update": Cost(flops, 2 * s.B * s.F * s.C * size)}
