"""Every operation's largest error against float64, beside that of PyTorch's own in the same dtype.

    python -m tools.accuracy --write docs/accuracy.md     on a CPU, Triton interpreted
    python -m tools.accuracy --results                    each result of an operation apart
    python -m tools.accuracy --device cuda                on a GPU

The operations are those of `mantrans.kernels.operations`, on ordinary and on hard inputs; the exact
result is PyTorch's way with autograd in float64. An error is measured in the dtype's eps times a
scale, which is the largest magnitude of the exact row, or of a whole vector, unless a case says
otherwise. A new operation is a `Case` in CASES.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from textwrap import fill
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.sgd import sgd as functional_sgd

from mantrans.kernels import operations as described
from mantrans.kernels.backend import choose
from mantrans.kernels.operations import EPS, Draw, Inputs, Operation, Results, Shapes
from mantrans.kernels.reference import widen

FACTOR, FLOOR, FLOAT64 = 4, 4, 32
PROMISE = (
    f"No error is larger than {FACTOR} times that of PyTorch's own operation on the same inputs in "
    f"the same dtype, or than {FLOOR} eps if that is more; in float64, on ordinary inputs, none is "
    f"larger than {FLOAT64} eps."
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
BACKENDS = ("reference", "native", "triton")

# --------------------------------------------------------------- operations as they are judged here


class LayerNorm(described.AddLayerNorm):
    """Without the sum before it."""

    name = "layer_norm"
    leaves, upstream = ("residual", "weight", "bias"), {"y": "dy"}

    def forward(self, ops: Any, i: Inputs) -> Results:
        results = ops.layer_norm_forward(i["residual"], i["weight"], i["bias"], EPS)
        return dict(zip(("y", "mean", "rstd"), results, strict=True))

    def backward(self, ops: Any, i: Inputs, saved: Results) -> Results:
        dweight, dbias, statistics = i["dweight"], i["dbias"], (saved["mean"], saved["rstd"])
        dx = ops.layer_norm_backward(
            i["dy"], i["residual"], i["weight"], *statistics, dweight, dbias
        )
        return {"dresidual": dx, "dweight": dweight, "dbias": dbias}

    def plain(self, i: Inputs) -> Results:
        x = i["residual"]
        return {"y": F.layer_norm(x, x.shape[-1:], i["weight"], i["bias"], EPS)}


class Losses(described.FusedCrossEntropy):
    """Each row's loss, not their sum."""

    upstream: ClassVar[Mapping[str, str]] = {"losses": "scale"}

    def plain(self, i: Inputs) -> Results:
        logits = widen(i["logits"][:, : i["V"]])
        return {"losses": F.cross_entropy(logits, i["targets"], reduction="none")}


class Sgd(described.Sgd):
    """Beside PyTorch's."""

    def plain(self, i: Inputs) -> Results:
        weights = i["weights"] if i["master"] is None else i["master"]
        functional_sgd(
            [weights], [i["gradients"] * described.CLIP], [None], maximize=False, foreach=False,
            weight_decay=described.WEIGHT_DECAY, momentum=0.0, lr=described.LEARNING_RATE,
            dampening=0.0, nesterov=False,
        )  # fmt: skip
        return {"weights": weights}


# ------------------------------------------------------------------------- ordinary and hard inputs

Edit = Callable[[dict[str, Any]], object]


def scaled(factor: float, *names: str) -> Edit:
    return lambda i: [i[name].mul_(factor) for name in names]


def shifted(by: float, *names: str) -> Edit:
    return lambda i: [i[name].add_(by) for name in names]


def constant_rows(i: dict[str, Any]) -> None:
    """0.1 and 100000.1 have no exact binary form, so that the mean of equal numbers is rounded."""
    rows = torch.tensor([0.1, 100000.1, -3.3e7, 1e9]).to(i["residual"])
    i["residual"].copy_(rows[:, None].expand_as(i["residual"]))
    i["branch"].zero_()


def offset_scores(i: dict[str, Any]) -> None:
    """A direction that all queries and keys share adds 1,000 to every score of D = 16."""
    H, H_kv = i["heads"]
    heads = i["qkv"].unflatten(-1, (H + 2 * H_kv, -1))
    heads[..., :H, 0], heads[..., H : H + H_kv, 0] = 4 * 1000**0.5, 1000**0.5


