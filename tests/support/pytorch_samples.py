"""PyTorch's own sample inputs for its operations, run through ours.

PyTorch tests each of its operations on samples of its own (`op_db`). Each function below has the
signature of PyTorch's operation, after the backend and the gradient of the output, and returns the
output and the gradients of the arguments that are tensors of real numbers, in order, None for one
that has none. It raises NotOurs for a sample that our operations do not cover.

A new operation is a function here and a line in OPERATIONS.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.support.compare import assert_close

Gradients = list[Tensor | None]


class NotOurs(Exception):
    """Why a sample does not apply."""


def rows_of(x: Tensor, width: int) -> Tensor:
    return x.reshape(-1, width)


def layer_norm(
    ops: Any, dy: Tensor, x: Tensor, shape, weight=None, bias=None, eps: float = 1e-5
) -> tuple[Tensor, Gradients]:
    """Ours always has a weight, and normalizes one axis: the others are folded into it."""
    width = torch.Size(shape).numel()
    gain = x.new_ones(width) if weight is None else weight.flatten()
    offset = None if bias is None else bias.flatten()
    rows = rows_of(x, width)
    y, mean, rstd = ops.layer_norm_forward(rows, gain, offset, eps)
    dgain, doffset = torch.zeros_like(gain), None if bias is None else torch.zeros_like(offset)
    dx = ops.layer_norm_backward(rows_of(dy, width), rows, gain, mean, rstd, dgain, doffset)
    gradients = [dx.view(x.shape)]
    gradients += [] if weight is None else [dgain.view(weight.shape)]
    return y.view(x.shape), gradients + ([] if bias is None else [doffset.view(bias.shape)])


def rms_norm(
    ops: Any, dy: Tensor, x: Tensor, shape, weight=None, eps: float | None = None
) -> tuple[Tensor, Gradients]:
    """As `layer_norm`. Without an ε PyTorch's is that of the dtype, here float64."""
    width = torch.Size(shape).numel()
    gain = x.new_ones(width) if weight is None else weight.flatten()
    rows, dgain = rows_of(x, width), torch.zeros_like(gain)
    y, rstd = ops.rms_norm_forward(
        rows, gain, torch.finfo(torch.float64).eps if eps is None else eps
    )
    gradients = [ops.rms_norm_backward(rows_of(dy, width), rows, gain, rstd, dgain).view(x.shape)]
    return y.view(x.shape), gradients + ([] if weight is None else [dgain.view(weight.shape)])


def silu(ops: Any, dy: Tensor, x: Tensor, inplace: bool = False) -> tuple[Tensor, Gradients]:
    """SwiGLU whose other half is 1."""
    h = torch.cat((x.reshape(1, -1), torch.ones_like(x).reshape(1, -1)), 1)
    dx, _ = ops.swiglu_backward(dy.reshape(1, -1), h).chunk(2, 1)
    return ops.swiglu_forward(h).view(x.shape), [dx.view(x.shape)]


def gelu(ops: Any, dy: Tensor, x: Tensor, approximate: str) -> tuple[Tensor, Gradients]:
    if approximate != "tanh":
        raise NotOurs("the GELU of the error function")
    return ops.bias_gelu_forward(x), [ops.bias_gelu_backward(dy, x)]


def linear(ops: Any, dy: Tensor, x: Tensor, weight: Tensor, bias=None) -> tuple[Tensor, Gradients]:
    dweight, dbias = torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
    dx = ops.linear_backward(dy, x, weight, dweight, dbias)
    gradients = [dx, dweight] if bias is None else [dx, dweight, dbias]
    return ops.linear_forward(x, weight, bias), gradients


def embedding(
    ops: Any, dy: Tensor, table: Tensor, tokens: Tensor, sparse: bool = False, **other: Any
) -> tuple[Tensor, Gradients]:
    """Ours adds a table of positions, here 0. A sparse gradient is the same in other memory."""
    for option in ("max_norm", "scale_grad_by_freq", "padding_idx"):
        if option in other:
            raise NotOurs(option)
    ids = tokens.reshape(1, -1) if tokens.dim() < 2 else tokens
    positions = table.new_zeros(ids.shape[1], table.shape[1])
    dtable, dpositions = torch.zeros_like(table), torch.zeros_like(positions)
    y = ops.embedding_forward(ids, table, positions)
    ops.embedding_backward(dy.reshape(y.shape), ids, dtable, dpositions)
    return y.view(dy.shape), [dtable]


