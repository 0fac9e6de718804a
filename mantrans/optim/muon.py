"""Muon (Jordan et al. 2024) for the matrices inside blocks, AdamW for all else.

    m ← μ m + (1 - μ) c g
    O = s · NewtonSchulz(μ m + (1 - μ) c g)
    w ← w (1 - η λ) - η O

The first and the last line are elementwise, on what the rank owns; the second is on whole matrices.
A batch of blocks has one buffer for u = μ m + (1 - μ) c g and O: ranks that divide state gather u
there (as in Liu et al. 2025, "Muon is scalable for LLM training"), each makes O of the matrices
that it owns a part of, and `sgd_update` takes O for a gradient. Batches do not depend on the number
of ranks, so neither do the bits.
"""

from __future__ import annotations

import itertools
import math
from types import ModuleType

import torch

from mantrans.config.arguments import MUON, checked
from mantrans.distributed.exchange import Exchange
from mantrans.distributed.shard import Shard, joined
from mantrans.kernels import reference
from mantrans.optim.adamw import AdamW
from mantrans.optim.optimizer import Now
from mantrans.parameters import GROUPS, Parameter, Parameters
from mantrans.runtime import resolve_dtype

BATCH_ELEMENTS = 2**26  # of a batch of blocks at most, if they are more than one


class Muon(AdamW):
    """Muon with AdamW: `exp_avg` has the mean of every gradient, `exp_avg_sq` that of the squares
    outside blocks.

    momentum: μ. scale: s, given (M, K): "match_rms_adamw" 0.2 √max(M, K), with which a step is as
    long as AdamW's; "original" √max(1, M / K). rate_ratio: the learning rate η of the matrices, as
    a multiple of the step's.

    Newton–Schulz runs in `dtype`: bfloat16 where the processor multiplies it, else float32; float64
    for a float64 model. The backend `reference` computes in the wide dtype.
    """

    @checked(**MUON)
    def __init__(
        self,
        ops: ModuleType,
        parameters: Parameters,
        *,
        momentum: float = 0.95,
        scale: str = "match_rms_adamw",
        rate_ratio: float = 1.0,
        beta1: float = 0.9,
        beta2: float = 0.95,
        epsilon: float = 1e-8,
        weight_decay: float = 0.1,
        max_grad_norm: float | None = 1.0,
    ) -> None:
        super().__init__(
            ops,
            parameters,
            beta1=beta1,
            beta2=beta2,
            epsilon=epsilon,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
        )
        self.momentum, self.scale, self.rate_ratio = momentum, scale, rate_ratio
        self.dtype = parameters.wide
        if ops is not reference:
            by_triton = ops.__name__.endswith("triton")  # whose CPU tensors stand for a GPU's
            device = torch.device("cuda") if by_triton else parameters.weights.device
            self.dtype = product_dtype(parameters.wide, device)
        self.one = parameters.gradients.new_ones(())
        self.exchange = Exchange(parameters.shard.world, 0, parameters.weights)
        self.batches = batches(parameters.blocks, parameters.buckets)

    @property
    def reach(self) -> float:
        shapes = [p.shape for p in self.parameters.by_name.values() if len(p.shape) == 2]
        return self.rate_ratio * max(1.0, *(update_scale(self.scale, *shape) for shape in shapes))

    def _squared(self) -> Shard:
        p = self.parameters
        rest = {name: bucket for name, bucket in p.buckets.items() if name not in p.blocks}
        return Shard(rest, p.shard.world)

    def shards(self) -> dict[str, Shard]:
        return super().shards() | {"exp_avg_sq": self.squared}

    def _update_all(self, now: Now) -> None:
        for kind, parts in itertools.groupby(self.parameters.shard.parts, lambda part: part.kind):
            if kind == "blocks":
                for blocks in self.batches:
                    self._update_blocks(blocks, now)
                continue
            for part in parts:
                self._update(part, 0.0 if kind == "vectors" else self.weight_decay, now)

    def _update_blocks(self, blocks: list[str], now: Now) -> None:
        """Update the elements of blocks that follow each other."""
        p = self.parameters
        start = p.buckets[blocks[0]].start
        update = p.gradients.new_empty(p.buckets[blocks[-1]].stop - start, dtype=self.dtype)
        parts = joined([p.shard.by_bucket[name] for name in blocks])
        own = [update[part.where.start - start : part.where.stop - start] for part in parts]
        for part, u in zip(parts, own, strict=True):
            gradients = p.gradients_of(part)
            m = self.exp_avg[part.kept]
            self.ops.nesterov_momentum(m, gradients, now.clip, now.applied, self.momentum, u)
        if p.divided != "none":
            for bucket in update.chunk(len(blocks)):
                self.exchange.gather(bucket)
        for names, matrices in p.stacks(update, blocks):
            if self._owns_some(names[0]):
                self.ops.orthogonalize(matrices, update_scale(self.scale, *matrices.shape[1:]))
        for part, u in zip(parts, own, strict=True):
            self.ops.sgd_update(
                p.weights[part.where],
                None if p.master is None else p.master[part.kept],
                u,
                now.learning_rate * self.rate_ratio,
                self.one,
                now.applied,
                self.weight_decay,
                **self._rounding(part),
            )

    def _owns_some(self, name: str) -> bool:
        """Whether elements of this matrix, and so of its like in all blocks, are the rank's."""
        p = self.parameters
        where, start = p.shard.by_bucket[p.by_name[name].bucket].where, p.offset(name)
        return start < where.stop and where.start < start + p.by_name[name].stored_elements


def batches(blocks: list[str], buckets: dict[str, slice]) -> list[list[str]]:
    """The blocks in lists of nearly equal length, each of at most BATCH_ELEMENTS or one block."""
    size = buckets[blocks[0]].stop - buckets[blocks[0]].start
    count = -(-len(blocks) // max(1, BATCH_ELEMENTS // size))
    ends = [len(blocks) * i // count for i in range(count + 1)]
    return [blocks[a:b] for a, b in itertools.pairwise(ends)]


def product_dtype(wide: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of Newton–Schulz's products; of a GPU that is not here, a present one's."""
    if wide == torch.float64:
        return wide
    absent = device.type == "cuda" and not torch.cuda.is_available()
    return torch.bfloat16 if absent else resolve_dtype("auto", device)


def workspace(parameters: list[Parameter], buckets: dict[str, slice], copies: int) -> int:
    """Elements of a batch of blocks and of its largest stack of matrices: X, the next X, X Xᵀ.

    copies: that a product makes besides, of the size of X.
    """
    blocks = [name for name in buckets if name not in GROUPS]
    n = max(map(len, batches(blocks, buckets)))
    shapes = [sorted(p.shape) for p in parameters if p.bucket == blocks[0]]
    largest = max((2 + copies) * m * k + m * m for m, k in shapes)
    return n * (buckets[blocks[0]].stop - buckets[blocks[0]].start + largest)


def update_flops(parameters: list[Parameter]) -> int:
    """Operations of an update's products."""
    shapes = [p.shape for p in parameters if p.bucket not in GROUPS]
    return sum(reference.orthogonalize_flops(*shape) for shape in shapes)


def update_scale(rule: str, M: int, K: int) -> float:
    """s of a matrix (M, K), under the names of `torch.optim.Muon`."""
    return math.sqrt(max(1.0, M / K)) if rule == "original" else 0.2 * math.sqrt(max(M, K))