def scaled_heads(scores: float, values: float) -> Edit:
    """Factors of queries and of keys, and of values."""

    def edit(i: dict[str, Any]) -> None:
        H, H_kv = i["heads"]
        heads = i["qkv"].unflatten(-1, (H + 2 * H_kv, -1))
        heads[..., : H + H_kv, :] *= scores
        heads[..., H + H_kv :, :] *= values

    return edit


def sure(i: dict[str, Any]) -> None:
    """The target's logit is 5 to 22 above the others: losses of 5 to 1e-7."""
    N = len(i["targets"])
    above = torch.linspace(5, 22, N, device=i["targets"].device)
    rows, targets = torch.arange(N), i["targets"].clamp(min=0)
    i["logits"][rows, targets] += above.to(i["logits"])


def gradient_sizes(*sizes: float) -> Edit:
    """Gradients of several sizes side by side, and moments as if they had always been so. All are
    positive, so that a moment does not cancel."""

    def edit(i: dict[str, Any]) -> None:
        parts = zip(sizes, *(i[name].chunk(len(sizes)) for name in GRADIENTS), strict=True)
        for size, gradient, m, v in parts:
            gradient.abs_().mul_(size)
            m.abs_().mul_(size)
            v *= size**2

    return edit


GRADIENTS = ("gradients", "exp_avg", "exp_avg_sq")


def one_token(i: dict[str, Any]) -> None:
    i["tokens"].zero_()
    i["dx"].fill_(0.1)


class Kind(NamedTuple):
    """One kind of inputs of an operation."""

    shapes: Shapes
    edit: Edit = lambda i: None


class Case(NamedTuple):
    """An operation and its inputs, the ordinary ones first.

    scales: of results that are not measured by rows: "element", "whole", or the name of an input,
    whose largest magnitude the scale is at least.
    """

    operation: Operation
    kinds: Mapping[str, Kind]
    scales: Mapping[str, str] = {}

    @property
    def name(self) -> str:
        return self.operation.name


ROWS, LINEAR = Shapes(N=32, C=768), Shapes(N=64, C=128, F=96)
NORM = {
    "ordinary": Kind(ROWS),
    "many rows": Kind(Shapes(N=2048, C=24)),
    "wide rows": Kind(Shapes(N=2, C=8192)),
    "large mean": Kind(ROWS, shifted(1e4, "residual")),
    "larger mean": Kind(ROWS, shifted(1e6, "residual")),
    "constant": Kind(Shapes(N=4, C=768), constant_rows),
    "huge": Kind(ROWS, scaled(1e15, "residual", "branch")),
    "tiny": Kind(ROWS, scaled(1e-15, "residual", "branch")),
}
NORM_SCALES = {"dweight": "dy"}  # times (x - mean) / std, which is 0 for constant rows
HEADS = Shapes(B=1, T=64, H=2, H_kv=2, D=16)
ATTENTION = {
    "ordinary": Kind(HEADS),
    "long": Kind(HEADS._replace(T=200)),
    "near ties": Kind(HEADS, scaled_heads(1e-3, 1.0)),
    "large scores": Kind(HEADS, scaled_heads(4.0, 1.0)),
    "large offset": Kind(HEADS, offset_scores),
    "huge": Kind(HEADS, scaled_heads(1.0, 1e15)),
}
# A query that sees one key, or hardly more, has no gradient but roundings.
ATTENTION_SCALES = {"dqkv": "whole"}
LOGITS = Shapes(N=32, V=1024, Vp=1024)
PROJECTION = Shapes(N=64, C=64, V=500, Vp=512)
TOKENS = Shapes(B=4, T=32, C=48, V=50, Vp=64)
GELU = Shapes(N=64, F=192)
MATRICES = Shapes(B=2, F=48, C=32)
UPDATES = {
    "ordinary": Kind(Shapes(P=4099), gradient_sizes(1.0)),
    "1e-25 to 1e18": Kind(Shapes(P=4100), gradient_sizes(1e-25, 1e-6, 1e6, 1e18)),
}

