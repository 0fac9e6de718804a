"""`check_gradients`: is every gradient of a model what it should be?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mantrans.config.arguments import Seed, Steps, checked
from mantrans.errors import show
from mantrans.kernels.reference import IGNORE_INDEX
from mantrans.proof.differences import differences
from mantrans.proof.exact import CPU, exact_copy
from mantrans.wrapper import CustomTransformerWrapper, shift
from mantrans_oracle import differentiate

# Largest relative errors of gradients that are right. In float64: what rounding does to a few
# hundred sums that depend on each other. In another dtype that depends on the model, so the measure
# is what rounding does to autograd's gradient there, and a few roundings. A term that is forgotten
# is far above, but bfloat16, with its three digits, can hide a small one.
EXACT = 1e-10
TIMES, ROUNDINGS = 4, 4
DIFFERENCE = 1e-6
# A gradient this much smaller than that of the whole model is held to the bound at this size.
SMALL = 1e-4


class Sample(NamedTuple):
    """One element: its gradient written by hand, in float64, and the finite difference there.

    uncertainty: how far the difference may be from the slope (`Slopes`).
    """

    element: tuple[int, ...]
    gradient: float
    difference: float
    uncertainty: float


class Row(NamedTuple):
    """One parameter.

    norm: ‖g‖ of autograd's gradient g, in float64.
    own: ‖d - g‖ / ‖g‖ of the model's gradient d, in its dtype, on its device and backend.
    peer: the same of autograd's gradient in the model's dtype, on the CPU.
    exact: the same of the gradient written by hand, in float64 on `reference`.
    samples: finite differences. difference: the largest |difference - gradient| of them, over the
        parameter's largest gradient; 0 without samples.
    wrong: which of "own", "exact" and "difference" are beyond their bounds.
    """

    name: str
    shape: tuple[int, ...]
    norm: float
    own: float
    peer: float
    exact: float
    samples: list[Sample]
    difference: float
    wrong: tuple[str, ...]


class GradientCheck(NamedTuple):
    """A row for every parameter, in the order of the forward; `str` and `print` give a table."""

    rows: list[Row]
    dtype: torch.dtype
    backend: str

    @property
    def ok(self) -> bool:
        """Whether every gradient is right."""
        return not any(row.wrong for row in self.rows)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        dtype = str(self.dtype).removeprefix("torch.")
        own = f"{dtype} {self.backend}"
        cells: list[tuple[str, ...]] = [
            (
                "parameter",
                "shape",
                "gradient",
                own,
                f"{dtype} autograd",
                "float64",
                "difference",
                "",
            )
        ]
        for row in self.rows:
            errors = [f"{x:.1e}" for x in (row.norm, row.own, row.peer, row.exact, row.difference)]
            shape = " × ".join(map(str, row.shape))
            wrong = "" if not row.wrong else f"WRONG: {', '.join(row.wrong)}"
            cells.append((row.name, shape, *errors[:4], errors[4] if row.samples else "", wrong))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for name, *rest in cells:
            words = (f"{x:>{width}}" for x, width in zip(rest, widths[1:], strict=True))
            yield "  ".join((name.ljust(widths[0]), *words)).rstrip()
        right = sum(not row.wrong for row in self.rows)
        n = sum(len(row.samples) for row in self.rows)
        yield (
            f"{right} of {len(self.rows)} gradients are right: beside autograd's in float64, {own} "
            f"within {TIMES} times autograd's error in {dtype} and {ROUNDINGS} roundings, float64 "
            f"within {EXACT:g}, {n} finite differences within {DIFFERENCE:g}"
        )


@checked(samples=Steps, seed=Seed)
def check_gradients(
    model: CustomTransformerWrapper,
    input_ids: Tensor,
    labels: Tensor,
    *,
    samples: int = 4,
    seed: int = 0,
) -> GradientCheck:
    """Compare every gradient of the mean loss with autograd's, and with finite differences.

    model: of any dtype, device and backend, with gradients. Its weights, gradients and optimizer
        stay as they are.
    input_ids, labels (B, T) integers: as for `train_step`; a short batch is enough.
    samples: finite differences a parameter, half of them where the gradient is not 0; each costs
        eight forwards. seed: of the choice of elements.

    The oracle is a copy with the same weights in float64 on the CPU, 32 bytes a parameter. Autograd
    differentiates it through PyTorch's own functions. Compared are the copy's gradient written by
    hand, on `reference`, and the model's own.

    Raises ValueError or TypeError for wrong arguments, RuntimeError for a model built with
    inference=True.
    """
    if not isinstance(model, CustomTransformerWrapper):
        raise TypeError(f"model: expected a CustomTransformerWrapper, got {show(model)}")
    own = own_gradients(model, input_ids, labels)
    tokens, targets = input_ids.to(CPU, torch.int64), shift(labels.to(CPU, torch.int64))
    copy = exact_copy(model.model)
    scale = 1 / (targets != IGNORE_INDEX).sum().double()
    copy.forward_backward(tokens, targets, scale, accumulate=False)
    by_hand = dict(copy.named_gradients())
    by_autograd = differentiate(copy, tokens, targets).weights
    peers = differentiate(copy, tokens, targets, model.dtype).weights
    whole = torch.stack([g.norm() for g in by_autograd.values()]).norm().item()
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for name, expected in by_autograd.items():
        exact, found = by_hand[name], []
        if indices := chosen(expected, samples, generator):
            slopes = differences(copy, tokens, targets, name, indices)
            parts = (x.tolist() for x in (exact[tuple(zip(*indices, strict=True))], *slopes[:2]))
            found = [Sample(*sample) for sample in zip(indices, *parts, strict=True)]
        gradients = (own[name], peers[name].double(), exact)
        rows.append(compared(name, expected, gradients, found, whole, model.dtype))
    return GradientCheck(rows, model.dtype, model.model.ops.__name__.rpartition(".")[2])


def own_gradients(
    model: CustomTransformerWrapper, input_ids: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """The model's gradients of one batch in float64 on the CPU; its buffer stays as it was."""
    buffer, before = model.trainable().parameters.gradients, None
    model.forward(input_ids, labels)  # refuses what is no batch
    targets = shift(labels.to(model.device, torch.int64))
    if (targets == IGNORE_INDEX).all():
        raise ValueError("labels: expected at least one target after the first position, got none")
    before = buffer.clone()
    model.accumulate_gradients(input_ids.to(model.device, torch.int64), targets, overwrite=True)
    named = model.model.named_gradients()
    gradients = {name: g.to(CPU, torch.float64, copy=True) for name, g in named}
    buffer.copy_(before)
    return gradients


