"""Says in one line that a model or a batch did not fit into memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from mantrans.errors import MantransError

# PyTorch has an exception for GPUs only; on a CPU its allocator is known by its words.
_CPU_ALLOCATOR = "DefaultCPUAllocator"


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turn an allocation that the machine refused, inside the block, into a MantransError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and _CPU_ALLOCATOR not in str(error):
            raise
        raise MantransError(
            "the memory is full; lower training.batch_size and raise "
            "training.gradient_accumulation_steps by as much, shorten data.max_length, set "
            "training.recompute to block, or make the model smaller"
        ) from None
