"""`python -m tools.rival_errors`: our kernels' and others' errors against float64, interpreted.

Relative RMS of each result of one call and its backward, for the same rounded inputs. The kernels
of `mantrans.ops`, Liger (liger-kernel) and flash-linear-attention (flash-linear-attention and
fla-core) run in Triton's interpreter, as `tests.support.interpreter` repairs it; PyTorch's own
functions on the CPU. An autotuned kernel runs its first configuration. What does not run is named
below the table with its reason. `--only NAME` takes one operation.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, NamedTuple

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.support import interpreter
from tests.support.compare import relative_error

DTYPES = (torch.float32, torch.bfloat16)
RIVALS = ("ours", "Liger", "fla", "PyTorch")
OPERATIONS = (
    "layer norm", "RMS norm", "SwiGLU", "cross-entropy", "linear cross-entropy", "RoPE",
    "attention",
)  # fmt: skip
N, C, V, EPS = 96, 256, 1000, 1e-6
B, T, H, H_KV, D = 1, 160, 4, 2, 64
Inputs = dict[str, Any]


class Row(NamedTuple):
    """One operation: its inputs with a gradient, the others, and who computes it how."""

    shapes: dict[str, tuple[int, ...]]
    given: Inputs
    results: tuple[str, ...]
    ways: dict[str, Callable[..., Any]]


def targets() -> Tensor:
    found = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(2))
    found[::7] = -100
    return found


def angles() -> dict[str, Tensor]:
    frequency = 10_000.0 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    angle = torch.arange(T, dtype=torch.float64)[:, None] * frequency
    return {"cos": angle.cos().float(), "sin": angle.sin().float()}


def plain_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = (torch.cat((x, x), -1)[:, None].to(q.dtype) for x in (cos, sin))

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    return turned(q), turned(k)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2)


def rows() -> dict[str, Row]:
    """Every operation, after the interpreter has begun."""
    from mantrans import ops

    pytorch: dict[str, Callable[..., Any]] = {
        "layer norm": lambda x, weight, bias: F.layer_norm(x, (C,), weight, bias, EPS),
        "RMS norm": lambda x, weight: F.rms_norm(x, (C,), weight, EPS),
        "SwiGLU": lambda gate, up: F.silu(gate) * up,
        "cross-entropy": lambda logits, targets: F.cross_entropy(logits, targets),
        "linear cross-entropy": lambda x, weight, targets: F.cross_entropy(x @ weight.T, targets),
        "RoPE": plain_rope,
        "attention": plain_attention,
    }
    ours: dict[str, Callable[..., Any]] = {
        "layer norm": lambda x, weight, bias: ops.layer_norm(x, weight, bias, EPS),
        "RMS norm": lambda x, weight: ops.rms_norm(x, weight, EPS),
        "SwiGLU": ops.swiglu,
        "cross-entropy": ops.cross_entropy,
        "linear cross-entropy": ops.linear_cross_entropy,
        "RoPE": ops.rope,
        "attention": ops.attention,
    }
    vectors = {"weight": (C,), "bias": (C,)}
    heads = {"q": (B, T, H, D), "k": (B, T, H_KV, D), "v": (B, T, H_KV, D)}
    shapes: dict[str, tuple[dict[str, tuple[int, ...]], Inputs, tuple[str, ...]]] = {
        "layer norm": ({"x": (N, C), **vectors}, {}, ("y",)),
        "RMS norm": ({"x": (N, C), "weight": (C,)}, {}, ("y",)),
        "SwiGLU": ({"gate": (N, C), "up": (N, C)}, {}, ("y",)),
        "cross-entropy": ({"logits": (N, V)}, {"targets": targets()}, ("loss",)),
        "linear cross-entropy": (
            {"x": (N, C), "weight": (V, C)}, {"targets": targets()}, ("loss",),
        ),
        "RoPE": ({"q": heads["q"], "k": heads["k"]}, angles(), ("q turned", "k turned")),
        "attention": (heads, {}, ("out",)),
    }  # fmt: skip
    others = {"ours": ours, "PyTorch": pytorch, "Liger": liger(), "fla": fla()}
    return {
        name: Row(*shapes[name], {who: ways[name] for who, ways in others.items() if name in ways})
        for name in OPERATIONS
    }


def liger() -> dict[str, Callable[..., Any]]:
    """It has no attention of this kind."""
    try:
        import triton.language as tl
        from liger_kernel.transformers import functional as L
    except ImportError as missing:
        return missing_everywhere(missing)
    for name in ("layer_norm", "rms_norm"):  # theirs is CUDA's own, which nothing interprets
        vars(import_module(f"liger_kernel.ops.{name}"))["rsqrt"] = lambda x: tl.rsqrt(x)

    def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        cos, sin = (torch.cat((x, x), -1)[None] for x in (cos, sin))
        heads = (x.transpose(1, 2) for x in (q, k))  # written over
        q, k = L.liger_rope(*(x.clone() for x in heads), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2)

    return {
        "layer norm": lambda x, weight, bias: L.liger_layer_norm(x, weight, bias, EPS),
        "RMS norm": lambda x, weight: L.liger_rms_norm(x, weight, EPS, in_place=False),
        "SwiGLU": L.liger_swiglu,
        # it writes the gradient over the logits
        "cross-entropy": lambda logits, targets: L.liger_cross_entropy(logits.clone(), targets),
        "linear cross-entropy": L.liger_fused_linear_cross_entropy,
        "RoPE": rope,
    }


def fla() -> dict[str, Callable[..., Any]]:
    try:
        from fla.modules.activations import swiglu
        from fla.modules.fused_cross_entropy import cross_entropy_loss
        from fla.modules.fused_linear_cross_entropy import fused_linear_cross_entropy_loss
        from fla.modules.norm.layernorm import layer_norm, rms_norm
        from fla.modules.rotary import rotary_embedding
        from fla.ops.attn.parallel import parallel_attn
    except ImportError as missing:
        return missing_everywhere(missing)

    def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
        """As its module FusedCrossEntropyLoss takes the mean; that one refuses a CPU."""
        losses, _ = cross_entropy_loss(logits, targets)
        return losses.sum() / (targets != -100).sum()

    return {
        "layer norm": lambda x, weight, bias: layer_norm(x, weight, bias, eps=EPS),
        "RMS norm": lambda x, weight: rms_norm(x, weight, None, eps=EPS),
        "SwiGLU": swiglu,
        "cross-entropy": cross_entropy,
        "linear cross-entropy": lambda x, weight, targets: fused_linear_cross_entropy_loss(
            x, targets, weight
        ),
        "RoPE": lambda q, k, cos, sin: tuple(
            rotary_embedding(x, cos.to(x.dtype), sin.to(x.dtype)) for x in (q, k)
        ),
        "attention": parallel_attn,
    }


def missing_everywhere(missing: ImportError) -> dict[str, Callable[..., Any]]:
    """Says why at each operation."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise missing

    return dict.fromkeys(OPERATIONS, fail)


