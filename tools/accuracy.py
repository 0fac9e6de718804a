"""Every operation's largest error against float64, beside that of PyTorch's own in the same dtype.

    python -m tools.accuracy --write docs/accuracy.md     on a CPU, Triton interpreted
    python -m tools.accuracy --device cuda                on a GPU

An operation is a `Case`: inputs of several kinds, what our operations make of them, and the same by
PyTorch with autograd, which in float64 is the exact result. A new operation is a `Case` in CASES.

An error is measured in the dtype's eps times a scale, which is the largest magnitude of the exact
row, or of a whole vector, unless the case says otherwise.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mantrans.kernels import reference
from mantrans.kernels.backend import choose
from mantrans.kernels.reference import wide_dtype

FACTOR, FLOOR, FLOAT64 = 3, 3, 32
PROMISE = (
    f"No error is larger than {FACTOR} times that of PyTorch's own operation on the same inputs in "
    f"the same dtype, or than {FLOOR} eps if that is more; in float64, on ordinary inputs, none is "
    f"larger than {FLOAT64} eps."
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
BACKENDS = ("reference", "native", "triton")
EPS = 1e-5  # of layer norm

Inputs = dict[str, Any]
Outputs = dict[str, Tensor]


class Case(NamedTuple):
    """An operation. kinds: "ordinary" first, then the hard ones: functions that draw float64
    inputs. scales: of outputs that are not measured by rows: "element", "whole", or the name of an
    input, whose largest magnitude the scale is at least."""

    name: str
    kinds: dict[str, Callable[[], Inputs]]
    ours: Callable[[Any, Inputs], Outputs]
    theirs: Callable[[Inputs], Outputs]
    scales: dict[str, str] = {}  # noqa: RUF012


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def zeros_for(x: Tensor) -> Tensor:
    """A gradient buffer for a weight."""
    return torch.zeros_like(x, dtype=wide_dtype(x.dtype))


def leaf(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


def differentiated(output: str, y: Tensor, dy: Tensor, **leaves: Tensor) -> Outputs:
    """y under the name `output`, and d-name for each leaf, by autograd."""
    gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    found = {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {output: y.detach()} | found


# ----------------------------------------------------------------------------------------- linear


def linear_inputs(N: int, K: int, M: int, mean: float = 0.0, size: float = 1.0) -> Inputs:
    return {
        "x": (randn(N, K) + mean) * size,
        "weight": randn(M, K) * K**-0.5 * size,
        "bias": randn(M) * size,
        "dy": randn(N, M),
    }


def linear_ours(ops: Any, i: Inputs) -> Outputs:
    dweight, dbias = zeros_for(i["weight"]), zeros_for(i["bias"])
    y = ops.linear_forward(i["x"], i["weight"], i["bias"])
    dx = ops.linear_backward(i["dy"], i["x"], i["weight"], dweight, dbias)
    return {"y": y, "dx": dx, "dweight": dweight, "dbias": dbias}


def linear_theirs(i: Inputs) -> Outputs:
    x, weight, bias = (leaf(i[name]) for name in ("x", "weight", "bias"))
    return differentiated("y", F.linear(x, weight, bias), i["dy"], x=x, weight=weight, bias=bias)


LINEAR = Case(
    "linear",
    {
        "ordinary": lambda: linear_inputs(64, 128, 96),
        "long sum": lambda: linear_inputs(4, 16384, 8),
        "many rows": lambda: linear_inputs(8192, 8, 8),
        "large mean": lambda: linear_inputs(64, 128, 96, mean=1e3),
        "huge": lambda: linear_inputs(64, 128, 96, size=1e17),
    },
    linear_ours,
    linear_theirs,
)

# ------------------------------------------------------------------------------------- layer norm


def norm_inputs(N: int, C: int, mean: float = 0.0, size: float = 1.0) -> Inputs:
    return {
        "x": (randn(N, C) + mean) * size,
        "branch": randn(N, C) * size,
        "weight": randn(C),
        "bias": randn(C),
        "dy": randn(N, C),
    }


def constant_rows() -> Inputs:
    """0.1 and 100000.1 have no exact binary form, so that the mean is rounded."""
    rows = torch.tensor([0.1, 100000.1, -3.3e7, 1e9], dtype=torch.float64)[:, None]
    return norm_inputs(4, 768) | {"x": rows.repeat(1, 768), "branch": randn(4, 768) * 0}


def norm_ours(ops: Any, i: Inputs) -> Outputs:
    dweight, dbias = zeros_for(i["weight"]), zeros_for(i["bias"])
    y, *saved = ops.layer_norm_forward(i["x"], i["weight"], i["bias"], EPS)
    dx = ops.layer_norm_backward(i["dy"], i["x"], i["weight"], *saved, dweight, dbias)
    return {"y": y, "dx": dx, "dweight": dweight, "dbias": dbias}


def norm_theirs(i: Inputs) -> Outputs:
    x, weight, bias = (leaf(i[name]) for name in ("x", "weight", "bias"))
    y = F.layer_norm(x, x.shape[-1:], weight, bias, EPS)
    return differentiated("y", y, i["dy"], x=x, weight=weight, bias=bias)


def add_norm_ours(ops: Any, i: Inputs) -> Outputs:
    dweight, dbias, weight = zeros_for(i["weight"]), zeros_for(i["bias"]), i["weight"]
    y, x, *saved = ops.add_layer_norm_forward(i["branch"], i["x"], weight, i["bias"], EPS)
    dx = ops.layer_norm_backward(i["dy"], x, weight, *saved, dweight, dbias)
    return {"y": y, "dx": dx, "dweight": dweight, "dbias": dbias}


def add_norm_theirs(i: Inputs) -> Outputs:
    x, weight, bias = (leaf(i[name]) for name in ("summed", "weight", "bias"))
    y = F.layer_norm(x, x.shape[-1:], weight, bias, EPS)
    return differentiated("y", y, i["dy"], x=x, weight=weight, bias=bias)


NORM_KINDS = {
    "ordinary": lambda: norm_inputs(32, 768),
    "many rows": lambda: norm_inputs(2048, 24),
    "wide": lambda: norm_inputs(4, 8192),
    "large mean": lambda: norm_inputs(32, 768, mean=1e4),
    "larger mean": lambda: norm_inputs(32, 768, mean=1e6),
    "constant": constant_rows,
    "huge": lambda: norm_inputs(32, 768, size=1e15),
    "tiny": lambda: norm_inputs(32, 768, size=1e-15),
}
NORM_SCALES = {"dweight": "dy"}  # times (x - mean) / std, which is 0 for constant rows
LAYER_NORM = Case("layer norm", NORM_KINDS, norm_ours, norm_theirs, NORM_SCALES)
ADD_LAYER_NORM = Case("add + layer norm", NORM_KINDS, add_norm_ours, add_norm_theirs, NORM_SCALES)

# -------------------------------------------------------------------------------------- attention


def attention_inputs(T: int, size: float = 1.0, offset: float = 0.0, values: float = 1.0) -> Inputs:
    """offset: of every score, by a direction that all queries and keys share. B = 1, H = 2."""
    q, k, v = randn(3, 1, T, 2, 16)
    q, k, v = q * size, k * size, v * values
    q[..., 0], k[..., 0] = 4 * offset**0.5, offset**0.5
    starts = torch.zeros(1, T, dtype=torch.int32)
    starts[:, T // 3 :], starts[:, T // 2 :] = T // 3, T // 2
    return {
        "qkv": torch.cat([x.flatten(2) for x in (q, k, v)], -1),
        "dout": randn(1, T, 32),
        "starts": starts,
    }


def attention_case(name: str, documents: bool) -> Case:
    def ours(ops: Any, i: Inputs) -> Outputs:
        starts = i["starts"] if documents else None
        out, *saved = ops.attention_forward(i["qkv"], 2, starts)
        dqkv = ops.attention_backward(i["dout"], i["qkv"], out, *saved, 2, starts)
        return {"out": out} | dict(zip(("dq", "dk", "dv"), dqkv.chunk(3, -1), strict=True))

    def theirs(i: Inputs) -> Outputs:
        qkv = leaf(i["qkv"])
        q, k, v = (x.unflatten(2, (2, 16)).transpose(1, 2) for x in qkv.chunk(3, -1))
        seen = reference.visible(qkv.shape[1], i["starts"], qkv.device) if documents else None
        out = F.scaled_dot_product_attention(q, k, v, seen, is_causal=not documents)
        found = differentiated("out", out.transpose(1, 2).flatten(2), i["dout"], qkv=qkv)
        dqkv = found.pop("dqkv")
        return found | dict(zip(("dq", "dk", "dv"), dqkv.chunk(3, -1), strict=True))

    kinds = {
        "ordinary": lambda: attention_inputs(64),
        "long": lambda: attention_inputs(320),
        "near ties": lambda: attention_inputs(64, size=1e-3),
        "large scores": lambda: attention_inputs(64, size=4.0),
        "large offset": lambda: attention_inputs(64, offset=1e3),
        "huge values": lambda: attention_inputs(64, values=1e15),
    }
    # a query that sees one key, or hardly more, has no gradient but roundings
    return Case(name, kinds, ours, theirs, dict.fromkeys(("dq", "dk", "dv"), "whole"))


# ------------------------------------------------------------------------------------------- GELU


def gelu_inputs(size: float, mean: float = 0.0) -> Inputs:
    return {"h": randn(64, 192) * size + mean, "bias": randn(192) * size, "dy": randn(64, 192)}


def gelu_ours(ops: Any, i: Inputs) -> Outputs:
    dbias = zeros_for(i["bias"])
    y = ops.bias_gelu_forward(i["h"], i["bias"])
    return {"y": y, "dh": ops.bias_gelu_backward(i["dy"], i["h"], i["bias"], dbias), "dbias": dbias}


def gelu_theirs(i: Inputs) -> Outputs:
    h, bias = leaf(i["h"]), leaf(i["bias"])
    y = F.gelu(h + bias, approximate="tanh")
    return differentiated("y", y, i["dy"], h=h, bias=bias)


GELU = Case(
    "bias + GELU",
    {
        "ordinary": lambda: gelu_inputs(1.0),
        "tiny": lambda: gelu_inputs(1e-15),
        "negative": lambda: gelu_inputs(0.5, mean=-4.0),
        "huge": lambda: gelu_inputs(1e10),
    },
    gelu_ours,
    gelu_theirs,
)

# ---------------------------------------------------------------------------------- cross-entropy


def loss_inputs(logits: Tensor, sure: bool = False) -> Inputs:
    """sure: the targets are the largest logits, so that losses are small."""
    N, V = logits.shape
    targets = logits.argmax(-1) if sure else torch.randint(0, V, (N,))
    targets[::5] = reference.IGNORE_INDEX
    return {"logits": logits, "targets": targets, "scale": torch.tensor(1 / N).double()}


def sure_logits(N: int, V: int) -> Tensor:
    """One logit of each row is 5 to 22 above the others: a loss of 5 to 1e-7."""
    logits = randn(N, V)
    logits[torch.arange(N), torch.randint(0, V, (N,))] += torch.linspace(5, 22, N).double()
    return logits


def loss_ours(ops: Any, i: Inputs) -> Outputs:
    z, targets, V = i["logits"].clone(), i["targets"], i["logits"].shape[1]
    losses = ops.cross_entropy_forward_backward(z, targets, i["scale"], V)
    return {"losses": losses, "dlogits": z}


def loss_theirs(i: Inputs) -> Outputs:
    z = leaf(i["logits"])
    losses = F.cross_entropy(z, i["targets"], reduction="none")
    return differentiated("losses", losses, i["scale"].expand(len(z)), logits=z)


CROSS_ENTROPY = Case(
    "cross-entropy",
    {
        "ordinary": lambda: loss_inputs(randn(32, 1024) * 2),
        "long sum": lambda: loss_inputs(randn(4, 50304)),
        "near ties": lambda: loss_inputs(randn(32, 1024) * 1e-4),
        "sure": lambda: loss_inputs(sure_logits(32, 1024), sure=True),
        "large offset": lambda: loss_inputs(randn(32, 1024) + 1e4),
        "larger offset": lambda: loss_inputs(randn(32, 1024) * 4 + 1e7),
        "huge": lambda: loss_inputs(randn(32, 1024) * 1e30),
    },
    loss_ours,
    loss_theirs,
    scales={"losses": "element"},
)


def projected_inputs(N: int, C: int, V: int, size: float = 1.0, mean: float = 0.0) -> Inputs:
    x, weight = randn(N, C) * size + mean, randn(V, C) * C**-0.5
    return loss_inputs(x @ weight.T) | {"x": x, "weight": weight}


def projected_ours(ops: Any, i: Inputs) -> Outputs:
    dweight, V = zeros_for(i["weight"]), len(i["weight"])
    loss, dx = ops.linear_cross_entropy_forward_backward(
        i["x"], i["weight"], i["targets"], i["scale"], dweight, V
    )
    return {"loss": loss, "dx": dx, "dweight": dweight}


def projected_theirs(i: Inputs) -> Outputs:
    x, weight = leaf(i["x"]), leaf(i["weight"])
    loss = F.cross_entropy(F.linear(x, weight), i["targets"], reduction="sum") * i["scale"]
    return differentiated("loss", loss, torch.ones_like(loss), x=x, weight=weight)


LINEAR_CROSS_ENTROPY = Case(
    "linear + cross-entropy",
    {
        "ordinary": lambda: projected_inputs(64, 64, 512),
        "many rows": lambda: projected_inputs(2048, 8, 128),
        "long sum": lambda: projected_inputs(4, 32, 32768),
        "large mean": lambda: projected_inputs(64, 64, 512, mean=100.0),
        "large scores": lambda: projected_inputs(64, 64, 512, size=30.0),
    },
    projected_ours,
    projected_theirs,
)

# -------------------------------------------------------------------------------------- embedding


def embedding_inputs(B: int, T: int, V: int, dx: Tensor, size: float = 1.0) -> Inputs:
    return {
        "tokens": torch.randint(0, V, (B, T)),
        "table": randn(V, dx.shape[-1]) * size,
        "positions": randn(T, dx.shape[-1]),
        "dx": dx,
    }


def embedding_ours(ops: Any, i: Inputs) -> Outputs:
    dtable, dpositions = zeros_for(i["table"]), zeros_for(i["positions"])
    x = ops.embedding_forward(i["tokens"], i["table"], i["positions"])
    ops.embedding_backward(i["dx"], i["tokens"], dtable, dpositions)
    return {"x": x, "dtable": dtable, "dpositions": dpositions}


def embedding_theirs(i: Inputs) -> Outputs:
    table, positions = leaf(i["table"]), leaf(i["positions"])
    x = F.embedding(i["tokens"], table) + positions
    return differentiated("x", x, i["dx"], table=table, positions=positions)


EMBEDDING = Case(
    "embedding",
    {
        "ordinary": lambda: embedding_inputs(4, 32, 50, randn(4, 32, 48)),
        "one token": lambda: embedding_inputs(64, 256, 1, torch.full((64, 256, 4), 0.1).double()),
        "large offset": lambda: embedding_inputs(4, 32, 5, randn(4, 32, 48) + 1e4, size=1e4),
    },
    embedding_ours,
    embedding_theirs,
)

# -------------------------------------------------------------------------------- gradients, steps


def norm_of_gradients(size: int, scale: float = 1.0) -> Callable[[], Inputs]:
    return lambda: {"gradients": randn(size) * scale, "wide": True}


def vector_norm(i: Inputs) -> Outputs:
    return {"norm": torch.linalg.vector_norm(i["gradients"])}


GRADIENT_NORM = Case(
    "gradient norm",
    {
        "ordinary": norm_of_gradients(100_003),
        "long sum": norm_of_gradients(2**23 + 5),
        "huge": norm_of_gradients(100_003, 1e18),
        "tiny": norm_of_gradients(100_003, 1e-15),
    },
    lambda ops, i: {"norm": ops.gradient_norm(i["gradients"])},
    vector_norm,
    scales={"norm": "element"},
)
RATE, DECAY, STEPS = 1e-2, 0.1, 4


def step_inputs(*sizes: float) -> Callable[[], Inputs]:
    """A row of weights for each size of gradients. wide: masters and gradients are never narrow."""
    scale = torch.tensor(sizes, dtype=torch.float64)[:, None]
    return lambda: {
        "master": randn(len(sizes), 640),
        "gradients": randn(STEPS, len(sizes), 640) * scale,
        "wide": True,
    }


def steps_ours(name: str) -> Callable[[Any, Inputs], Outputs]:
    def run(ops: Any, i: Inputs) -> Outputs:
        w, dtype = i["master"].clone().flatten(), i["dtype"]
        weights, master = (w, None) if dtype == w.dtype else (w.to(dtype), w)
        m, v = torch.zeros_like(w), torch.zeros_like(w)
        rate, clip = w.new_tensor(RATE), w.new_tensor(1.0)
        finite = torch.tensor(True, device=w.device)
        for step, gradient in enumerate(i["gradients"], start=1):
            common = (weights, master, gradient.flatten().clone())
            rates = (rate, clip, finite)
            if name == "sgd":
                ops.sgd_update(*common, *rates, DECAY)
            else:
                count = w.new_tensor(float(step))
                ops.adamw_update(*common, m, v, count, *rates, 0.9, 0.95, 1e-8, DECAY)
        found = {"weights": weights} if name == "sgd" else {"weights": weights, "m": m, "v": v}
        return {key: x.view(i["master"].shape) for key, x in found.items()}

    return run


def steps_theirs(name: str) -> Callable[[Inputs], Outputs]:
    def run(i: Inputs) -> Outputs:
        w = leaf(i["master"])
        options: dict[str, Any] = {"lr": RATE, "weight_decay": DECAY}
        if name == "sgd":
            # decoupled, as ours: PyTorch's SGD would add the decay to the gradient, the same here
            optimizer: torch.optim.Optimizer = torch.optim.SGD([w], **options)
        else:
            optimizer = torch.optim.AdamW([w], betas=(0.9, 0.95), eps=1e-8, **options)
        for gradient in i["gradients"]:
            w.grad = gradient.clone()
            optimizer.step()
        found = {"weights": w.detach().to(i["dtype"])}
        if name == "adamw":
            state = optimizer.state[w]
            found |= {"m": state["exp_avg"], "v": state["exp_avg_sq"]}
        return found

    return run


STEP_KINDS = {
    "ordinary": step_inputs(1.0, 0.01),
    "0 to 1e18": step_inputs(0, 1e-25, 1e-6, 1e6, 1e18),
}
ADAMW = Case("AdamW", STEP_KINDS, steps_ours("adamw"), steps_theirs("adamw"))
SGD = Case("SGD", STEP_KINDS, steps_ours("sgd"), steps_theirs("sgd"))

CASES = [
    LINEAR,
    LAYER_NORM,
    ADD_LAYER_NORM,
    attention_case("attention", documents=False),
    attention_case("attention, documents", documents=True),
    GELU,
    CROSS_ENTROPY,
    LINEAR_CROSS_ENTROPY,
    EMBEDDING,
    GRADIENT_NORM,
    ADAMW,
    SGD,
]


# ------------------------------------------------------------------------------------- measurement


def cast(inputs: Inputs, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Inputs in a dtype. Masters, gradients of a step and a loss's factor are float32 at least; the
    sum that a norm follows is rounded, since what is judged is what becomes of it."""
    wide = wide_dtype(dtype)
    result: Inputs = {"dtype": dtype}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            value = value.to(device)
            if value.is_floating_point():
                value = value.to(wide if "wide" in inputs or name == "scale" else dtype)
        result[name] = value
    if "branch" in inputs:
        result["summed"] = result["x"] + result["branch"]
    return result


