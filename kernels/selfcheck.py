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
import functools
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mantrans.kernels import operations, reference
from mantrans.kernels.operations import EPS, Draw, Inputs, Operation, Shapes

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
# Factors of the bounds: fifteen products one after the other, of which each is rounded, and the
# smallest singular values grow most.
CHAINS = {"orthogonalize": 3}
WORST_ROW = 8  # factor for the worst row: rounding errors are spread evenly, bugs are not

# Each older one gives wrong results for some kernel with Hopper's products (WGMMA):
# flash-linear-attention's pull request 1262 names 12.8.93, in Triton's wheel, and 13.0.88.
GOOD_PTXAS = "13.1"

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


Outputs = dict[tuple[str, str], Tensor]  # (function of the backend, output) -> value


# ---------------------------------------------------------------------------------- the programs
# Each draws its inputs and is then run by a backend: see `compare`. Operations are described in
# `operations`; what is added here is how training uses them besides.

Program = Callable[[Any, Inputs], Outputs]


def outputs_of(operation: Operation, ops: Any, i: Inputs, suffix: str = "") -> Outputs:
    """All results of an operation that backends share, by the function that computes them."""
    results = operation.forward(ops, i)
    by_call = [results]
    if len(operation.calls) > 1:
        by_call.append(operation.backward(ops, i, results))
    return {
        (call, f"{name}{suffix}"): value
        for call, values in zip(operation.calls, by_call, strict=True)
        for name, value in values.items()
        if name != "saved"
    }


