"""Where weights and gradients live: one flat buffer each, and named views into them.

One buffer means one kernel launch for the optimizer, the gradient norm and the zeroing, one tensor
to save, and a gradient that a matrix product writes is already where the optimizer reads it.

    order     all matrices first (they decay), then all vectors (they do not)
    offsets   multiples of 64 elements, so that every view starts on a 128-byte line
    padding   zeros between views, and zero rows that fill a table up to a convenient height;
              they receive no gradient and stay zero under every optimizer
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 64


@dataclass(frozen=True)
class Spec:
    """One parameter: its name and public shape, and how many rows its storage has (>= shape[0])."""

    name: str
    shape: tuple[int, ...]
    stored_rows: int | None = None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self.shape if self.stored_rows is None else (self.stored_rows, *self.shape[1:])


def numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


class Parameters:
    """The flat buffers `weights`, `master` and `gradients`, and views into them by name.

    weights    (P,) in the model's dtype: what forward and backward read
    master     (P,) float32: what the optimizer updates; None where the weights are float32 or
               float64 and thus their own master, or where `keep_master` is False
    gradients  (P,) float32, or float64 for a float64 model: what the backward adds to
    n_decayed  the first so many elements belong to matrices
    """

    def __init__(
        self,
        specs: Iterable[Spec],
        dtype: torch.dtype,
        device: torch.device,
        keep_master: bool = True,
    ) -> None:
        specs = list(specs)
        matrices = [s for s in specs if len(s.shape) > 1]
        vectors = [s for s in specs if len(s.shape) == 1]
        self.specs = {spec.name: spec for spec in specs}
        self._offsets: dict[str, int] = {}
        end = self._place(matrices, 0)
        self.n_decayed = end
        end = self._place(vectors, end)

        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.weights = torch.zeros(end, dtype=dtype, device=device)
        self.gradients = torch.zeros(end, dtype=wide, device=device)
        self.master: Tensor | None = None
        if keep_master and dtype != wide:
            self.master = torch.zeros(end, dtype=wide, device=device)

    def _place(self, specs: list[Spec], end: int) -> int:
        for spec in specs:
            self._offsets[spec.name] = end
            end += -(-numel(spec.stored_shape) // ALIGNMENT) * ALIGNMENT
        return end

    def stored(self, flat: Tensor, name: str) -> Tensor:
        """The view of `name` in a flat buffer, with its padded rows: what the layers compute on."""
        spec, offset = self.specs[name], self._offsets[name]
        return flat[offset : offset + numel(spec.stored_shape)].view(spec.stored_shape)

    def view(self, flat: Tensor, name: str) -> Tensor:
        """The view of `name` in a flat buffer, in its public shape."""
        return self.stored(flat, name)[: self.specs[name].shape[0]]

    def named(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(name, view) of every parameter, in the order in which the model declares them."""
        for name in self.specs:
            yield name, self.view(flat, name)

    def count(self) -> int:
        """Number of parameters, padding not counted."""
        return sum(numel(spec.shape) for spec in self.specs.values())

    def write(self, name: str, value: Tensor) -> None:
        """Set one parameter: the master keeps all digits, the weights are rounded from it.

        Raises ValueError for an unknown name or a shape other than the parameter's.
        """
        if name not in self.specs:
            raise ValueError(f"no parameter is named {name!r}; there are {', '.join(self.specs)}")
        if tuple(value.shape) != self.specs[name].shape:
            raise ValueError(
                f"{name}: shape {tuple(value.shape)}, accepted is {self.specs[name].shape}"
            )
        for flat in (self.weights, self.master):
            if flat is not None:
                self.view(flat, name).copy_(value)

    def best_weights(self) -> Tensor:
        """The flat buffer with the most digits: the master where there is one."""
        return self.weights if self.master is None else self.master