def widened(inputs: Inputs) -> Inputs:
    return {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    } | {"dtype": torch.float64}


def error(case: Case, output: str, actual: Tensor, exact: Tensor, inputs: Inputs) -> float:
    """The largest, as the head of this file says; infinite where an element is not finite."""
    scale_of, numbers = case.scales.get(output, "row"), torch.finfo(inputs["dtype"])
    actual, exact = (x.detach().double().cpu() for x in (actual, exact))
    if not exact.dim() or scale_of == "element":
        exact = exact.reshape(-1, 1)
    scale = exact.abs().amax() if scale_of == "whole" else exact.abs().amax(-1, keepdim=True)
    if scale_of in inputs:
        scale = scale.maximum(inputs[scale_of].abs().max().double().cpu())
    errors = (actual.reshape(exact.shape) - exact).abs() / (
        scale.clamp(min=numbers.tiny) * numbers.eps
    )
    return errors.nan_to_num(nan=math.inf, posinf=math.inf).max().item()


Errors = dict[str, dict[str, float]]  # output -> column -> error; the column "PyTorch" is theirs


def measure(
    case: Case, kind: str, dtype: torch.dtype, backends: Sequence[str], device: torch.device
) -> Errors:
    """The errors of one operation on one kind of inputs."""
    torch.manual_seed(0)
    inputs = cast(case.kinds[kind](), dtype, device)
    exact = case.theirs(widened(inputs))
    columns = {"PyTorch": case.theirs(inputs)}
    for name in backends:
        if name != "triton" or dtype != torch.float64:
            columns[name] = case.ours(choose(name, device), inputs)
    return {
        output: {
            column: error(case, output, found[output], value, inputs)
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


Found = dict[tuple[str, str, str, bool], float]  # output, dtype, column, ordinary -> largest error


def cell(found: Found, output: str, dtype: str, column: str) -> str:
    ordinary, hard = (shown(found[output, dtype, column, easy]) for easy in (True, False))
    return ordinary if dtype == "float64" else f"{ordinary} · {hard}"


def table(backends: Sequence[str], device: torch.device) -> tuple[list[str], list[str]]:
    """The table's lines, and the broken promises."""
    columns = [
        (dtype, column)
        for dtype in DTYPES
        for column in ("PyTorch", *backends)
        if dtype != "float64" or column not in ("PyTorch", "triton")
    ]
    lines = [
        "| operation | result | " + " | ".join(" ".join(names) for names in columns) + " |",
        "|---" * (len(columns) + 2) + "|",
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
                        key = (output, dtype, column, kind == "ordinary")
                        found[key] = max(found.get(key, 0.0), value)
        for output in dict.fromkeys(key[0] for key in found):
            cells = " | ".join(cell(found, output, *where) for where in columns)
            lines.append(f"| {case.name} | {output} | {cells} |")
    return lines, broken


INTRODUCTION = """\
# Accuracy

Written by `python -m tools.accuracy --write docs/accuracy.md`; do not edit.

**{promise}**

A cell is the largest error on ordinary inputs · on hard ones: {kinds}.
In float64 only the ordinary ones are shown.

The exact result is that of PyTorch's operation with autograd in float64, on the same inputs, rounded
already. An error is measured in eps of the dtype (1.2e-7 in float32, 7.8e-3 in bfloat16) times the
largest magnitude of its row of the exact result: rounding the exact result costs half an eps at most.
For vectors and for the gradients of attention it is the whole tensor's magnitude, for a loss or a
norm its own. ∞: not finite.

In bfloat16 our losses and gradients of weights are float32, PyTorch's are bfloat16. In float64 the
yardstick is PyTorch's own result in float64, so that the columns say how far apart the two are.
Native, and all matrix products but the reference's, are PyTorch's kernels called without autograd.

Measured on {device} with torch {torch}, Triton {triton}.

"""


def page(lines: list[str], device: torch.device) -> str:
    kinds = dict.fromkeys(kind for case in CASES for kind in case.kinds if kind != "ordinary")
    head = INTRODUCTION.format(
        promise=PROMISE,
        kinds=", ".join(kinds),
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
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cpu" and "triton" in options.backends:
        from tests.support import interpreter

        interpreter.start()
    lines, broken = table(options.backends, device)
    if options.write:
        options.write.write_text(page(lines, device), encoding="utf-8")
    else:
        print(page(lines, device))
    for line in broken:
        print(line)
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