# ----------------------------------------------------------------------------------- the errors


def results_of(row: Row, way: Callable[..., Any], inputs: Inputs) -> dict[str, Tensor]:
    """The results by name, and the gradient of each input."""
    leaves = {name: inputs[name].clone().requires_grad_() for name in row.shapes}
    found = way(*leaves.values(), *row.given.values())
    outputs = found if isinstance(found, tuple) else (found,)
    source = torch.Generator().manual_seed(4)
    upstream = [torch.randn(y.shape, generator=source).bfloat16().to(y.dtype) for y in outputs]
    upstream = [g if g.dim() else torch.ones_like(g) for g in upstream]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    named = dict(zip(row.results, outputs, strict=True))
    named |= {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {name: x.detach() for name, x in named.items()}


def errors(row: Row, dtype: torch.dtype, failed: dict[str, str]) -> Iterator[Any]:
    """(result, {who: error}) of one operation. failed: gets who cannot run it, and why."""
    source = torch.Generator().manual_seed(1)
    inputs = {
        name: (torch.randn(shape, generator=source) * (shape[-1] ** -0.5 if len(shape) == 2 and
               name == "weight" else 1)).to(dtype)
        for name, shape in row.shapes.items()
    }  # fmt: skip
    inputs |= row.given
    wide = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
    exact = results_of(row, row.ways["PyTorch"], wide)
    found: dict[str, dict[str, Tensor]] = {}
    for who, way in row.ways.items():
        try:
            found[who] = results_of(row, way, inputs)
        except Exception as failure:  # of others' code, whatever it raises
            lines = str(failure).strip().splitlines() or [""]
            failed[who] = f"{type(failure).__name__}: {lines[-1]}"
    for name, value in exact.items():
        yield name, {who: relative_error(x[name], value) for who, x in found.items()}


def without_autotuning() -> None:
    """The first configuration of each kernel: without a GPU there is nothing to time."""
    import triton

    tuned = triton.autotune
    triton.autotune = lambda configs, key, **options: tuned(configs[:1], key, **options)


def float_arguments() -> None:
    """A kernel's Python float is a float32 there, as on a GPU: the interpreter leaves it as it is,
    without the methods of a number of Triton's."""
    import triton.language as tl
    from triton.runtime import interpreter as triton_interpreter

    module: Any = triton_interpreter
    convert = module._implicit_cvt

    def converted(argument: Any) -> Any:
        if isinstance(argument, float):
            handle = module.TensorHandle(np.array([argument], np.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        return convert(argument)

    module._implicit_cvt = converted


def lost_zeros() -> None:
    """Triton's code asks whether an `other` is there by its truth: the interpreter loses that of a
    single number's load if it is 0, and would read it as one without `other`."""
    from triton.runtime import interpreter as triton_interpreter

    module: Any = triton_interpreter
    builder, handle = module.InterpreterBuilder, module.TensorHandle
    load = builder.create_masked_load

    def masked(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any, **named: Any) -> Any:
        if other is None and pointers.data.size == 1:
            element = pointers.get_element_ty()
            dtype = module._get_np_dtype(element)
            other = handle(np.zeros(pointers.data.shape, dtype), element)
        return load(self, pointers, mask, other, *rest, **named)

    builder.create_masked_load = masked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="part of an operation's name")
    only = parser.parse_args().only
    if not any(only in name for name in OPERATIONS):
        sys.exit(f"--only: expected part of one of {', '.join(OPERATIONS)}, got {only}")
    interpreter.start()
    float_arguments()
    lost_zeros()
    without_autotuning()
    from mantrans.ops import registration

    registration.BACKENDS["cpu"] = "triton"
    failures: dict[tuple[str, str], list[str]] = {}
    print("| operation | dtype | result | " + " | ".join(RIVALS) + " |")
    print("|---" * (3 + len(RIVALS)) + "|")
    for operation, row in rows().items():
        if only not in operation:
            continue
        failed: dict[str, str] = {}
        for dtype in DTYPES:
            kind = str(dtype).removeprefix("torch.")
            for result, by in errors(row, dtype, failed):
                cells = (f"{by[who]:.1e}" if who in by else "-" for who in RIVALS)
                print(
                    f"| {operation} | {kind} | {result} | " + " | ".join(cells) + " |", flush=True
                )
        for who_and_why in failed.items():
            failures.setdefault(who_and_why, []).append(operation)
    for (who, why), names in failures.items():
        print(f"\n{who}, {', '.join(names)}: {why}")


if __name__ == "__main__":
    main()
