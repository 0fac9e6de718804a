"""Before a GPU run: is every kernel right, on this GPU, with this compiler, at this run's shapes?

A compiler can be wrong: Triton gives silently wrong gradients for some kernels on Hopper
(flash-linear-attention issue 640 saw it with 3.4 to 3.7.0, issue 984 with 3.7.1), and a run trained
on them looks like one with a bad learning rate. A version number does not prove a kernel right; the
result of `check` does. It takes seconds.

Each check is a short program of operations, run twice on the same random numbers: by the run's
backend in the run's dtype, and by `reference` in float64. The outputs are compared by name. New
memory is filled with NaN meanwhile, so that elements that a kernel does not write are found.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mantrans.kernels import reference
from mantrans.kernels.reference import IGNORE_INDEX

# Largest allowed root mean square of the error, relative to that of the exact result.
BOUNDS = {
    # 8 bits: a rounding error is at most 2^-9, and only a few of them lie between an input and an
    # output. A wrong mask, scale or term causes a far larger error.
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,  # the same with 11 bits
    # 24 bits, and sums of up to 1e5 terms in any order; TF32 products would have errors of 5e-4
    torch.float32: 1e-4,
    torch.float64: 1e-10,
}
WORST_ROW = 8  # factor for the worst row: rounding errors are spread evenly, bugs are not

EPS = 1e-5
MAX_ROWS = 512
MAX_LOGITS = 2**23  # logits of the loss; 64 MiB in float64
MAX_SCORES = 2**24  # scores of attention, rows x keys x heads


class KernelCheckError(RuntimeError):
    """A kernel disagrees with the reference, or does not run."""


class Result(NamedTuple):
    """One output of one operation, compared."""

    operation: str
    output: str
    shape: tuple[int, ...]
    error: float  # relative root mean square; NaN where an element is not finite
    bound: float


class Shapes(NamedTuple):
    """The run's sizes, with the fewest rows that reach every branch."""

    B: int
    T: int
    H: int
    H_kv: int
    D: int
    C: int
    F: int
    V: int
    Vp: int
    N: int  # rows of everything but attention

    @classmethod
    def of_run(
        cls,
        d_model: int,
        n_heads: int,
        d_ffn: int,
        vocab_size: int,
        sequence_length: int,
        n_kv_heads: int | None = None,
    ) -> Shapes:
        """Widths are the run's. Only rows, sequences and (beyond MAX_SCORES) T are reduced."""
        T = min(sequence_length, math.isqrt(MAX_SCORES // n_heads))
        return cls(
            B=2 if 2 * n_heads * T * T <= MAX_SCORES else 1,
            T=T,
            H=n_heads,
            H_kv=n_kv_heads or n_heads,
            D=d_model // n_heads,
            C=d_model,
            F=d_ffn,
            V=vocab_size,
            Vp=reference.padded_vocabulary(vocab_size),
            N=max(3, min(MAX_ROWS, MAX_LOGITS // vocab_size) - 1),  # odd: no multiple of a block
        )


Outputs = dict[tuple[str, str], Tensor]  # (operation, output) -> value
Inputs = Mapping[str, Any]


class Draw:
    """Random inputs, the same at every call of `check`: normal numbers unless said otherwise."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.wide = reference.wide_dtype(dtype)
        self.generator = torch.Generator(device).manual_seed(20201)

    def normal(self, *shape: int, std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        x = torch.randn(*shape, device=self.device, dtype=self.wide, generator=self.generator)
        return (x * std).to(dtype or self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, device=self.device, generator=self.generator)

    def number(self, value: float) -> Tensor:
        return torch.tensor(value, device=self.device, dtype=self.wide)

    def targets(self, high: int, n: int) -> Tensor:
        """Labels, every fifth of them ignored."""
        targets = self.integers(high, n)
        targets[::5] = IGNORE_INDEX
        return targets


# ---------------------------------------------------------------------------------- the programs
# Each draws its inputs and is then run by a backend: see `compare`. Gradients of weights start at
# 1, so that overwriting one instead of adding to it is found.

Program = Callable[[Any, Inputs], Outputs]


def by_partial_sums(
    ops: Any, backward: Callable[..., object], *vectors: Tensor
) -> tuple[Tensor, ...]:
    """What backward(*vectors) adds to gradients of one length, through partial sums as in training
    if the backend uses them: vectors are 64 elements apart, and start at 1."""
    n_rows, width = ops.partial_rows(vectors[0].device), len(vectors[0])
    totals = vectors[0].new_ones(len(vectors), -(-width // 64) * 64)
    if n_rows:
        rows = totals.new_zeros(n_rows, *totals.shape)
        backward(*rows[..., :width].unbind(1))
        ops.sum_partials(rows.flatten(1), totals.flatten())
    else:
        backward(*totals[:, :width])
    return totals[:, :width].unbind()


def embedding_inputs(s: Shapes, draw: Draw) -> Inputs:
    return {
        "tokens": draw.integers(s.V, s.B, s.T) % 97,  # few, so that tokens occur more than once
        "table": draw.normal(s.Vp, s.C),
        "positions": draw.normal(s.T, s.C),
        "dx": draw.normal(s.B, s.T, s.C),
        "dtable": draw.number(1).repeat(s.Vp, s.C),
        "dpositions": draw.number(1).repeat(s.T, s.C),
    }


def embedding(ops: Any, i: Inputs) -> Outputs:
    x = ops.embedding_forward(i["tokens"], i["table"], i["positions"])
    ops.embedding_backward(i["dx"], i["tokens"], i["dtable"], i["dpositions"])
    return {
        ("embedding_forward", "x"): x,
        ("embedding_backward", "dtoken_table"): i["dtable"],
        ("embedding_backward", "dposition_table"): i["dpositions"],
    }


def linear_inputs(s: Shapes, draw: Draw) -> Inputs:
    return {
        "x": draw.normal(s.N, s.C),
        "weight": draw.normal(s.F, s.C, std=s.C**-0.5),
        "bias": draw.normal(s.F),
        "dy": draw.normal(s.N, s.F),
        "dweight": draw.number(1).repeat(s.F, s.C),
        "dbias": draw.number(1).repeat(s.F),
        "sums": draw.number(1).repeat(s.F),
        "overwritten": draw.number(1).repeat(s.F, s.C),
        "partials": draw.normal(37, s.F, dtype=draw.wide),
        "total": draw.number(1).repeat(s.F),
    }


def linear(ops: Any, i: Inputs) -> Outputs:
    y = ops.linear_forward(i["x"], i["weight"], i["bias"])
    dx = ops.linear_backward(i["dy"], i["x"], i["weight"], i["dweight"], i["dbias"])
    ops.bias_gradient(i["dy"], i["sums"])
    (dbias,) = by_partial_sums(
        ops,
        lambda dbias: ops.linear_backward(
            i["dy"], i["x"], i["weight"], i["overwritten"], dbias, accumulate=False
        ),
        i["dbias"],
    )
    ops.sum_partials(i["partials"], i["total"])
    return {
        ("linear_forward", "y"): y,
        ("linear_backward", "dx"): dx,
        ("linear_backward", "dweight"): i["dweight"],
        ("linear_backward", "dbias"): i["dbias"],
        ("linear_backward", "dweight, overwritten"): i["overwritten"],
        ("linear_backward", "dbias by partial sums"): dbias,
        ("bias_gradient", "dbias"): i["sums"],
        ("sum_partials", "gradients"): i["total"],
        ("sum_partials", "partials"): i["partials"],
    }


def layer_norm_inputs(s: Shapes, draw: Draw) -> Inputs:
    return {
        "branch": draw.normal(s.N, s.C),
        "residual": draw.normal(s.N, s.C) + 1,
        "weight": draw.normal(s.C),
        "bias": draw.normal(s.C),
        "dy": draw.normal(s.N, s.C),
        "dresidual": draw.normal(s.N, s.C),
        "dweight": draw.number(1).repeat(s.C),
        "dbias": draw.number(1).repeat(s.C),
        "dbranch_bias": draw.number(1).repeat(s.C),
    }


def layer_norm(ops: Any, i: Inputs) -> Outputs:
    weight, bias = i["weight"], i["bias"]
    y, mean, rstd = ops.layer_norm_forward(i["residual"], weight, bias, EPS)
    added = ops.add_layer_norm_forward(i["branch"], i["residual"], weight, bias, EPS)
    dx = ops.layer_norm_backward(
        i["dy"], i["residual"], weight, mean, rstd,
        i["dweight"], i["dbias"], i["dresidual"], i["dbranch_bias"],
    )  # fmt: skip
    summed = by_partial_sums(
        ops,
        lambda dweight, dbias, dbranch_bias: ops.layer_norm_backward(
            i["dy"], i["residual"], weight, mean, rstd, dweight, dbias, None, dbranch_bias
        ),
        i["dweight"], i["dbias"], i["dbranch_bias"],
    )  # fmt: skip
    names = ("dweight", "dbias", "dbranch_bias")
    return {
        ("layer_norm_forward", "y"): y,
        ("layer_norm_forward", "mean"): mean,
        ("layer_norm_forward", "rstd"): rstd,
        ("add_layer_norm_forward", "y"): added[0],
        ("add_layer_norm_forward", "x"): added[1],
        ("layer_norm_backward", "dx"): dx,
        ("layer_norm_backward", "dweight"): i["dweight"],
        ("layer_norm_backward", "dbias"): i["dbias"],
        ("layer_norm_backward", "dbranch_bias"): i["dbranch_bias"],
        **{
            ("layer_norm_backward", f"{name} by partial sums"): x
            for name, x in zip(names, summed, strict=True)
        },
    }


def attention_inputs(s: Shapes, draw: Draw) -> Inputs:
    starts = torch.zeros(s.B, s.T, dtype=torch.int32, device=draw.device)
    starts[:, s.T // 3 :] = s.T // 3
    starts[:, s.T // 2 :] = s.T // 2
    return {
        "qkv": draw.normal(s.B, s.T, (s.H + 2 * s.H_kv) * s.D),
        "dout": draw.normal(s.B, s.T, s.H * s.D),
        "heads": (s.H, s.H_kv),
        "starts": starts,
    }


def attention(ops: Any, i: Inputs) -> Outputs:
    outputs = {}
    H, H_kv = i["heads"]
    for suffix, starts in (("", None), (" with documents", i["starts"])):
        out, lse = ops.attention_forward(i["qkv"], H, starts, H_kv)
        dqkv = ops.attention_backward(i["dout"], i["qkv"], out, lse, H, starts, H_kv)
        outputs["attention_forward", f"out{suffix}"] = out
        # all heads have one scale, so each is compared with all: alone, dq of one token is 0
        outputs["attention_backward", f"dqkv{suffix}"] = dqkv.unflatten(-1, (H + 2 * H_kv, -1))
    return outputs


def decoding_inputs(s: Shapes, draw: Draw) -> Inputs:
    lengths = draw.integers(s.T, 3) + 1
    lengths[0], lengths[1] = 1, s.T
    past = torch.arange(s.T, device=draw.device) < lengths[:, None]
    cache = {name: draw.normal(3, s.T, s.H_kv * s.D) for name in ("k", "v")}
    for tensor in cache.values():
        tensor[~past] = math.nan  # what lies beyond a row's length was never written
    q = draw.normal(3, s.H * s.D)
    return {"q": q, **cache, "lengths": lengths, "heads": (s.H, s.H_kv)}


def decoding(ops: Any, i: Inputs) -> Outputs:
    out = ops.decode_attention(i["q"], i["k"], i["v"], i["lengths"], *i["heads"])
    return {("decode_attention", "out"): out}


def gelu_inputs(s: Shapes, draw: Draw) -> Inputs:
    return {
        "h": draw.normal(s.N, s.F),
        "bias": draw.normal(s.F),
        "dy": draw.normal(s.N, s.F),
        "dbias": draw.number(1).repeat(s.F),
    }


def gelu(ops: Any, i: Inputs) -> Outputs:
    y = ops.bias_gelu_forward(i["h"], i["bias"])
    dh = ops.bias_gelu_backward(i["dy"], i["h"], i["bias"], i["dbias"])
    (dbias,) = by_partial_sums(
        ops, lambda x: ops.bias_gelu_backward(i["dy"], i["h"], i["bias"], x), i["dbias"]
    )
    return {
        ("bias_gelu_forward", "y"): y,
        ("bias_gelu_backward", "dh"): dh,
        ("bias_gelu_backward", "dbias"): i["dbias"],
        ("bias_gelu_backward", "dbias by partial sums"): dbias,
    }


def loss_inputs(s: Shapes, draw: Draw) -> Inputs:
    return {
        "logits": draw.normal(s.N, s.Vp, std=2.0),
        "targets": draw.targets(s.V, s.N),
        "scale": draw.number(1 / s.N),
        "V": s.V,
        "x": draw.normal(s.N, s.C),
        "weight": draw.normal(s.Vp, s.C, std=s.C**-0.5),
        "dweight": draw.number(1 / s.N).repeat(s.Vp, s.C),
    }


def loss(ops: Any, i: Inputs) -> Outputs:
    targets, scale, V = i["targets"], i["scale"], i["V"]
    apart, together = i["logits"].clone(), i["logits"].clone()
    losses, normalizer = ops.cross_entropy_forward(apart, targets, V)
    dlogits = ops.cross_entropy_backward(apart, targets, normalizer, scale, V)
    both = ops.cross_entropy_forward_backward(together, targets, scale, V)
    projected = ops.linear_cross_entropy_forward(i["x"], i["weight"], targets, V)
    total, dx = ops.linear_cross_entropy_forward_backward(
        i["x"], i["weight"], targets, scale, i["dweight"], V,
        accumulate=False, chunk_rows=len(targets) // 2 + 1,  # overwrites, then adds
    )  # fmt: skip
    return {
        ("cross_entropy_forward", "losses"): losses,
        ("cross_entropy_backward", "dlogits"): dlogits,
        ("cross_entropy_forward_backward", "losses"): both,
        ("cross_entropy_forward_backward", "dlogits"): together,
        ("linear_cross_entropy_forward", "losses"): projected,
        ("linear_cross_entropy_forward_backward", "loss"): total,
        ("linear_cross_entropy_forward_backward", "dx"): dx,
        ("linear_cross_entropy_forward_backward", "dweight"): i["dweight"],
    }


def steps_inputs(s: Shapes, draw: Draw) -> Inputs:
    P = 4 * s.C * s.C + 3  # no multiple of a block
    low = draw.dtype in (torch.bfloat16, torch.float16)
    master = draw.normal(P, std=0.02, dtype=draw.wide)
    return {
        "weights": master.to(draw.dtype),
        "master": master if low else None,
        "gradients": draw.normal(P, std=0.1, dtype=draw.wide),
        "m": draw.normal(P, std=0.1, dtype=draw.wide),
        "v": draw.normal(P, std=0.1, dtype=draw.wide).square(),
        "step": draw.number(3),
        "learning_rate": draw.number(1e-2),
        "clip": draw.number(0.5),
        "finite": torch.tensor(True, device=draw.device),
    }


def steps(ops: Any, i: Inputs) -> Outputs:
    """Compares the changes, not the new weights: beside the weights a wrong change looks small."""
    outputs: Outputs = {("gradient_norm", "norm"): ops.gradient_norm(i["gradients"])}
    for name, moments in (("sgd_update", ()), ("adamw_update", ("m", "v"))):
        before = [i["weights"], i["master"], *(i[moment] for moment in moments)]
        state = [None if tensor is None else tensor.clone() for tensor in before]
        for finite in (False, True):
            take_step(getattr(ops, name), state, i, finite)
            for label, old, new in zip(("weights", "master", *moments), before, state, strict=True):
                if new is None or old is None:
                    continue
                if label == "weights" and i["master"] is not None:
                    # a step is smaller than the rounding of these weights
                    outputs[name, f"weights, finite={finite}"] = new
                else:
                    outputs[name, f"step of {label}, finite={finite}"] = new - old
    return outputs


def take_step(update: Callable[..., None], state: list[Any], i: Inputs, finite: bool) -> None:
    """One `sgd_update` or, if the state has moments, `adamw_update` of state in place."""
    weights, master, *moments = state
    gradients = i["gradients"]
    rates = (i["learning_rate"], i["clip"], i["finite"] if finite else ~i["finite"])
    if not moments:
        update(weights, master, gradients, *rates, 0.1)
        return
    update(weights, master, gradients, *moments, i["step"], *rates, 0.9, 0.95, 1e-8, 0.1)


PROGRAMS: list[tuple[Callable[[Shapes, Draw], Inputs], Program]] = [
    (embedding_inputs, embedding),
    (linear_inputs, linear),
    (layer_norm_inputs, layer_norm),
    (attention_inputs, attention),
    (decoding_inputs, decoding),
    (gelu_inputs, gelu),
    (loss_inputs, loss),
    (steps_inputs, steps),
]


# --------------------------------------------------------------------------------- the comparison


def check(
    ops: Any,
    *,
    d_model: int,
    n_heads: int,
    d_ffn: int,
    vocab_size: int,
    sequence_length: int,
    dtype: torch.dtype,
    device: torch.device,
    n_kv_heads: int | None = None,
) -> list[Result]:
    """Run every operation of the backend `ops` and compare it with the reference.

    The arguments are the run's; n_kv_heads None means n_heads. Returns one Result per output.
    Raises KernelCheckError at the first wrong output: one line with the operation, the output and
    its shape.
    """
    shapes = Shapes.of_run(d_model, n_heads, d_ffn, vocab_size, sequence_length, n_kv_heads)
    results = []
    for draw_inputs, program in PROGRAMS:
        inputs = draw_inputs(shapes, Draw(dtype, device))
        for result in compare(ops, program, inputs, dtype):
            results.append(result)
            if not result.error <= result.bound:  # true for NaN too
                raise KernelCheckError(complaint(result, dtype, device))
    return results


def compare(ops: Any, program: Program, inputs: Inputs, dtype: torch.dtype) -> Iterator[Result]:
    """Run one program with `ops` and, in float64, with the reference."""
    exact = program(reference, {name: in_float64(value) for name, value in inputs.items()})
    watched = Watched(ops)
    try:
        with poisoned_memory():
            outputs = program(watched, inputs)
    except Exception as failure:
        first_line = (str(failure).strip() or type(failure).__name__).splitlines()[0]
        raise KernelCheckError(f"{watched.current} does not run: {first_line}") from failure
    for (operation, output), value in outputs.items():
        error = relative_error(value, exact[operation, output])
        yield Result(operation, output, tuple(value.shape), error, BOUNDS[dtype])


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """The larger of: RMS error / RMS value; the same for the worst row, divided by WORST_ROW.

    A row of small values is compared with the RMS of all rows. NaN or infinite if `actual` is.
    """
    actual, exact = (x.double().reshape(-1, x.shape[-1] if x.dim() else 1) for x in (actual, exact))
    size = exact.square().mean().sqrt()
    error = (actual - exact).square().mean(-1)
    row_size = torch.maximum(exact.square().mean(-1).sqrt(), size)
    tiny = torch.finfo(torch.float64).tiny  # gives 0 instead of 0/0 if all values are zero
    whole = error.mean().sqrt() / (size + tiny)
    worst = (error.sqrt() / (row_size + tiny)).max() / WORST_ROW
    return float(torch.maximum(whole, worst))


def complaint(result: Result, dtype: torch.dtype, device: torch.device) -> str:
    """The line a user reads."""
    found = (
        f"expected a relative RMS error of at most {result.bound:.0e}, got {result.error:.1e}"
        if math.isfinite(result.error)
        else "expected finite elements, got some that are not, or were never written"
    )
    dtype_name = str(dtype).removeprefix("torch.")
    return (
        f"{result.operation} is wrong on {device} in {dtype_name}: "
        f"{result.output} {result.shape}: {found}; "
        "train with backend native, or with another Triton or ptxas that passes this check"
    )


class Watched:
    """A backend that remembers the last operation called."""

    def __init__(self, ops: Any) -> None:
        self.ops, self.current = ops, ""

    def __getattr__(self, name: str) -> Any:
        self.current = name
        return getattr(self.ops, name)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill new memory (torch.empty and similar) with NaN, integers with their largest value."""
    settings: Any = torch.utils.deterministic
    mode, filling = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # the filling is part of this mode, whose warnings do not matter here
        torch.use_deterministic_algorithms(True, warn_only=True)
        settings.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode(mode)
            settings.fill_uninitialized_memory = filling


def in_float64(value: Any) -> Any:
    """An input of the reference: a copy, with floating point numbers in float64."""
    if not isinstance(value, Tensor):
        return value
    return value.to(torch.float64 if value.is_floating_point() else value.dtype, copy=True)
