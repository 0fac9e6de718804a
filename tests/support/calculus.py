"""A described operation's float64 mathematics against autograd and against finite differences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mantrans.kernels import reference
from mantrans.kernels.operations import Draw, Operation, Shapes
from tests.support.compare import assert_close

CPU = torch.device("cpu")
EXACT = 1e-12  # of some thousand roundings of 2^-53, in another order
# Weights of f(x + n h), n = 1 .. 4, in a central difference with an error of h^8.
STENCIL = (4 / 5, -1 / 5, 4 / 105, -1 / 280)


def drawn(operation: Operation, s: Shapes, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Its inputs at these sizes, the same in every call."""
    return dict(operation.inputs(s, Draw(dtype, CPU)))


def results_of(operation: Operation, ops: Any, i: dict[str, Any]) -> dict[str, Tensor]:
    """All results of a backend, and what was added to each gradient buffer; i stays as it is."""
    i = {name: x.clone() if isinstance(x, Tensor) else x for name, x in i.items()}
    buffers = {f"d{name}" for name in operation.leaves} | set(operation.vectors)
    before = {name: i[name].clone() for name in buffers & i.keys()}
    results = operation.forward(ops, i)
    results |= operation.backward(ops, i, results)
    added = {name: results[name] - start for name, start in before.items()}
    return {name: x for name, x in results.items() if name != "saved"} | added


def equals_autograd(operation: Operation, s: Shapes) -> None:
    """The reference's results and gradients are those of PyTorch's own way."""
    i = drawn(operation, s)
    leaves = {name: i[name].clone().requires_grad_() for name in operation.leaves}
    plain = operation.plain(i | leaves)
    gradients = torch.autograd.grad(
        [plain[name] for name in operation.upstream],
        list(leaves.values()),
        [i[gradient] for gradient in operation.upstream.values()],
    )
    expected = plain | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}
    actual = results_of(operation, reference, i)
    for name, value in expected.items():
        assert_close(actual[name], value.detach(), EXACT, name)


def equals_finite_differences(operation: Operation, s: Shapes, h: float) -> None:
    """(L(x + hv) - L(x - hv)) / 2h and its like = dL·v along a random direction v of all inputs at
    once. The sum's terms have either sign: the bound is relative to their norm.

    h: a step at which the stencil's error, (h / what a function varies over)^8, and that of
    cancellation, 1e-16 / h, are both below the bound.
    """
    i = drawn(operation, s)
    source = torch.Generator().manual_seed(1)
    direction = {
        name: torch.randn(i[name].shape, generator=source, dtype=torch.float64)
        for name in operation.leaves
    }

    def loss(steps: int) -> Tensor:
        moved = {name: i[name] + steps * h * v for name, v in direction.items()}
        results = operation.forward(reference, i | moved)
        return sum((results[y] * i[dy]).sum() for y, dy in operation.upstream.items())

    numeric = sum(w * (loss(n) - loss(-n)) for n, w in enumerate(STENCIL, 1)) / h
    results = results_of(operation, reference, i)
    terms = torch.cat([(results[f"d{name}"] * v).flatten() for name, v in direction.items()])
    assert abs(numeric - terms.sum()) <= EXACT * terms.norm() * terms.numel() ** 0.5