def class_rows(logits: Tensor, target: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Logits with the classes in the last axis, as rows, and their targets."""
    if target.is_floating_point():
        raise NotOurs("probabilities as targets")
    if "weight" in options:
        raise NotOurs("weights of classes")
    logits = logits.movedim(1, -1)
    return rows_of(logits, logits.shape[-1]).contiguous(), target.flatten()


def reduced(losses: Tensor, counted: Tensor, reduction: str, shape: torch.Size) -> Tensor:
    if reduction == "none":
        return losses.view(shape)
    return losses.sum() / (counted.sum() if reduction == "mean" else 1)


def cross_entropy(
    ops: Any, dy: Tensor, logits: Tensor, target: Tensor, reduction="mean", **options: Any
) -> tuple[Tensor, Gradients]:
    """Our backward has one factor for all rows; those of `reduction="none"` are run one by one."""
    rows, targets = class_rows(logits, target, options)
    V, ignored = rows.shape[1], options.get("ignore_index", -100)
    counted = targets != ignored
    factors = dy / (counted.sum() if reduction == "mean" else 1)
    parts = range(len(rows)) if reduction == "none" else [slice(None)]
    losses, dlogits = torch.zeros_like(rows[:, 0]), torch.empty_like(rows)
    for i, part in enumerate(parts):
        where = slice(part, part + 1) if reduction == "none" else part
        scale = factors.flatten()[i]
        z = rows[where].clone()
        losses[where], saved = ops.cross_entropy_forward(z, targets[where], V, ignored)
        dlogits[where] = ops.cross_entropy_backward(z, targets[where], saved, scale, V, ignored)
        both = rows[where].clone()
        again = ops.cross_entropy_forward_backward(both, targets[where], scale, V, ignored)
        assert_close(again, losses[where], 1e-6, "losses of the two ways")
        assert_close(both, dlogits[where], 1e-6, "gradients of the two ways")
    moved = logits.movedim(1, -1).shape
    y = reduced(losses, counted, reduction, target.shape)
    return y, [dlogits.view(moved).movedim(-1, 1)]


def linear_cross_entropy(
    ops: Any, dy: Tensor, logits: Tensor, target: Tensor, reduction="mean", **options: Any
) -> tuple[Tensor, Gradients]:
    """The projection and the loss in one: the projection is the identity here."""
    rows, targets = class_rows(logits, target, options)
    if reduction == "none":
        raise NotOurs("no reduction")
    if "ignore_index" in options:
        raise NotOurs("another ignore_index")
    V = rows.shape[1]
    scale = dy / (len(rows) if reduction == "mean" else 1)
    identity, dweight = torch.eye(V, dtype=rows.dtype), torch.zeros(V, V, dtype=rows.dtype)
    loss, dx = ops.linear_cross_entropy_forward_backward(rows, identity, targets, scale, dweight, V)
    losses = ops.linear_cross_entropy_forward(rows, identity, targets, V)
    assert_close(losses.sum() * scale, loss, 1e-6, "losses of the two ways")
    moved = logits.movedim(1, -1).shape
    return loss / dy, [dx.view(moved).movedim(-1, 1)]


def attention(
    ops: Any,
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask=None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> tuple[Tensor, Gradients]:
    """Ours is causal, over as many queries as keys. Missing queries are put there as zeros. Without
    a causal mask each query is the last of a sequence of its own, whose position sees all keys."""
    if dropout_p:
        raise NotOurs("dropout")
    if attn_mask is not None:
        raise NotOurs("a mask of real numbers")
    leaves = q, k, v
    k, v = (x if x.dim() == 4 else x[None] for x in (k, v))
    B, H_kv, S, D = k.shape
    H, L = q.shape[-3] if enable_gqa else H_kv, q.shape[-2]
    q, dout = (x.expand(B, H, L, D) for x in (q, dy))
    if not is_causal:  # (B, H, L, D) -> (B·L, H, 1, D)
        q, dout = (x.transpose(1, 2).reshape(B * L, H, 1, D) for x in (q, dout))
        k, v = (x.repeat_interleave(L, 0) for x in (k, v))
    place = slice(0, L) if is_causal else slice(S - 1, S)
    whole_q, whole_dout = k.new_zeros(2, len(k), H, S, D)
    whole_q[:, :, place], whole_dout[:, :, place] = q, dout
    qkv = torch.cat([x.transpose(1, 2).flatten(2) for x in (whole_q, k, v)], -1)
    whole_dout = whole_dout.transpose(1, 2).flatten(2).contiguous()
    out, saved = ops.attention_forward(qkv, H, None, H_kv)
    dqkv = ops.attention_backward(whole_dout, qkv, out, saved, H, None, H_kv)
    y = out.unflatten(2, (H, D)).transpose(1, 2)[:, :, place]
    heads = dqkv.unflatten(2, (H + 2 * H_kv, D)).transpose(1, 2)
    dq, dk, dv = heads.split([H, H_kv, H_kv], 1)
    dq = dq[:, :, place]
    if not is_causal:
        y, dq = (x.reshape(B, L, H, D).transpose(1, 2) for x in (y, dq))
        dk, dv = (x.unflatten(0, (B, L)).sum(1) for x in (dk, dv))
    gradients = [g.sum_to_size(x.shape) for g, x in zip((dq, dk, dv), leaves, strict=True)]
    return y.reshape(dy.shape), gradients


class Operation(NamedTuple):
    """PyTorch's name, our function, how many samples apply at least, why the others do not."""

    name: str
    run: Callable[..., tuple[Tensor, Gradients]]
    applicable: int
    reasons: set[str]


OPERATIONS = [
    Operation("nn.functional.layer_norm", layer_norm, 6, set()),
    Operation("native_layer_norm", layer_norm, 20, set()),
    Operation("nn.functional.rms_norm", rms_norm, 6, set()),
    Operation("nn.functional.silu", silu, 6, set()),
    Operation("nn.functional.gelu", gelu, 4, {"the GELU of the error function"}),
    Operation("nn.functional.linear", linear, 18, set()),
    Operation(
        "nn.functional.embedding", embedding, 4, {"max_norm", "scale_grad_by_freq", "padding_idx"}
    ),
    Operation(
        "nn.functional.cross_entropy", cross_entropy, 8,
        {"probabilities as targets", "weights of classes"},
    ),
    Operation(
        "nn.functional.cross_entropy", linear_cross_entropy, 6,
        {"probabilities as targets", "weights of classes", "no reduction", "another ignore_index"},
    ),
    Operation(
        "nn.functional.scaled_dot_product_attention", attention, 12,
        {"dropout", "a mask of real numbers"},
    ),
]  # fmt: skip


def compare(
    operation: Operation,
    ops: Any,
    dtype: torch.dtype,
    tolerance: float,
    most: int | None = None,
) -> Counter[str]:
    """Run every sample by `ops` in dtype, compare with PyTorch's operation and autograd in float64.

    most: stop after so many. Returns how many were run, under "run", and how many were not, by the
    reason.
    """
    counts: Counter[str] = Counter()
    for theirs, sample in samples(operation.name, dtype):
        if counts["run"] == most:
            break
        arguments = (sample.input, *sample.args)
        wide = [in_float64(x) for x in arguments]
        options = {name: in_float64(x, leaf=False) for name, x in sample.kwargs.items()}
        y = first(theirs(*wide, **options))
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        plain = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
        try:
            ours, gradients = operation.run(ops, dy, *plain, **sample.kwargs)
        except NotOurs as reason:
            counts[str(reason)] += 1
            continue
        leaves = [x for x in wide if isinstance(x, Tensor) and x.requires_grad]
        expected = torch.autograd.grad(y, leaves, dy.double())
        name = f"{operation.name} sample {sum(counts.values())}"
        assert ours.dtype == dtype
        assert_close(ours, y.detach(), tolerance, f"{name}: output")
        for i, (actual, wanted) in enumerate(zip(gradients, expected, strict=True)):
            assert_near(actual, wanted.to_dense(), dy, tolerance, f"{name}: gradient {i}")
        counts["run"] += 1
    return counts


def assert_near(actual: Tensor, expected: Tensor, dy: Tensor, tolerance: float, what: str) -> None:
    """Relative to the larger of the gradients of input and output: a gradient may cancel to 0, and
    both sides then hold nothing but the roundings of what cancelled."""
    error = (actual.double() - expected).norm()
    bound = tolerance * max(expected.norm(), dy.double().norm())
    assert actual.shape == expected.shape and error <= bound, f"{what}: error {error:.1e}"


def samples(name: str, dtype: torch.dtype) -> Iterator[tuple[Callable[..., Any], Any]]:
    """(PyTorch's function, sample) for each sample of the operation."""
    from torch.testing._internal.common_methods_invocations import op_db  # takes seconds

    torch.manual_seed(0)
    for info in op_db:
        if info.name == name:
            for sample in info.sample_inputs("cpu", dtype, requires_grad=False):
                yield info.op, sample


def in_float64(x: Any, leaf: bool = True) -> Any:
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.detach().double().requires_grad_(leaf)
    return x


def first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result
