"""Speed and memory of every operation: ours beside PyTorch's, its attention backends and Liger.

    ours            the backends triton (on a GPU), native and reference
    PyTorch eager   the plain function under autograd
    torch.compile   the same, compiled
    SDPA ...        PyTorch's attention backends, each on contiguous q, k, v: what suits them best
    Liger           liger-kernel's Triton kernels, where that package is installed

Operations are those of `mantrans.kernels.operations`. Under autograd the backward of a forward that
was run once is asked for again and again; its results come in the dtype of the inputs, ours are
summed in float32. Before anything is timed, each implementation's results are compared with those
of `mantrans.kernels.native`: one that computes something else is not timed.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import harness, machine, peaks
from benchmarks.harness import Candidate, PeakMemory, Quantiles, Recorder
from mantrans.kernels import operations as described
from mantrans.kernels.operations import EPS, Cost, Draw, Inputs, Operation, Results, Shapes

Call = Callable[[], Results]
Plain = Callable[[Inputs], Results]
OURS = ("triton", "native", "reference")
SDPA = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}
# Relative RMS difference between two right answers: bfloat16 keeps 8 bits, and a baseline rounds
# its weight gradients to it (2^-9 each, several roundings deep); float32 sums differ in order.
TOLERANCE = {"bfloat16": 2e-2, "float32": 1e-4}
# PyTorch's layer norm sums bfloat16 weight gradients on a CPU with fewer digits than float32 has:
# 6.7e-2 away from ours, seen on 4,096 rows. It is what users get, so it is timed.
VECTOR_TOLERANCE = {"bfloat16": 1.5e-1, "float32": 1e-4}
MAX_SECONDS = 2.0
# Beyond this the whole matrix of scores, which some make, is not worth waiting for.
MAX_SCORES = 2**28


class Case(NamedTuple):
    """An operation at one size, in one direction."""

    operation: Operation
    direction: str
    shapes: Shapes
    dtype: str

    @property
    def where(self) -> tuple[str, str, dict[str, int], str]:
        """What `Recorder.add` calls a case."""
        shape = {name: getattr(self.shapes, name) for name in self.operation.dims}
        return self.operation.name, self.direction, shape, self.dtype

    @property
    def title(self) -> str:
        """What --only looks in."""
        name, direction, shape, dtype = self.where
        return f"{name} {direction} {' '.join(f'{k}={v}' for k, v in shape.items())} {dtype}"

    @property
    def cost(self) -> Cost:
        size = getattr(torch, self.dtype).itemsize
        return self.operation.cost(self.shapes, size)[self.direction]

    @property
    def scores(self) -> int:
        """Elements of attention's matrix of scores; 0 for what has none."""
        s = self.shapes
        return s.B * s.H * s.T**2 if self.operation.name == "attention" else 0

    def tensors(self, seed: int) -> Inputs:
        draw = Draw(getattr(torch, self.dtype), machine.device(), seed)
        return self.operation.inputs(self.shapes, draw)


def directions(operation: Operation, shapes: Shapes, dtype: str) -> list[Case]:
    """The operation's cases at a size."""
    return [Case(operation, direction, shapes, dtype) for direction in operation.cost(shapes, 4)]


# ------------------------------------------------------------------------------ what is measured


def cases(quick: bool) -> Iterator[Case]:
    """The operations at the sizes that are measured on this device, most telling first."""
    if quick:
        yield from model_cases(B=2, T=64, C=64, H=2, F=128, V=256, dtype="float32")
    elif machine.on_gpu():
        yield from gpu_cases()
    else:
        seed_sized = {"B": 16, "T": 256, "C": 256, "H": 4, "F": 512, "V": 4096}
        if machine.has_native_bfloat16():
            yield from model_cases(**seed_sized, dtype="bfloat16")
            yield from model_cases(B=1, T=1024, C=768, H=12, F=3072, V=50304, dtype="bfloat16")
        yield from model_cases(**seed_sized, dtype="float32")