CASES = [
    Case(
        described.Linear(),
        {
            "ordinary": Kind(LINEAR),
            "long sum": Kind(Shapes(N=4, C=16384, F=8)),
            "many rows": Kind(Shapes(N=8192, C=8, F=8)),
            "large mean": Kind(LINEAR, shifted(1e3, "x")),
            "huge": Kind(LINEAR, scaled(1e17, "x", "weight", "bias")),
        },
    ),
    Case(LayerNorm(), NORM, NORM_SCALES),
    Case(described.AddLayerNorm(), NORM, NORM_SCALES),
    Case(described.AddRmsNorm(), NORM),
    Case(described.Attention(), ATTENTION, ATTENTION_SCALES),
    Case(described.DocumentAttention(), ATTENTION, ATTENTION_SCALES),
    Case(described.WindowAttention(), ATTENTION, ATTENTION_SCALES),
    Case(
        described.Rotary(),
        {
            "ordinary": Kind(HEADS),
            "long": Kind(HEADS._replace(T=2048, D=4)),
            "huge": Kind(HEADS, scaled(1e15, "qkv", "drotated")),
        },
    ),
    Case(
        described.NormRotary(),
        {
            "ordinary": Kind(HEADS),
            "many rows": Kind(HEADS._replace(T=2048, D=4)),
            "wide rows": Kind(HEADS._replace(T=4, D=256)),
            "huge": Kind(HEADS, scaled(1e15, "qkv")),
            "tiny": Kind(HEADS, scaled(1e-15, "qkv")),
        },
    ),
    Case(
        described.BiasGelu(),
        {
            "ordinary": Kind(GELU),
            "tiny": Kind(GELU, scaled(1e-15, "h", "bias")),
            "negative": Kind(GELU, shifted(-4.0, "h")),
            "huge": Kind(GELU, scaled(1e10, "h", "bias")),
        },
    ),
    Case(
        described.SwiGLU(),
        {
            "ordinary": Kind(GELU),
            "tiny": Kind(GELU, scaled(1e-15, "h")),
            "negative": Kind(GELU, shifted(-4.0, "h")),
            "large mean": Kind(GELU, shifted(15.0, "h")),
            "huge": Kind(GELU, scaled(1e10, "h")),
        },
    ),
    Case(
        Losses(),
        {
            "ordinary": Kind(LOGITS),
            "long sum": Kind(Shapes(N=4, V=50257, Vp=50304)),
            "near ties": Kind(LOGITS, scaled(1e-4, "logits")),
            "sure": Kind(LOGITS, sure),
            "large offset": Kind(LOGITS, shifted(1e4, "logits")),
            "larger offset": Kind(LOGITS, shifted(1e7, "logits")),
            "huge": Kind(LOGITS, scaled(1e30, "logits")),
        },
        {"losses": "element"},
    ),
    Case(
        described.LinearCrossEntropy(),
        {
            "ordinary": Kind(PROJECTION),
            "many rows": Kind(Shapes(N=300, C=8, V=128, Vp=128)),
            "long sum": Kind(Shapes(N=4, C=32, V=32768, Vp=32768)),
            "large mean": Kind(PROJECTION, shifted(100.0, "x")),
            "large scores": Kind(PROJECTION, scaled(30.0, "x")),
        },
        {"dweight": "whole"},  # the rows of unlikely tokens are all but 0
    ),
    Case(
        described.Embedding(),
        {
            "ordinary": Kind(TOKENS),
            "one token": Kind(Shapes(B=8, T=256, C=4, V=1, Vp=1), one_token),
            "large mean": Kind(TOKENS, shifted(1e4, "token_table", "dx")),
        },
    ),
    Case(
        described.GradientNorms(),
        {
            "ordinary": Kind(Shapes(P=100_003)),
            "long sum": Kind(Shapes(P=2**22 + 5)),
            "huge": Kind(Shapes(P=100_003), scaled(1e18, "gradients")),
            "tiny": Kind(Shapes(P=100_003), scaled(1e-15, "gradients")),
        },
    ),
    Case(described.AdamW(), UPDATES, dict.fromkeys(GRADIENTS, "element")),
    Case(Sgd(), UPDATES),
    Case(
        described.NesterovMomentum(),
        {
            "ordinary": Kind(Shapes(P=100_003)),
            "huge": Kind(Shapes(P=100_003), scaled(1e18, "gradients", "exp_avg")),
            "tiny": Kind(Shapes(P=100_003), scaled(1e-15, "gradients", "exp_avg")),
        },
    ),
    Case(
        described.Orthogonalize(),
        {
            "ordinary": Kind(MATRICES),
            "wide rows": Kind(MATRICES._replace(F=16, C=512)),
            "huge": Kind(MATRICES, scaled(1e18, "matrices")),
            "tiny": Kind(MATRICES, scaled(1e-5, "matrices")),  # norms are above EPS
        },
        {"matrices": "whole"},
    ),
]