def chosen(gradient: Tensor, count: int, generator: torch.Generator) -> list[tuple[int, ...]]:
    """Indices of at most `count` elements: the first half where the gradient is not 0, if it is not
    0 anywhere, the others anywhere."""

    def draw(among: Tensor, n: int) -> Tensor:
        return among[torch.randperm(len(among), generator=generator)[:n]]

    felt = draw(gradient.flatten().nonzero()[:, 0], (count + 1) // 2)
    others = draw(torch.arange(gradient.numel()), count - len(felt))
    places = torch.unravel_index(torch.cat([felt, others]).unique(), gradient.shape)
    return list(zip(*(x.tolist() for x in places), strict=True))


def compared(
    name: str,
    expected: Tensor,
    gradients: tuple[Tensor, ...],
    samples: list[Sample],
    whole: float,
    dtype: torch.dtype,
) -> Row:
    """expected: autograd's gradient; gradients: the model's own, autograd's in its dtype, and that
    by hand in float64; whole: the norm of the gradient of all parameters."""
    norm, largest = expected.norm().item(), expected.abs().max().item()
    own, peer, exact = ((x - expected).norm().item() for x in gradients)
    misses = [abs(s.difference - s.gradient) for s in samples]
    allowed = [DIFFERENCE * largest + 10 * s.uncertainty for s in samples]
    size = max(norm, SMALL * whole)
    within = {
        "own": own <= TIMES * peer + max(EXACT, ROUNDINGS * torch.finfo(dtype).eps) * size,
        "exact": exact <= EXACT * size,
        "difference": all(miss <= most for miss, most in zip(misses, allowed, strict=True)),
    }
    return Row(
        name,
        tuple(expected.shape),
        norm,
        ratio(own, norm),
        ratio(peer, norm),
        ratio(exact, norm),
        samples,
        ratio(max(misses, default=0.0), largest),
        tuple(what for what, fine in within.items() if not fine),  # NaN is within no bound
    )


def ratio(error: float, size: float) -> float:
    return error / size if size else math.inf if error else 0.0
