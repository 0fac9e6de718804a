"""Where weights and gradients live: one flat buffer each, and named views into them.

With flat buffers the gradient norm takes one kernel launch, the optimizer a few, and a matrix
product writes its gradient where the optimizer reads it.

    order     three groups: `tables` (embeddings), `matrices`, `vectors` (biases and gains).
              Matrices of one shape are adjacent, as one stack (n, M, K); vectors are in the order
              of the forward, so those of one block are one range
    offsets   multiples of 64 elements, so that every view starts on a 128-byte line
    padding   zeros between views, and zero rows at the end of a table;
              they receive no gradient and stay zero under every optimizer
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from mantrans.kernels.reference import wide_dtype

ALIGNMENT = 64
GROUPS = ("tables", "matrices", "vectors")


class Parameter:
    """One trainable tensor: its name, shape and initialization, later its views in the buffers.

    name: as in checkpoints, e.g. "blocks.0.mlp.up.weight".
    shape: (C,), or (rows, columns).
    std: standard deviation of its initial values, which are normal; None: they are `constant`.
    stored_rows: rows in memory, at least shape[0]; None for shape[0].
    table: whether rows are looked up in it, as in an embedding.

    `Parameters` sets value (stored shape, the model's dtype) and gradient (stored shape, float32 or
    float64; for a vector possibly rows of partial sums, see `Partials`).
    """

    value: Tensor
    gradient: Tensor

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        std: float | None = None,
        constant: float = 0.0,
        stored_rows: int | None = None,
        table: bool = False,
    ) -> None:
        self.name, self.shape, self.std, self.constant = name, shape, std, constant
        self.stored_shape = shape if stored_rows is None else (stored_rows, *shape[1:])
        self.group = "vectors" if len(shape) == 1 else "tables" if table else "matrices"

    @property
    def stored_elements(self) -> int:
        """Elements that it takes in a flat buffer, padding included."""
        return -(-numel(self.stored_shape) // ALIGNMENT) * ALIGNMENT

    def initial_values(self, generator: torch.Generator) -> Tensor:
        """float32, drawn on the CPU, so that a seed gives the same values on any device."""
        if self.std is None:
            return torch.full(self.shape, self.constant)
        return torch.randn(self.shape, generator=generator) * self.std


def numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def in_memory_order(parameters: Iterable[Parameter]) -> list[Parameter]:
    """Group by group; in the group `matrices` shape by shape."""
    parameters = list(parameters)
    by_group: dict[str, list[Parameter]] = {group: [] for group in GROUPS}
    for parameter in parameters:
        by_group[parameter.group].append(parameter)
    by_shape: dict[tuple[int, ...], list[Parameter]] = {}
    for parameter in by_group["matrices"]:
        by_shape.setdefault(parameter.stored_shape, []).append(parameter)
    by_group["matrices"] = [p for same in by_shape.values() for p in same]
    return [p for group in GROUPS for p in by_group[group]]


class Parameters:
    """The flat buffers `weights`, `master` and `gradients`, and views into them by name.

    weights    (P,) in the model's dtype: what forward and backward read
    master     (P,) float32: what the optimizer updates; None where the weights are float32 or
               float64 and thus their own master, or where `keep_master` is False
    gradients  (P,) float32, or float64 for a float64 model: what the backward adds to
    updates    0-d int64: the number of updates so far
    groups     the range of each of GROUPS in the buffers

    training: False leaves out master and gradients.
    partial_rows: rows of partial sums in which the backend's kernels leave gradients of vectors
        (`sum_partials` adds them up); 0 if the kernels add to the gradients directly.
    """

    def __init__(
        self,
        parameters: Iterable[Parameter],
        dtype: torch.dtype,
        device: torch.device,
        *,
        training: bool = True,
        keep_master: bool = True,
        partial_rows: int = 0,
    ) -> None:
        parameters = list(parameters)
        self.by_name = {p.name: p for p in parameters}
        self._offsets: dict[str, int] = {}
        self.groups: dict[str, slice] = {}
        end = 0
        for p in in_memory_order(parameters):
            self._offsets[p.name] = end
            start = self.groups.get(p.group, slice(end, end)).start
            end += p.stored_elements
            self.groups[p.group] = slice(start, end)

        self.wide = wide_dtype(dtype)
        self.training = training
        self.weights = torch.zeros(end, dtype=dtype, device=device)
        self.updates = torch.zeros((), dtype=torch.int64, device=device)
        self.master: Tensor | None = None
        if training:
            self.gradients = torch.zeros(end, dtype=self.wide, device=device)
            if keep_master and dtype != self.wide:
                self.master = torch.zeros(end, dtype=self.wide, device=device)
        for p in parameters:
            p.value = self.stored(self.weights, p.name)
            if training:
                p.gradient = self.stored(self.gradients, p.name)
        self.partials = Partials(self, partial_rows) if training and partial_rows else None

    def offset(self, name: str) -> int:
        """Where the parameter begins in a flat buffer."""
        return self._offsets[name]

    def stored(self, flat: Tensor, name: str) -> Tensor:
        """The view of `name` in a flat buffer, padded rows included: the layers compute on it."""
        shape, offset = self.by_name[name].stored_shape, self._offsets[name]
        return flat[offset : offset + numel(shape)].view(shape)

    def view(self, flat: Tensor, name: str) -> Tensor:
        """The view of `name` in a flat buffer, in its public shape."""
        return self.stored(flat, name)[: self.by_name[name].shape[0]]

    def named(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(name, view) of every parameter, in the order of declaration."""
        for name in self.by_name:
            yield name, self.view(flat, name)

    def stacks(self, flat: Tensor) -> Iterator[tuple[list[str], Tensor]]:
        """(names, view (n, M, K)) of all matrices of one shape, for each shape."""
        matrices = [p for p in in_memory_order(self.by_name.values()) if p.group == "matrices"]
        for shape in dict.fromkeys(p.stored_shape for p in matrices):
            names = [p.name for p in matrices if p.stored_shape == shape]
            step = self.by_name[names[0]].stored_elements
            strides = (step, shape[1], 1)
            yield names, flat.as_strided((len(names), *shape), strides, self._offsets[names[0]])

    def count(self) -> int:
        """Number of parameters, padding not counted."""
        return sum(numel(p.shape) for p in self.by_name.values())

    def initialize(self, seed: int) -> None:
        """Draw every parameter's initial values, in the order of declaration."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.by_name.values():
            self.write(parameter.name, parameter.initial_values(generator))

    def write(self, name: str, value: Tensor) -> None:
        """Set one parameter: the master in full precision, the weights rounded.

        Raises ValueError for an unknown name or a shape other than the parameter's.
        """
        if name not in self.by_name:
            raise ValueError(f"name: expected one of {', '.join(self.by_name)}, got {name!r}")
        if tuple(value.shape) != self.by_name[name].shape:
            expected, got = self.by_name[name].shape, tuple(value.shape)
            raise ValueError(f"{name}: expected shape {expected}, got {got}")
        for flat in (self.weights, self.master):
            if flat is not None:
                self.view(flat, name).copy_(value)

    def best_weights(self) -> Tensor:
        """The most precise flat buffer of the weights: the master if there is one."""
        return self.weights if self.master is None else self.master

    def low_precision(self) -> bool:
        """Whether weights are less precise than gradients and have no master: they are then
        rounded stochastically, because rounding to nearest would lose small updates."""
        return self.master is None and self.weights.dtype != self.wide


class Partials:
    """Rows of partial sums, in which kernels leave the gradients of one block's vectors.

    A block's vectors are one range of the flat buffer. Two buffers (rows, widest block) alternate,
    because a block's first norm also sums a bias of the block before it. A vector's `gradient` is
    its columns in its block's buffer; `sum_partials` adds them to the flat buffer.
    """

    def __init__(self, parameters: Parameters, rows: int) -> None:
        self.flat = parameters.gradients
        self.ranges: dict[str, slice] = {}
        vectors = [p for p in parameters.by_name.values() if p.group == "vectors"]
        for p in vectors:
            start = parameters.offset(p.name)
            first = self.ranges.get(_block(p), slice(start, start)).start
            self.ranges[_block(p)] = slice(first, start + p.stored_elements)
        widest = max(r.stop - r.start for r in self.ranges.values())
        self.buffers = self.flat.new_zeros(2, rows, widest)
        self.rows = {block: self.buffers[i % 2] for i, block in enumerate(self.ranges)}
        for p in vectors:
            column = parameters.offset(p.name) - self.ranges[_block(p)].start
            p.gradient = self.rows[_block(p)][:, column : column + p.shape[0]]

    def clear(self) -> None:
        """Forget what was not summed."""
        self.buffers.zero_()

    def of(self, block: str) -> tuple[Tensor, Tensor]:
        """(partial sums (rows, W), gradients (W,)) of a block's vectors, for `sum_partials`."""
        where = self.ranges[block]
        return self.rows[block][:, : where.stop - where.start], self.flat[where]


def _block(parameter: Parameter) -> str:
    """ "blocks.3" for a parameter of block 3, "" outside the blocks."""
    head, number, *_ = parameter.name.split(".")
    return f"{head}.{number}" if head == "blocks" else ""