# ------------------------------------------------------------------------------------- measurement


def copied(inputs: Inputs, double: bool = False, leaves: Sequence[str] = ()) -> dict[str, Any]:
    """A copy for one run, which may write to it; in float64, or with leaves for autograd."""

    def copy(x: Any, is_leaf: bool) -> Any:
        if isinstance(x, tuple):
            return tuple(copy(part, False) for part in x)
        if not isinstance(x, Tensor):
            return x
        dtype = torch.float64 if double and x.is_floating_point() else x.dtype
        return x.to(dtype, copy=True).requires_grad_(is_leaf)

    return {name: copy(x, name in leaves) for name, x in inputs.items()}


def ours(operation: Operation, ops: Any, inputs: Inputs) -> Results:
    """Results and gradients by the backend `ops`."""
    i = copied(inputs)
    results = operation.forward(ops, i)
    if operation.leaves and not any(f"d{name}" in results for name in operation.leaves):
        results |= operation.backward(ops, i, results)
    return results | {name: i[name] for name in getattr(operation, "moments", ())}


def theirs(operation: Operation, inputs: Inputs, double: bool = False) -> Results:
    """The same by PyTorch with autograd."""
    i = copied(inputs, double, operation.leaves)
    results = operation.plain(i)
    if operation.leaves:
        outputs = [results[name] for name in operation.upstream]
        upstream = [
            i[name].expand_as(y).to(y)
            for name, y in zip(operation.upstream.values(), outputs, strict=True)
        ]
        gradients = torch.autograd.grad(outputs, [i[name] for name in operation.leaves], upstream)
        results |= {f"d{name}": g for name, g in zip(operation.leaves, gradients, strict=True)}
    if "loss" in results:
        results["loss"] = results["loss"] * i["scale"]
    return results | {name: i[name] for name in getattr(operation, "moments", ())}


def error(
    case: Case, output: str, actual: Tensor, exact: Tensor, inputs: Inputs, dtype: torch.dtype
) -> float:
    """The largest, as the head of this file says; infinite where an element is not finite."""
    scale_of, numbers = case.scales.get(output, "row"), torch.finfo(dtype)
    actual, exact = (x.detach().double().cpu() for x in (actual, exact))
    if not exact.dim() or scale_of == "element":
        exact = exact.reshape(-1, 1)
    scale = exact.abs().amax() if scale_of == "whole" else exact.abs().amax(-1, keepdim=True)
    if scale_of in inputs:
        scale = scale.maximum(inputs[scale_of].abs().max().double().cpu())
    unit = scale.clamp(min=numbers.tiny) * numbers.eps
    errors = (actual.reshape(exact.shape) - exact).abs() / unit
    return errors.nan_to_num(nan=math.inf, posinf=math.inf).max().item()


Errors = dict[str, dict[str, float]]  # output -> column -> error; the column "PyTorch" is theirs


def measure(
    case: Case, kind: str, dtype: torch.dtype, backends: Sequence[str], device: torch.device
) -> Errors:
    """The errors of one operation on one kind of inputs."""
    operation, (shapes, edit) = case.operation, case.kinds[kind]
    inputs = dict(operation.inputs(shapes, Draw(dtype, device)))
    edit(inputs)
    for name in operation.leaves:
        if f"d{name}" in inputs and f"d{name}" not in operation.upstream.values():
            inputs[f"d{name}"].zero_()  # a sum with 1 would hide a small gradient's digits
    exact = theirs(operation, inputs, double=True)
    columns = {"PyTorch": theirs(operation, inputs)}
    for name in backends:
        if name != "triton" or dtype != torch.float64:
            columns[name] = ours(operation, choose(name, device), inputs)
    return {
        output: {
            column: error(case, output, found[output], value, inputs, dtype)
            for column, found in columns.items()
        }
        for output, value in exact.items()
    }


