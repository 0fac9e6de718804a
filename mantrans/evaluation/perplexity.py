"""How well a model predicts a text: loss per token, perplexity, and bits per byte.

Loss per token and perplexity compare models that share a tokenizer. Bits per byte compares any two
models on one text: the whole text's cost in bits, divided by its length in UTF-8 bytes, which does
not depend on the tokenizer.

How tokens are counted: the stream, with an end-of-text token put before it, is cut into windows of
T tokens that do not overlap. So every token, including the first, is predicted exactly once, from
the tokens before it in its window (the first one of a window only from its predecessor).
End-of-text tokens count like all others in loss and tokens, because the end of a document must be
predicted too; they have no bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from mantrans import terminal
from mantrans.errors import DataError
from mantrans.kernels.reference import IGNORE_INDEX, document_starts, sum_in_parts


class LossModel(Protocol):
    """A model that gives the loss of each position, 0 for an ignored target."""

    def losses(
        self, tokens: Tensor, targets: Tensor, document_start: Tensor | None = None
    ) -> Tensor:
        """tokens, targets (B, T) int64, document_start (B, T) int32 -> losses (B*T,) in nats."""
        ...


class Perplexity(NamedTuple):
    """The cost of a text under a model: sums, and the three measures computed from them."""

    nats: float  # -log probability of all counted tokens
    tokens: int  # predicted tokens, including end-of-text tokens
    bytes: int  # UTF-8 bytes of the text those tokens encode

    @property
    def loss(self) -> float:
        """Nats per token: the cross-entropy of the training log."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss): the number of equally likely tokens with the same loss."""
        try:
            return math.exp(self.loss)
        except OverflowError:  # above 709 nats per token, which only a broken model reaches
            return math.inf

    @property
    def bits_per_byte(self) -> float:
        """nats / ln 2 / bytes. NaN for a text without bytes."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan


def measure(
    model: LossModel,
    tokens: np.ndarray,
    token_bytes: np.ndarray,
    *,
    length: int,
    batch_size: int,
    end_of_text: int,
    attend_across_documents: bool = True,
    device: torch.device | str = "cpu",
    max_batches: int | None = None,
    show_progress: bool = False,
) -> Perplexity:
    """The cost of `tokens`, or of the first `max_batches` batches.

    tokens: 1-D, any integer dtype, may be memory-mapped; only a batch at a time is read.
    token_bytes (V,): the number of bytes of each token id, 0 for end-of-text.
    length: T of a window, at most the model's max_seq_len. batch_size: windows in a batch.
    attend_across_documents: as in training; if False a token sees only its document.
    show_progress: on standard error.

    Raises DataError without tokens, or for a token outside the model's vocabulary.
    """
    if len(tokens) == 0:
        raise DataError("validation data: expected at least 1 token, got 0")
    if max_batches is not None:
        tokens = tokens[: max_batches * batch_size * length]
    windows = batches(tokens, length, batch_size, end_of_text)
    if show_progress:
        total = -(-len(tokens) // (batch_size * length))
        windows = terminal.watched(windows, total, "evaluating", "batch")
    nats = torch.zeros((), dtype=torch.float64, device=device)
    counted = n_bytes = 0
    for inputs, targets in windows:
        predicted = targets[targets != IGNORE_INDEX]
        if predicted.max() >= len(token_bytes):
            raise DataError(
                f"validation data: expected tokens below the vocabulary size {len(token_bytes)}, "
                f"got {predicted.max()}"
            )
        x, y = (torch.from_numpy(array).to(device) for array in (inputs, targets))
        starts = None if attend_across_documents else document_starts(x, end_of_text)
        # the sum stays on the device: the host waits for it once, at the end
        nats += sum_in_parts(model.losses(x, y, starts).double().flatten())
        counted += len(predicted)
        n_bytes += int(token_bytes[predicted].sum())
    return Perplexity(nats.item(), counted, n_bytes)


def batches(
    tokens: np.ndarray, length: int, batch_size: int, end_of_text: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The stream in order as (inputs, targets), each (B, T) int64 with B <= batch_size.

    inputs[b, t] is the token before targets[b, t]. Each token is a target exactly once; the last
    window is padded with ignored targets.
    """
    per_batch = batch_size * length
    for first in range(0, len(tokens), per_batch):
        targets = np.asarray(tokens[first : first + per_batch], dtype=np.int64)
        before = int(tokens[first - 1]) if first else end_of_text
        inputs = np.concatenate([[before], targets[:-1]])
        missing = -len(targets) % length
        inputs = np.pad(inputs, (0, missing), constant_values=end_of_text)
        targets = np.pad(targets, (0, missing), constant_values=IGNORE_INDEX)
        yield inputs.reshape(-1, length), targets.reshape(-1, length)