def model_cases(B: int, T: int, C: int, H: int, F: int, V: int, dtype: str) -> Iterator[Case]:
    """Each operation once, at the size that a model of this shape gives it."""
    P = 4 * (4 * C * C + 2 * C * F) + V * C
    s = Shapes(B=B, T=T, H=H, H_kv=H, D=C // H, C=C, F=F, V=V, Vp=V, N=B * T, P=P)
    sizes: list[tuple[Operation, Shapes]] = [
        (described.Attention(), s),
        (described.WindowAttention(), s),
        (described.Rotary(), s),
        (described.NormRotary(), s),
        (described.AddLayerNorm(), s),
        (described.AddRmsNorm(), s),
        (described.FusedCrossEntropy(), s._replace(N=min(s.N, 1024))),
        (described.LinearCrossEntropy(), s),
        (described.BiasGelu(), s),
        (described.SwiGLU(), s),
        (described.Linear(), s._replace(F=3 * C)),
        (described.Embedding(), s),
        (described.AdamW(), s),
        (described.DecodeAttention(), s),
        (described.GradientNorms(), s),
        (described.NesterovMomentum(), s),
        (described.Orthogonalize(), s._replace(B=4)),
    ]
    for operation, shapes in sizes:
        yield from directions(operation, shapes, dtype)


def gpu_cases() -> Iterator[Case]:
    """The sizes of the targets: attention to 16k, norms of GPT-2's widths, two vocabularies."""
    gpt2 = Shapes(B=16, T=1024, H=12, H_kv=12, D=64, C=768, F=3072, V=50304, Vp=50304)
    gpt2 = gpt2._replace(N=16384, P=124_475_904)
    sizes: list[tuple[Operation, Shapes]] = [
        (described.AddLayerNorm(), Shapes(N=32768, C=C)) for C in (768, 256, 1600)
    ]
    sizes += [
        (described.FusedCrossEntropy(), Shapes(N=N, V=V, Vp=V))
        for N, V in ((8192, 50304), (32768, 4096))
    ]
    sizes += [
        (described.Attention(), Shapes(B=16384 // T, T=T, H=H, H_kv=H, D=D))
        for T in (1024, 4096, 16384, 2048, 8192)
        for H, D in ((32, 64), (16, 128))
    ]
    sizes += [
        (described.LinearCrossEntropy(), gpt2),
        (described.BiasGelu(), gpt2._replace(N=32768)),
        (described.AdamW(), gpt2),
        (described.Embedding(), gpt2),
        (described.Linear(), gpt2),
        (described.DecodeAttention(), gpt2._replace(B=64)),
        (described.GradientNorms(), gpt2),
        (described.NesterovMomentum(), gpt2),
        (described.Orthogonalize(), gpt2._replace(B=12)),
        (described.AddRmsNorm(), Shapes(N=16384, C=896)),  # Qwen2.5-0.5B's
        (described.SwiGLU(), Shapes(N=16384, F=4864)),
    ]
    qwen2_5 = Shapes(B=16, T=1024, H=14, H_kv=2, D=64)
    qwen3 = Shapes(B=16, T=1024, H=16, H_kv=8, D=128)
    sizes += [
        (o, s) for o in (described.Rotary(), described.NormRotary()) for s in (qwen2_5, qwen3)
    ]
    sizes += [(described.WindowAttention(), Shapes(B=4, T=4096, H=16, H_kv=8, D=128))]
    for operation, shapes in sizes:
        yield from directions(operation, shapes, "bfloat16")


# ------------------------------------------------------------------------------- who is measured


class Implementation(NamedTuple):
    """prepare(tensors) gives a call without arguments that does the work.

    direct: launched one by one, because a graph cannot hold autograd's backward of an earlier
    forward.
    """

    name: str
    prepare: Callable[[Inputs], Call]
    direct: bool = False


def implementations(case: Case) -> list[Implementation]:
    """All that can run this case here. The first is ours."""
    ours = [name for name in OURS if machine.on_gpu() or name != "triton"]
    found = [_ours(name, case) for name in ours if name != "reference" or case.scores <= MAX_SCORES]
    plain = case.operation.plain
    baselines: dict[str, Plain] = {"PyTorch eager": plain}
    if case.operation.name == "adamw":
        baselines = {"PyTorch fused": plain}
    elif "attention" not in case.operation.name:  # there the compiler calls the same library kernel
        functorch_config.donated_buffer = False  # a backward is asked for more than once
        baselines["torch.compile"] = torch.compile(plain, dynamic=False)
    baselines |= liger(case)
    found += [_autograd(name, plain, case) for name, plain in baselines.items()]
    if case.operation.name == "attention":
        found += [_sdpa(name, case) for name in _sdpa_backends(case)]
    return found


def _ours(name: str, case: Case) -> Implementation:
    ops = importlib.import_module(f"mantrans.kernels.{name}")

    def prepare(i: Inputs) -> Call:
        if case.direction != "backward":
            return lambda: case.operation.forward(ops, i)
        saved = case.operation.forward(ops, i)
        return lambda: case.operation.backward(ops, i, saved)

    return Implementation(name, prepare)


def _autograd(name: str, plain: Plain, case: Case) -> Implementation:
    operation = case.operation
    upstream = dict(operation.upstream)

    def prepare(i: Inputs) -> Call:
        leaves = {key: i[key].detach().requires_grad_() for key in operation.leaves}
        i = {**i, **leaves}

        def gradients(results: Results, retain: bool) -> Results:
            found = torch.autograd.grad(
                [results[key] for key in upstream], list(leaves.values()),
                [i[key] for key in upstream.values()], retain_graph=retain,
            )  # fmt: skip
            return {f"d{key}": gradient for key, gradient in zip(leaves, found, strict=True)}

        if case.direction == "forward+backward":
            return lambda: gradients(plain(i), retain=False)
        if case.direction != "backward":
            return lambda: plain(i)
        results = plain(i)
        return lambda: gradients(results, retain=True)

    return Implementation(name, prepare, direct="backward" in case.direction)


def _sdpa_backends(case: Case) -> list[str]:
    names = list(SDPA) if machine.on_gpu() else ["SDPA flash", "SDPA math"]
    return [name for name in names if name != "SDPA math" or case.scores <= MAX_SCORES]


def _sdpa(name: str, case: Case) -> Implementation:
    """Separate contiguous q, k, v and their gradients; (B, H, T, D) -> (B, T, C) is a view."""

    def prepare(i: Inputs) -> Call:
        leaves = [
            x.contiguous().detach().requires_grad_()
            for x in described.split_heads(i["qkv"], *i["heads"])
        ]
        q = leaves[0]
        dout = i["dout"].unflatten(-1, (q.shape[1], -1)).transpose(1, 2)

        def forward() -> Results:
            with sdpa_kernel(SDPA[name]):
                out = F.scaled_dot_product_attention(*leaves, is_causal=True)
            return {"out": out.transpose(1, 2).flatten(2)}

        if case.direction == "forward":
            return forward
        with sdpa_kernel(SDPA[name]):
            out = F.scaled_dot_product_attention(*leaves, is_causal=True)

        def backward() -> Results:
            found = torch.autograd.grad(out, leaves, dout, retain_graph=True)
            return dict(zip(("dq", "dk", "dv"), found, strict=True))

        return backward

    return Implementation(name, prepare, direct=case.direction == "backward")


def liger(case: Case) -> dict[str, Plain]:
    """liger-kernel's ways, where it is installed and there is a GPU."""
    if not machine.on_gpu() or importlib.util.find_spec("liger_kernel") is None:
        return {}
    from liger_kernel.transformers import LigerCrossEntropyLoss, LigerFusedLinearCrossEntropyLoss
    from liger_kernel.transformers.functional import (
        liger_layer_norm,
        liger_rms_norm,
        liger_swiglu,
    )

    loss = LigerCrossEntropyLoss(reduction="sum")
    fused_loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")

    def layer_norm(i: Inputs) -> Results:
        x = i["residual"] + i["branch"]
        return {"y": liger_layer_norm(x, i["weight"], i["bias"], EPS), "x": x}

    def rms_norm(i: Inputs) -> Results:
        x = i["residual"] + i["branch"]  # in place it would write over dy, which is used again
        return {"y": liger_rms_norm(x, i["weight"], EPS, in_place=False), "x": x}

    ways: dict[str, Plain] = {
        "add_layer_norm": layer_norm,
        "add_rms_norm": rms_norm,
        "swiglu": lambda i: {"y": liger_swiglu(*(x.contiguous() for x in i["h"].chunk(2, -1)))},
        "cross_entropy": lambda i: {"loss": loss(i["logits"], i["targets"])},
        "linear_cross_entropy": lambda i: {"loss": fused_loss(i["weight"], i["x"], i["targets"])},
    }
    return {"Liger": ways[case.operation.name]} if case.operation.name in ways else {}


# --------------------------------------------------------------------------------- the measuring


def main(arguments: Namespace) -> int:
    """`python -m benchmarks ops`. Returns 1 if one of ours failed."""
    todo = [case for case in cases(arguments.quick) if arguments.only in case.title]
    machine_peaks = peaks.known(arguments.output, arguments.quick)
    recorder = Recorder(arguments.output, "operations", arguments.quick)
    failed = False
    end = time.monotonic() + arguments.seconds
    for case, share in harness.within(todo, end, lambda case: case.title):
        seconds = min(share, MAX_SECONDS)
        failed |= measure(case, seconds, machine_peaks, recorder, arguments.against)
    return int(failed)


def measure(
    case: Case,
    seconds: float,
    limits: peaks.Peaks,
    recorder: Recorder,
    against: Sequence[str] = (),
) -> bool:
    """Check, time and record the implementations of one case: ours and those named in `against`,
    all where none is named. True if one of ours failed."""
    torch._dynamo.reset()
    ready, our_failure = [], False
    for implementation in implementations(case):
        if against and implementation.name not in (*OURS[:2], *against):
            continue
        try:
            ready.append(_prepare(implementation, case))
        except Exception as failure:
            recorder.add_failure(case.where, implementation.name, harness.reason(failure))
            our_failure |= implementation.name in OURS
    times = harness.compete([candidate for candidate, _ in ready], seconds)
    cost = case.cost
    for candidate, peak in ready:
        t = times[candidate.name]
        direct = machine.on_gpu() and candidate.replay is None
        recorder.add(
            case.where, candidate.name, "time", "ms", t.milliseconds(),
            tflops=cost.flops / t.p50 / 1e12, gbytes_per_s=cost.n_bytes / t.p50 / 1e9,
            fraction=limits.least_seconds(*cost, case.dtype) / t.p50,
            note="launched one by one" if direct else None,
        )  # fmt: skip
        recorder.add(case.where, candidate.name, "memory", "MiB", Quantiles.of([peak / 2**20]))
    by_time = sorted(times.items(), key=lambda item: item[1].p50)
    print(
        f"{case.title} [ms]:", ", ".join(f"{k} {v.p50 * 1e3:.3g}" for k, v in by_time), flush=True
    )
    del ready
    gc.collect()
    return our_failure


def _prepare(implementation: Implementation, case: Case) -> tuple[Candidate, int]:
    """Check an implementation and warm it up; with the bytes that one call of it allocates."""
    check(implementation, case)
    one = harness.bytes_of(x for x in case.tensors(0).values() if isinstance(x, Tensor))
    calls = harness.input_sets(lambda seed: implementation.prepare(case.tensors(seed)), one)
    candidate = Candidate(implementation.name, calls, capture=not implementation.direct)
    candidate.warm_up()
    return candidate, PeakMemory().after(calls[0])


def check(implementation: Implementation, case: Case) -> None:
    """Raises ValueError where a result is not that of `mantrans.kernels.native`.

    Compared are results of one name: the three gradients of attention have no counterpart in ours,
    which is packed. Our gradients are added to buffers, autograd's are not.
    """
    buffers = case.tensors(99)
    expected = _ours("native", case).prepare(case.tensors(99))()
    found = implementation.prepare(case.tensors(99))()
    for name in found.keys() & expected.keys():
        if name == "saved" or not isinstance(found[name], Tensor):
            continue  # each backend chooses what it keeps for its backward
        start = buffers[name].double() if name.startswith("d") and name in buffers else 0.0
        right = expected[name].double() - start
        result = found[name].detach().double() - (start if implementation.name in OURS else 0.0)
        error = ((result - right).norm() / right.norm()).item()
        tolerance = VECTOR_TOLERANCE if right.dim() == 1 and name.startswith("d") else TOLERANCE
        if not error <= tolerance[case.dtype]:
            raise ValueError(f"{name} differs from native's by {error:.1e} of its norm")
