"""Copies a step's tokens to the tensor that the step reads.

That tensor stays at one address, so that the step can be captured once and replayed. `load(step)`
fills it before the replay; `rows()` is part of the step.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mantrans.data.loader import BatchLoader

# The share of the memory that a step leaves free on a GPU which a data set's tokens may take.
DEVICE_SHARE = 0.25


class MicroBatch(NamedTuple):
    """The input of one forward and backward: see `CustomTransformer.forward_backward`."""

    tokens: Tensor  # (B,T)
    targets: Tensor  # (B,T)
    scale: Tensor  # 0-d: 1 / targets of the whole batch
    document_start: Tensor | None  # (B,T)


class TokenSource(Protocol):
    """Provides the tokens of each step."""

    def load(self, step: int) -> None:
        """Prepare the tokens of `step` for `rows`."""
        ...

    def rows(self) -> Tensor:
        """(sequences, T+1) int64 on the device: inputs, and shifted by one the targets."""
        ...


class HostTokens:
    """The tokens stay in the memory-mapped file; each batch is copied to the device.

    On a GPU the next batch is copied from pinned memory on a separate stream while the current step
    computes.
    """

    def __init__(self, loader: BatchLoader, device: torch.device) -> None:
        self.loader = loader
        shape = (loader.batch_size, loader.length + 1)
        self.tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        self.side_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.staging = torch.zeros_like(self.tokens)
        if self.side_stream is not None:
            self.staging.record_stream(self.side_stream)  # not reused during a copy
        self.staged_step: int | None = None

    def load(self, step: int) -> None:
        if self.side_stream is None:
            self.tokens.copy_(self.loader.batch(step))
            return
        if self.staged_step != step:
            self._stage(step)
        torch.cuda.current_stream().wait_stream(self.side_stream)
        self.tokens.copy_(self.staging)
        self._stage(step + 1)

    def _stage(self, step: int) -> None:
        pinned = self.loader.batch(step).pin_memory()
        assert self.side_stream is not None
        self.side_stream.wait_stream(torch.cuda.current_stream())  # `staging` has been read
        with torch.cuda.stream(self.side_stream):
            self.staging.copy_(pinned, non_blocking=True)
        self.staged_step = step

    def rows(self) -> Tensor:
        return self.tokens


class DeviceTokens:
    """All tokens are on the device, where a batch is gathered from the starts of its windows."""

    def __init__(self, loader: BatchLoader, device: torch.device) -> None:
        self.loader = loader
        # unsigned 16- and 32-bit numbers are poorly supported: read as signed, then masked
        bits = loader.stream.tokens.dtype.itemsize * 8
        signed = loader.stream.tokens.view(f"int{bits}")
        self.corpus = torch.from_numpy(signed.copy()).to(device)
        self.mask = 2**bits - 1
        self.starts = torch.zeros(loader.batch_size, 1, dtype=torch.int64, device=device)
        self.offsets = torch.arange(loader.length + 1, device=device)

    def load(self, step: int) -> None:
        starts = torch.from_numpy(self.loader.window_starts(step))[:, None]
        if self.starts.is_cuda:
            starts = starts.pin_memory()
        self.starts.copy_(starts, non_blocking=True)

    def rows(self) -> Tensor:
        return self.corpus[self.starts + self.offsets].long() & self.mask


def token_source(loader: BatchLoader, device: torch.device, step_bytes: int = 0) -> TokenSource:
    """The device's memory if it is a GPU with room for all tokens, else the host's.

    step_bytes: the part of the free memory that a step will take.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if loader.stream.tokens.nbytes <= DEVICE_SHARE * (free - step_bytes):
            return DeviceTokens(loader, device)
    return HostTokens(loader, device)
