"""Where weights and gradients live: one flat buffer each, and named views into them.

With flat buffers norm and update take a few kernel launches, and a matrix product writes its
gradient where the optimizer reads it.

    order     three groups: `tables` (embeddings), `matrices`, `vectors` (biases and gains).
              Matrices are block by block, so that the gradients of one block are one range, which
              ranks exchange as soon as its backward is done; those of one name in all blocks are
              one stack (n_blocks, M, K). Vectors are in the order of the forward, so those of one
              block are one range. Tables' and vectors' gradients are complete last
    buckets   what is exchanged at once: `tables`; the matrices of one block, `blocks.3`; `vectors`.
              Each has PIECES equal pieces, whatever the number of ranks
    offsets   multiples of 64 elements, so that every view starts on a 128-byte line
    padding   zeros between views, at the end of buckets, and zero rows at the end of a table;
              they receive no gradient and stay zero under every optimizer
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mantrans.distributed.shard import PIECES, Part, Shard
from mantrans.distributed.world import World
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
        return _rounded_up(numel(self.stored_shape), ALIGNMENT)

    @property
    def bucket(self) -> str:
        """The name of the bucket that it lies in."""
        return self.group if self.group != "matrices" else _block(self) or "matrices"

    def initial_values(self, generator: torch.Generator) -> Tensor:
        """float32, drawn on the CPU, so that a seed gives the same values on any device."""
        if self.std is None:
            return torch.full(self.shape, self.constant)
        return torch.randn(self.shape, generator=generator) * self.std


def numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _rounded_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


class Layout(NamedTuple):
    """Where parameters lie in a flat buffer of so many elements."""

    offsets: dict[str, int]  # of each parameter
    buckets: dict[str, slice]
    groups: dict[str, slice]
    elements: int


def layout(parameters: Iterable[Parameter]) -> Layout:
    """Group by group, within it bucket by bucket in the order of declaration."""
    in_order = sorted(parameters, key=lambda p: GROUPS.index(p.group))
    buckets: dict[str, list[Parameter]] = {}
    for parameter in in_order:
        buckets.setdefault(parameter.bucket, []).append(parameter)
    found = Layout({}, {}, {}, 0)
    end = 0
    for bucket, members in buckets.items():
        start = end
        for parameter in members:
            found.offsets[parameter.name] = end
            end += parameter.stored_elements
        end = start + _rounded_up(end - start, PIECES * ALIGNMENT)
        found.buckets[bucket] = slice(start, end)
        group = members[0].group
        found.groups[group] = slice(found.groups.get(group, found.buckets[bucket]).start, end)
    return found._replace(elements=end)


def two_blocks(buckets: dict[str, slice]) -> dict[str, slice]:
    """Places for the buckets in a buffer with two blocks, which the blocks use in turn."""
    places: dict[str, slice] = {}
    end = blocks = 0
    for name, bucket in buckets.items():
        if name not in GROUPS:
            blocks += 1
        start = end
        if name not in GROUPS and blocks > 2:
            start = places[f"blocks.{blocks - 3}"].start
        places[name] = slice(start, start + bucket.stop - bucket.start)
        end = max(end, places[name].stop)
    return places


class Parameters:
    """The flat buffers `weights`, `master` and `gradients`, and views into them by name.

    weights    (P,) in the model's dtype: what forward and backward read
    master     (P,) float32: what the optimizer updates; None where the weights are float32 or
               float64 and thus their own master, or where `keep_master` is False
    gradients  (P,) float32, or float64 for a float64 model: what the backward adds to
    updates    0-d int64: the number of updates so far
    buckets    the range of each bucket in the buffers
    groups     the range of each of GROUPS

    With several ranks, `shard` is what they divide (Rajbhandari et al. 2020, "ZeRO"):

    none       nothing: each rank has all of it
    optimizer  masters and moments: buffers of the elements that the rank owns, see `Shard`
    gradients  these too: `owned_gradients` has the sums of the rank's elements, and `gradients`
               only tables, vectors and two blocks, which the blocks use in turn

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
        world: World | None = None,
        shard: str = "none",
    ) -> None:
        parameters = list(parameters)
        self.by_name = {p.name: p for p in parameters}
        self._offsets, self.buckets, self.groups, end = layout(parameters)
        world = world or World.single()
        self.divided = shard if world.size > 1 else "none"
        self.shard = Shard(self.buckets, World.single() if self.divided == "none" else world)
        # where in `gradients` each bucket's are while they are computed
        self.places = self.buckets
        if self.divided == "gradients":
            self.places = two_blocks(self.buckets)

        self.wide = wide_dtype(dtype)
        self.training = training
        self.weights = torch.zeros(end, dtype=dtype, device=device)
        self.updates = torch.zeros((), dtype=torch.int64, device=device)
        self.master: Tensor | None = None
        if training:
            in_work = max(place.stop for place in self.places.values())
            self.gradients = torch.zeros(in_work, dtype=self.wide, device=device)
            self.owned_gradients = self.gradients
            if self.divided == "gradients":
                self.owned_gradients = self.gradients.new_zeros(self.shard.elements)
            if keep_master and dtype != self.wide:
                self.master = self.gradients.new_zeros(self.shard.elements)
        for p in parameters:
            p.value = self.stored(self.weights, p.name)
        self.partials: Partials | None = None
        self._written = self.weights.new_empty(0)  # where the backward writes
        if training:
            self.write_gradients_to(self.gradients)
            self.partials = Partials(self, partial_rows) if partial_rows else None

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

    def write_gradients_to(self, flat: Tensor) -> None:
        """Let the backward write to `flat`, laid out as `gradients`."""
        if flat is self._written:
            return
        self._written = flat
        for p in self.by_name.values():
            if p.group != "vectors" or self.partials is None:  # else it is written to rows
                p.gradient = self._written_gradient(p)

    def bucket_gradients(self, bucket: str) -> Tensor:
        """The gradients of a bucket, as the backward writes them."""
        return self._written[self.places[bucket]]

    def gradients_in(self, bucket: str) -> Iterator[tuple[str, Tensor]]:
        """(name, gradient) of each parameter of a bucket, as the backward has written it."""
        for p in self.by_name.values():
            if p.bucket == bucket:
                yield p.name, self._written_gradient(p)[: p.shape[0]]

    def _written_gradient(self, p: Parameter) -> Tensor:
        start = self._offsets[p.name] - self.buckets[p.bucket].start
        bucket = self.bucket_gradients(p.bucket)
        return bucket[start : start + numel(p.stored_shape)].view(p.stored_shape)

    def gradients_of(self, part: Part) -> Tensor:
        """The sums that update this part of the rank's elements."""
        where = part.kept if self.divided == "gradients" else part.where
        return self.owned_gradients[where]

    def named(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(name, view) of every parameter, in the order of declaration."""
        for name in self.by_name:
            yield name, self.view(flat, name)

    @property
    def blocks(self) -> list[str]:
        """The names of the blocks' buckets, which lie side by side and have the same layout."""
        return [name for name in self.buckets if name not in GROUPS]

    def stacks(self, flat: Tensor, blocks: list[str]) -> Iterator[tuple[list[str], Tensor]]:
        """(names, view (n, M, K)) of each matrix in n blocks that follow each other.

        flat: a buffer of these blocks' elements alone.
        """
        bucket = self.buckets[blocks[0]]
        for p in self.by_name.values():
            if p.bucket == blocks[0]:
                shape = (len(blocks), *p.shape)
                strides = (bucket.stop - bucket.start, p.shape[1], 1)
                place = flat.storage_offset() + self._offsets[p.name] - bucket.start
                names = [block + p.name.removeprefix(blocks[0]) for block in blocks]
                yield names, flat.as_strided(shape, strides, place)

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
        self.view(self.weights, name).copy_(value)
        if self.master is not None:
            self.store(self.master, name, value)

    def store(self, owned: Tensor, name: str, value: Tensor, shard: Shard | None = None) -> None:
        """Set a parameter's elements in a flat buffer of the rank's own: a master or a moment.

        shard: that of its buckets, if it has not all of them.
        """
        (shard or self.shard).store(owned, self._offsets[name], value.reshape(-1))

    def whole(self, owned: Tensor, shard: Shard | None = None) -> dict[str, Tensor]:
        """{name: all elements} of each parameter in a flat buffer of the rank's own. Called by all
        ranks if they divide state; then rank 0 has them, on the CPU, the others {}.

        shard: that of its buckets, if it has not all of them.
        """
        shard = shard or self.shard
        flat = owned if self.divided == "none" else shard.whole(owned)
        if flat is None:
            return {}
        found = {}
        for name in self.within(shard):
            bucket = self.by_name[name].bucket
            start = shard.places[bucket].start - self.buckets[bucket].start + self._offsets[name]
            shape = self.by_name[name].shape
            found[name] = flat[start : start + numel(shape)].view(shape)
        return found

    def within(self, shard: Shard) -> dict[str, Parameter]:
        """The parameters in the buckets of `shard`, in the order of declaration."""
        return {name: p for name, p in self.by_name.items() if p.bucket in shard.buckets}

    def best_weights(self) -> Tensor:
        """The most precise flat buffer of the weights: the master, if there is one, of which a rank
        may have a part."""
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
        self.parameters = parameters
        self.ranges: dict[str, slice] = {}  # of the bucket `vectors`
        vectors = [p for p in parameters.by_name.values() if p.group == "vectors"]
        for p in vectors:
            start = parameters.offset(p.name) - parameters.buckets["vectors"].start
            first = self.ranges.get(_block(p), slice(start, start)).start
            self.ranges[_block(p)] = slice(first, start + p.stored_elements)
        widest = max(r.stop - r.start for r in self.ranges.values())
        self.buffers = parameters.gradients.new_zeros(2, rows, widest)
        self.rows = {block: self.buffers[i % 2] for i, block in enumerate(self.ranges)}
        for p in vectors:
            start = parameters.offset(p.name) - parameters.buckets["vectors"].start
            column = start - self.ranges[_block(p)].start
            p.gradient = self.rows[_block(p)][:, column : column + p.shape[0]]

    def clear(self) -> None:
        """Forget what was not summed."""
        self.buffers.zero_()

    def of(self, block: str) -> tuple[Tensor, Tensor]:
        """(partial sums (rows, W), gradients (W,)) of a block's vectors, for `sum_partials`."""
        where = self.ranges[block]
        rows = self.rows[block][:, : where.stop - where.start]
        return rows, self.parameters.bucket_gradients("vectors")[where]


def _block(parameter: Parameter) -> str:
    """ "blocks.3" for a parameter of block 3, "" outside the blocks."""
    head, number, *_ = parameter.name.split(".")
    return f"{head}.{number}" if head == "blocks" else ""