def by_partial_sums(operation: Operation, ops: Any, i: Inputs) -> Outputs:
    """The gradients of vectors, through partial sums as in training if the backend uses them.

    They are 64 elements apart, and start at 1.
    """
    i = {name: x.clone() if isinstance(x, Tensor) else x for name, x in i.items()}
    saved, first = operation.forward(ops, i), i[operation.vectors[0]]
    n_rows, width = ops.partial_rows(first.device), len(first)
    totals = first.new_ones(len(operation.vectors), -(-width // 64) * 64)
    sums = totals.new_zeros(n_rows, *totals.shape)
    columns = sums.transpose(0, 1) if n_rows else totals
    i |= dict(zip(operation.vectors, columns[..., :width], strict=True))
    operation.backward(ops, i, saved)
    if n_rows:
        ops.sum_partials(sums.flatten(1), totals.flatten())
    return {
        (operation.calls[1], f"{name} by partial sums"): total[:width]
        for name, total in zip(operation.vectors, totals, strict=True)
    }


def embedding_inputs(s: Shapes, draw: Draw) -> Inputs:
    i = operations.Embedding().inputs(s, draw)
    return {**i, "tokens": i["tokens"] % 97}  # few, so that tokens occur more than once


def embedding(ops: Any, i: Inputs) -> Outputs:
    without = {name: x.clone() for name, x in i.items()}
    outputs = outputs_of(operations.Embedding(), ops, i)
    return outputs | outputs_of(operations.TokenEmbedding(), ops, without, " without positions")


def linear_inputs(s: Shapes, draw: Draw) -> Inputs:
    return {
        **operations.Linear().inputs(s, draw),
        "sums": draw.buffer(s.F),
        "overwritten": draw.buffer(s.F, s.C),
        "partials": draw.normal(37, s.F, dtype=draw.wide),
        "total": draw.buffer(s.F),
    }


def linear(ops: Any, i: Inputs) -> Outputs:
    outputs = outputs_of(operations.Linear(), ops, i)
    outputs |= by_partial_sums(operations.Linear(), ops, i)
    ops.linear_backward(i["dy"], i["x"], i["weight"], i["overwritten"], accumulate=False)
    ops.bias_gradient(i["dy"], i["sums"])
    ops.sum_partials(i["partials"], i["total"])
    return outputs | {
        ("linear_backward", "dweight, overwritten"): i["overwritten"],
        ("bias_gradient", "dbias"): i["sums"],
        ("sum_partials", "gradients"): i["total"],
        ("sum_partials", "partials"): i["partials"],
    }


def layer_norm(ops: Any, i: Inputs) -> Outputs:
    after_branch = {name: x.clone() for name, x in i.items()}
    outputs = outputs_of(operations.LayerNorm(), ops, i)
    outputs |= outputs_of(operations.AddLayerNorm(), ops, after_branch, " after a branch")
    return outputs | by_partial_sums(operations.LayerNorm(), ops, i)


def rms_norm(ops: Any, i: Inputs) -> Outputs:
    after_branch = {name: x.clone() for name, x in i.items()}
    outputs = outputs_of(operations.RmsNorm(), ops, i)
    outputs |= outputs_of(operations.AddRmsNorm(), ops, after_branch, " after a branch")
    return outputs | by_partial_sums(operations.RmsNorm(), ops, i)


def rotary_inputs(s: Shapes, draw: Draw) -> Inputs:
    i = operations.NormRotary().inputs(s._replace(D=max(2, s.D // 2 * 2)), draw)
    return {**i, "positions": draw.integers(s.T, s.B, s.T)}


def rotary(ops: Any, i: Inputs) -> Outputs:
    """Without norms first, on copies: it may write over its inputs, and so may every backward."""
    alone = {name: x.clone() if isinstance(x, Tensor) else x for name, x in i.items()}
    outputs = outputs_of(operations.Rotary(), ops, alone)
    outputs |= by_partial_sums(operations.NormRotary(), ops, i)
    # at positions of a table, as in decoding
    gains, angles = (i["q_weight"], i["k_weight"]), (i["cos"], i["sin"])
    where = *i["heads"], i["positions"]
    normed, _ = ops.norm_rotary_forward(i["qkv"], *gains, *angles, EPS, *where)
    rotated = ops.rotary_forward(i["qkv"].clone(), *angles, *where)
    outputs |= {
        ("norm_rotary_forward", "rotated by positions"): normed,
        ("rotary_forward", "rotated by positions"): rotated,
    }
    return outputs | outputs_of(operations.NormRotary(), ops, i)


def attention_inputs(s: Shapes, draw: Draw) -> Inputs:
    window = operations.WindowAttention().inputs(s, draw)["starts"]
    return {**operations.DocumentAttention().inputs(s, draw), "window": window}


# How a run's attention is used: the operation, and the input with each query's first key.
ATTENTION_MODES: dict[str, tuple[Operation, str | None]] = {
    "": (operations.Attention(), None),
    " with documents": (operations.DocumentAttention(), "starts"),
    " with a window": (operations.WindowAttention(), "window"),
}


def attention(ops: Any, i: Inputs, modes: Collection[str] = tuple(ATTENTION_MODES)) -> Outputs:
    outputs: Outputs = {}
    for mode in modes:
        operation, starts = ATTENTION_MODES[mode]
        inputs = {**i, "starts": None if starts is None else i[starts]}
        outputs |= outputs_of(operation, ops, inputs, mode)
    # all heads have one scale, so each is compared with all: alone, dq of one token is 0
    H, H_kv = i["heads"]
    return {
        key: value.unflatten(-1, (H + 2 * H_kv, -1)) if key[0] == "attention_backward" else value
        for key, value in outputs.items()
    }


def decoding_inputs(s: Shapes, draw: Draw) -> Inputs:
    i = operations.RaggedDecodeAttention().inputs(s._replace(B=3), draw)
    return {**i, "window": s.T // 4 + 1}


def decoding(ops: Any, i: Inputs) -> Outputs:
    outputs = outputs_of(operations.RaggedDecodeAttention(), ops, i)
    return outputs | outputs_of(operations.WindowDecodeAttention(), ops, i, " with a window")


def gelu(ops: Any, i: Inputs) -> Outputs:
    outputs = outputs_of(operations.BiasGelu(), ops, i)
    return outputs | by_partial_sums(operations.BiasGelu(), ops, i)


def swiglu(ops: Any, i: Inputs) -> Outputs:
    return outputs_of(operations.SwiGLU(), ops, i)


def loss_inputs(s: Shapes, draw: Draw) -> Inputs:
    apart, together = operations.CrossEntropy(), operations.LinearCrossEntropy()
    return {**apart.inputs(s, draw), **together.inputs(s, draw)}


def loss(ops: Any, i: Inputs) -> Outputs:
    in_two_calls = {**i, "logits": i["logits"].clone()}
    outputs = outputs_of(operations.CrossEntropy(), ops, in_two_calls)
    outputs |= outputs_of(operations.FusedCrossEntropy(), ops, i)
    outputs |= outputs_of(operations.LinearCrossEntropy(), ops, i)
    x, weight, targets = i["x"], i["weight"], i["targets"]
    losses = ops.linear_cross_entropy_forward(x, weight, targets, i["V"])
    overwritten = torch.ones_like(i["dweight"])
    ops.linear_cross_entropy_forward_backward(
        x, weight, targets, i["scale"], overwritten, i["V"],
        accumulate=False, chunk_rows=len(targets) // 2 + 1,  # overwrites, then adds
    )  # fmt: skip
    return outputs | {
        ("linear_cross_entropy_forward", "losses"): losses,
        ("linear_cross_entropy_forward_backward", "dweight, overwritten"): overwritten,
    }


def steps_inputs(s: Shapes, draw: Draw) -> Inputs:
    """No block divides the weights, or a piece of the gradients."""
    P = 4 * s.C * s.C + 3
    pieces = {"pieces": 3, "aligned": draw.normal(P // 192 * 192, dtype=draw.wide)}
    return {**operations.AdamW().inputs(s._replace(P=P), draw), **pieces}


def steps(ops: Any, i: Inputs) -> Outputs:
    """Compares the changes, not the new weights: beside the weights a wrong change looks small."""
    outputs = outputs_of(operations.GradientNorms(), ops, {**i, "gradients": i["aligned"]})
    for operation in (operations.Sgd(), operations.AdamW()):
        for finite in (False, True):
            state = {name: x.clone() if isinstance(x, Tensor) else x for name, x in i.items()}
            state["finite"] = i["finite"] & finite
            operation.update(ops, state)
            for name in ("weights", "master", *operation.moments):
                if state[name] is None:
                    continue
                # of weights with a master: a step is smaller than their rounding
                whole = name == "weights" and i["master"] is not None
                label = f"{name if whole else f'step of {name}'}, finite={finite}"
                value = state[name] if whole else state[name] - i[name]
                outputs[operation.calls[0], label] = value
    return outputs


def rounding_inputs(s: Shapes, draw: Draw) -> Inputs:
    return {**steps_inputs(s, draw), "seed": draw.integers(2**31)}


def stochastic_rounding(ops: Any, i: Inputs) -> Outputs:
    """Of bfloat16 weights without a master: the share that is rounded as the reference does.

    Both draw the same noise. A step that differs in its last bit of float32 is rounded to another
    neighbor by chance, once in 65,536 times.
    """
    narrow = {"weights": torch.bfloat16}
    outputs = {}
    for operation in (operations.Sgd(), operations.AdamW()):
        rounded = []
        for backend in (reference, ops):
            state = {
                name: x.to(narrow.get(name, torch.float32), copy=True)
                if isinstance(x, Tensor) and x.is_floating_point() else x
                for name, x in i.items()
            }  # fmt: skip
            operation.update(backend, {**state, "master": None}, rounding_seed=i["seed"], offset=37)
            rounded.append(state["weights"])
        same = (rounded[0] == rounded[1]).double().mean()
        outputs[operation.calls[0], "share of weights rounded as the reference"] = same
    return outputs


def muon_inputs(s: Shapes, draw: Draw) -> Inputs:
    """Two blocks' matrices of the MLP; no block of a kernel divides the flat buffers."""
    momentum = operations.NesterovMomentum().inputs(s._replace(P=4 * s.C * s.C + 3), draw)
    matrices = operations.Orthogonalize().inputs(s._replace(B=2), draw)
    return {**operations.Sgd().inputs(s._replace(P=2 * s.F * s.C), draw), **momentum, **matrices,
            "step of w": draw.normal(2 * s.F * s.C)}  # fmt: skip


def muon(ops: Any, i: Inputs) -> Outputs:
    """Momentum as in `steps`; the weights' step from gradients in the products' dtype."""
    outputs = outputs_of(operations.Orthogonalize(), ops, i)
    for finite in (False, True):
        state = {name: x.clone() if isinstance(x, Tensor) else x for name, x in i.items()}
        found = operations.NesterovMomentum().forward(
            ops, {**state, "finite": i["finite"] & finite}
        )
        label = f"step of exp_avg, finite={finite}"
        outputs["nesterov_momentum", label] = found["exp_avg"] - i["exp_avg"]
    outputs["nesterov_momentum", "update"] = found["update"]
    w = i["weights"] if i["master"] is None else i["master"]
    before = w.clone()
    operations.Sgd().update(ops, {**i, "gradients": i["step of w"]})
    outputs["sgd_update", "step by narrow gradients"] = w - before
    return outputs


PROGRAMS: list[tuple[Callable[[Shapes, Draw], Inputs], Program]] = [
    (embedding_inputs, embedding),
    (linear_inputs, linear),
    (operations.LayerNorm().inputs, layer_norm),
    (operations.RmsNorm().inputs, rms_norm),
    (rotary_inputs, rotary),
    (attention_inputs, attention),
    (decoding_inputs, decoding),
    (operations.BiasGelu().inputs, gelu),
    (operations.SwiGLU().inputs, swiglu),
    (loss_inputs, loss),
    (steps_inputs, steps),
    (rounding_inputs, stochastic_rounding),
    (muon_inputs, muon),
]


def programs_for(
    unused: Collection[str] = (), modes: Collection[str] = tuple(ATTENTION_MODES)
) -> list[tuple[Callable[[Shapes, Draw], Inputs], Program]]:
    """PROGRAMS without those named in `unused`, with attention in some of ATTENTION_MODES: what a
    run does not use takes it a second a kernel to compile."""
    return [
        (draw, functools.partial(attention, modes=modes) if program is attention else program)
        for draw, program in PROGRAMS
        if program.__name__ not in unused
    ]


def run_shapes(
    d_model: int,
    n_heads: int,
    d_ffn: int,
    vocab_size: int,
    sequence_length: int,
    n_kv_heads: int | None = None,
    head_dim: int | None = None,
) -> Shapes:
    """A run's sizes, with the fewest rows that reach every branch. Widths are the run's. Only rows,
    sequences and (beyond MAX_SCORES) T are reduced."""
    T = min(sequence_length, math.isqrt(MAX_SCORES // n_heads))
    return Shapes(
        B=2 if 2 * n_heads * T * T <= MAX_SCORES else 1,
        T=T,
        H=n_heads,
        H_kv=n_kv_heads or n_heads,
        D=head_dim or d_model // n_heads,
        C=d_model,
        F=d_ffn,
        V=vocab_size,
        Vp=reference.padded_vocabulary(vocab_size),
        N=max(3, min(MAX_ROWS, MAX_LOGITS // vocab_size) - 1),  # odd: no multiple of a block
    )


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
    head_dim: int | None = None,
    programs: Sequence[tuple[Callable[[Shapes, Draw], Inputs], Program]] = PROGRAMS,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[Result]:
    """Run operations of the backend `ops` and compare them with the reference.

    The arguments are the run's; n_kv_heads None means n_heads, head_dim None d_model / n_heads.
    programs: what to check, see `programs_for`. progress: called with the number of programs that
    have run and of all.
    Returns one Result per output.
    Raises KernelCheckError at the first wrong output: one line with the operation, the output and
    its shape.
    """
    shapes = run_shapes(d_model, n_heads, d_ffn, vocab_size, sequence_length, n_kv_heads, head_dim)
    results = []
    for done, (draw_inputs, program) in enumerate(programs):
        progress(done, len(programs))
        for result in compare(ops, program, draw_inputs(shapes, Draw(dtype, device)), dtype):
            results.append(result)
            if not result.error <= result.bound:  # true for NaN too
                raise KernelCheckError(complaint(result, dtype, device))
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the next program's tensors are of other sizes
    progress(len(programs), len(programs))
    return results


def compare(ops: Any, program: Program, inputs: Inputs, dtype: torch.dtype) -> Iterator[Result]:
    """Run one program with `ops` and, in float64, with the reference."""
    exact = program(reference, {name: in_float64(value) for name, value in inputs.items()})
    watched = Watched(ops)
    try:
        with poisoned_memory():
            outputs = program(watched, inputs)
    except torch.OutOfMemoryError:
        raise  # which says nothing about the kernel
    except Exception as failure:
        first_line = (str(failure).strip() or type(failure).__name__).splitlines()[0]
        raise KernelCheckError(f"{watched.current} does not run: {first_line}") from failure
    for (operation, output), value in outputs.items():
        error = relative_error(value, exact[operation, output])
        bound = BOUNDS[dtype] * CHAINS.get(operation, 1)
        yield Result(operation, output, tuple(value.shape), error, bound)


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
        "train with backend native, or with another compiler that passes this check: another "
        f"Triton, or TRITON_PTXAS_PATH set to a ptxas of CUDA {GOOD_PTXAS} or newer"
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