def broken_promises(case: Case, dtype: torch.dtype, kind: str, errors: Errors) -> Iterator[str]:
    """Where PROMISE is not kept."""
    if dtype == torch.float64 and kind != "ordinary":
        return
    for output, columns in errors.items():
        theirs = columns["PyTorch"]
        limit = FLOAT64 if dtype == torch.float64 else max(FACTOR * theirs, FLOOR)
        for column, found in columns.items():
            if found > limit:
                where = f"{case.name}, {str(dtype).removeprefix('torch.')}, {kind}, {output}"
                yield f"{where}: {column} {found:.3g} eps, PyTorch {theirs:.3g}"


# ----------------------------------------------------------------------------------------- the page


def shown(value: float) -> str:
    if math.isinf(value):
        return "∞"
    return f"{value:.1f}" if value < 100 else f"{value:.0e}".replace("e+0", "e").replace("e+", "e")


Found = dict[tuple[str, str, str, bool], float]  # line, dtype, column, ordinary -> largest error


def cell(found: Found, line: str, dtype: str, column: str) -> str:
    ordinary, hard = (shown(found[line, dtype, column, easy]) for easy in (True, False))
    return ordinary if dtype == "float64" else f"{ordinary} · {hard}"


def table(
    backends: Sequence[str], device: torch.device, results: bool
) -> tuple[list[str], list[str]]:
    """The table's lines, and the broken promises. results: a line a result, not a line an
    operation, which has the largest error of all its results."""
    columns = [
        (dtype, column)
        for dtype in DTYPES
        for column in ("PyTorch", *backends)
        if dtype != "float64" or column not in ("PyTorch", "triton")
    ]
    lines = [
        "| operation | " + " | ".join(" ".join(names) for names in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    broken: list[str] = []
    for case in CASES:
        found: Found = {}
        for dtype in DTYPES:
            for kind in case.kinds:
                errors = measure(case, kind, DTYPES[dtype], backends, device)
                broken += broken_promises(case, DTYPES[dtype], kind, errors)
                for output, values in errors.items():
                    for column, value in values.items():
                        line = f"{case.name} {output}" if results else case.name
                        key = (line, dtype, column, kind == "ordinary")
                        found[key] = max(found.get(key, 0.0), value)
        for line in dict.fromkeys(key[0] for key in found):
            cells = " | ".join(cell(found, line, *where) for where in columns)
            lines.append(f"| {line} | {cells} |")
    return lines, broken


INTRODUCTION = """\
# Accuracy

Written by `python -m tools.accuracy --write docs/accuracy.md`; do not edit.

**{promise}**

{kinds}

A line has the largest error of all results of its operation, gradients included; `python -m
tools.accuracy --results` prints each apart, and the tests hold each to the promise.

The exact result is PyTorch's with autograd in float64, on the same, already rounded inputs. An
error is measured in eps of the dtype (1.2e-7 in float32, 7.8e-3 in bfloat16) times the largest
magnitude of its row of the exact result: rounding that result costs half an eps at most. For
vectors, for the gradients of attention and for that of the output table it is the whole tensor's
magnitude, for a loss, a norm or a moment its own. ∞: not finite. In float64 the exact result is
PyTorch's own, so that the columns say how far apart the two are.

In bfloat16 our gradients of weights are float32, PyTorch's are bfloat16; masters, moments and the
norm are float32 in both. Native, and all matrix products but the reference's, are PyTorch's kernels
called without autograd.

Measured on {device} with torch {torch}, Triton {triton}.

"""


def page(lines: list[str], device: torch.device) -> str:
    kinds = dict.fromkeys(kind for case in CASES for kind in case.kinds if kind != "ordinary")
    cells = "A cell is the error on ordinary inputs · on hard ones: "
    head = INTRODUCTION.format(
        promise=PROMISE,
        kinds=fill(f"{cells}{', '.join(kinds)}. In float64 only the first is shown.", 100),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU",
        torch=torch.__version__,
        triton=metadata.version("triton") + ("" if device.type == "cuda" else ", interpreted"),
    )
    return head + "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="FILE", help="where to write; else printed")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--results", action="store_true", help="a line a result")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cpu" and "triton" in options.backends:
        from tests.support import interpreter

        interpreter.start()
    lines, broken = table(options.backends, device, options.results)
    if options.write:
        options.write.write_text(page(lines, device), encoding="utf-8")
    else:
        print(page(lines, device))
    for line in broken:
        print(line)
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
