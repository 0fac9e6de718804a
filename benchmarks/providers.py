"""Who competes in an operation, and how each is called.

    ours            the backends triton (on a GPU), native and reference
    PyTorch eager   the plain function under autograd
    torch.compile   the same, compiled
    SDPA ...        PyTorch's attention backends, each on contiguous q, k, v: what suits them best
    Liger           liger-kernel's Triton kernels, where that package is installed

A provider is prepared for one set of tensors and gives a function without arguments that does the
work and returns the results. Under autograd the backward of a forward that was run once is asked
for again and again; its results come in the dtype of the inputs, ours are summed in float32.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType

import torch
from torch._functorch import config as functorch_config
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import machine
from benchmarks.operations import EPSILON, Operation, Tensors

Call = Callable[[], tuple]
Plain = Callable[[Tensors], tuple]
OURS = {name: f"mantrans.kernels.{name}" for name in ("triton", "native", "reference")}
SDPA = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}
# Beyond this the whole matrix of scores, which some providers make, is not worth waiting for.
MOST_SCORES = 2**28


class Provider:
    """name; direct: whether launches must go out one by one (a graph cannot hold autograd's
    backward of an earlier forward); prepare(tensors) -> call."""

    def __init__(self, name: str, prepare: Callable[[Tensors], Call], direct: bool = False) -> None:
        self.name, self.prepare, self.direct = name, prepare, direct


def providers(operation: Operation, direction: str) -> list[Provider]:
    """All that can run this operation here. The first is ours."""
    found = [_ours(name, operation, direction) for name in _our_backends(operation)]
    rivals: dict[str, Plain] = {"PyTorch eager": operation.plain}
    if operation.name in ("attention", "decode_attention"):
        pass  # torch.compile calls the same library kernel
    elif operation.name == "adamw":
        rivals = {"PyTorch fused": operation.plain}
    else:
        # donated buffers would let a backward be asked for only once
        functorch_config.donated_buffer = False
        rivals["torch.compile"] = torch.compile(operation.plain, dynamic=False)
    rivals |= liger(operation)
    found += [_autograd(name, plain, operation, direction) for name, plain in rivals.items()]
    if operation.name == "attention":
        found += [_sdpa(name, operation, direction) for name in _sdpa_backends(operation)]
    return found


def _our_backends(operation: Operation) -> list[str]:
    on_gpu = machine.device().type == "cuda"
    names = ["triton", "native"] if on_gpu else ["native"]
    return names + ["reference"] * (_scores(operation) <= MOST_SCORES)


def _sdpa_backends(operation: Operation) -> list[str]:
    names = list(SDPA) if machine.device().type == "cuda" else ["SDPA flash", "SDPA math"]
    return [n for n in names if n != "SDPA math" or _scores(operation) <= MOST_SCORES]


def _scores(operation: Operation) -> int:
    shape = operation.shape
    is_attention = operation.name == "attention"
    return shape["B"] * shape["H"] * shape["T"] ** 2 if is_attention else 0


def _ours(name: str, operation: Operation, direction: str) -> Provider:
    ops: ModuleType = importlib.import_module(OURS[name])

    def prepare(t: Tensors) -> Call:
        backward = operation.backward
        if direction != "backward":
            return lambda: operation.forward(ops, t)
        assert backward is not None
        saved = operation.forward(ops, t)
        return lambda: backward(ops, t, saved)

    return Provider(name, prepare)


def _autograd(name: str, plain: Plain, operation: Operation, direction: str) -> Provider:
    def prepare(t: Tensors) -> Call:
        leaves = {key: t[key].detach().requires_grad_() for key in operation.leaves}
        t = t | leaves
        upstream = [t[key] for key in operation.upstream]

        def gradients(results: tuple, retain: bool) -> tuple:
            return torch.autograd.grad(
                results, list(leaves.values()), upstream[: len(results)], retain_graph=retain
            )

        if operation.joint:
            return lambda: gradients(plain(t), retain=False)
        if direction != "backward":
            return lambda: plain(t)
        results = plain(t)
        return lambda: gradients(results, retain=True)

    return Provider(name, prepare, direct=direction in ("backward", "forward+backward"))


def _sdpa(name: str, operation: Operation, direction: str) -> Provider:
    """Separate contiguous q, k, v and their gradients; (B, H, T, D) -> (B, T, C) is a view."""
    B, T, H, D = operation.shape.values()

    def prepare(t: Tensors) -> Call:
        q, k, v = t["qkv"].view(B, T, 3, H, D).permute(2, 0, 3, 1, 4).contiguous()
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        dout = t["dout"].view(B, T, H, D).transpose(1, 2)

        def forward() -> tuple:
            with sdpa_kernel(SDPA[name]):
                out = F.scaled_dot_product_attention(*leaves, is_causal=True)
            return (out.transpose(1, 2).reshape(B, T, H * D) if direction == "forward" else out,)

        if direction == "forward":
            return forward
        (out,) = forward()

        def backward() -> tuple:
            return torch.autograd.grad(out, leaves, dout, retain_graph=True)

        return backward

    return Provider(name, prepare, direct=direction == "backward")


def liger(operation: Operation) -> dict[str, Plain]:
    """liger-kernel's ways, where it is installed and there is a GPU."""
    if machine.device().type != "cuda" or importlib.util.find_spec("liger_kernel") is None:
        return {}
    from liger_kernel.transformers import LigerCrossEntropyLoss, LigerFusedLinearCrossEntropyLoss
    from liger_kernel.transformers.functional import liger_layer_norm

    loss = LigerCrossEntropyLoss(reduction="sum")
    fused_loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")

    def layer_norm(t: Tensors) -> tuple:
        x = t["residual"] + t["branch"]
        return liger_layer_norm(x, t["weight"], t["bias"], EPSILON), x

    ways: dict[str, Plain] = {
        "add_layer_norm": layer_norm,
        "cross_entropy": lambda t: (loss(t["logits"], t["targets"]),),
        "linear_cross_entropy": lambda t: (fused_loss(t["weight"], t["x"], t["targets"]),),
    }
    return {"Liger": ways[operation.name]} if operation.name in ways else {}
