"""Draws the next token from logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mantrans.config.arguments import DRAWING, checked
from mantrans.errors import ModelError, show
from mantrans.kernels.reference import wide_dtype
from mantrans.models.stop_texts import Codec

# The share of the probability by which a sum may miss top_p, or a quotient min_p: that of rounding,
# and no token's.
ROUNDING = 1e-9


class Sampling(NamedTuple):
    """How texts are continued: how a token is drawn (see `sample`), and where a row ends."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    stop: Sequence[str] = ()
    tokenizer: Codec | None = None  # reads the new tokens, to find the stop texts
    eos_token_id: int | None = None
    seed: int = 0
    use_cache: bool = True


@checked(**DRAWING)
def sample(
    logits: Tensor,
    generator: torch.Generator,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seen: Tensor | None = None,
) -> Tensor:
    """Draw one token per row from logits (B, V) -> (B,) int64.

    repetition_penalty divides a positive logit of a token that the row already has, and multiplies
        a negative one (Keskar et al. 2019); seen (B, V) bool says which these are.
    temperature divides the logits, 0 takes the most likely token.
    top_k keeps the k most likely.
    top_p keeps the smallest set of likely tokens whose probabilities sum to p (Holtzman et al.
        2020).
    min_p keeps the tokens at least p times as likely as the most likely (Nguyen et al. 2024).
    Of equally likely tokens the lowest ids are kept or taken. A logit of -inf is never drawn.
    Raises ValueError where `seen` is missing or of another shape, ModelError where a logit is NaN
    or +inf, or all of a row are -inf.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    if repetition_penalty == 1:
        seen = None
    elif not isinstance(seen, Tensor) or seen.shape != logits.shape or seen.dtype != torch.bool:
        found = f"{tuple(seen.shape)} of {seen.dtype}" if isinstance(seen, Tensor) else show(seen)
        raise ValueError(
            f"seen: expected, with repetition_penalty, bool {tuple(logits.shape)}, got {found}"
        )
    return draw(logits, sampling, generator, seen)


def draw(
    logits: Tensor, sampling: Sampling, generator: torch.Generator, seen: Tensor | None
) -> Tensor:
    """`sample` with arguments that were checked before. seen: None for no penalty."""
    _refuse_broken(logits)
    top_k, top_p, min_p = sampling.top_k, sampling.top_p, sampling.min_p
    if seen is not None:
        logits = _penalized(logits.double(), seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits.argmax(-1)  # of several the first
    tokens = None
    if top_k is not None and top_k < logits.shape[-1]:  # drawing among few takes less time
        tokens = _most_likely(logits, top_k)
        logits = logits.gather(1, tokens)
    z = logits.double()
    z = (z - z.amax(-1, keepdim=True)) / sampling.temperature  # at most 0: does not overflow
    if top_p is not None and top_p < 1:
        z = _nucleus(z, top_p)
    if min_p is not None:
        z = z.masked_fill(z < math.log(min_p) - ROUNDING, -torch.inf)
    p = z.softmax(-1).to(wide_dtype(logits.dtype))
    drawn = torch.multinomial(p, 1, generator=generator)
    return (drawn if tokens is None else tokens.gather(1, drawn))[:, 0]


def _penalized(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits (B, V) float64 with those of tokens that were seen made smaller; finite ones stay so.

    A penalty below 1 makes them larger.
    """
    largest = torch.finfo(logits.dtype).max
    changed = torch.where(logits > 0, logits / penalty, logits * penalty).clamp(-largest, largest)
    return changed.where(seen & logits.isfinite(), logits)


def _nucleus(z: Tensor, top_p: float) -> Tensor:
    """z (B, V) with -inf outside the most likely tokens that sum to top_p."""
    ordered, order = z.sort(descending=True, stable=True)
    likelier = ordered.softmax(-1).cumsum(-1).roll(1, -1)  # the sum of the tokens before each
    likelier[:, 0] = -1  # the first is always kept
    ordered = ordered.masked_fill(likelier >= top_p - ROUNDING, -torch.inf)
    return z.scatter(1, order, ordered)


def _most_likely(logits: Tensor, k: int) -> Tensor:
    """The k < V largest of each row of logits (B, V), exactly k: their ids (B, k), in order."""
    values, ids = logits.topk(k + 1)
    if (values[:, -2] > values[:, -1]).all():
        return ids[:, :k].sort(-1).values
    smallest = values[:, -2:-1]  # others are equal to it
    above, equal = logits > smallest, logits == smallest
    kept = above | (equal & (equal.cumsum(-1) <= k - above.sum(-1, keepdim=True)))
    return kept.nonzero()[:, 1].view(-1, k)


def _refuse_broken(logits: Tensor) -> None:
    """Without this, a broken model would be sampled from as if nothing had happened."""
    largest = logits.amax(-1)  # NaN if any is
    if not largest.isfinite().all():
        row = int((~largest.isfinite()).int().argmax())
        raise ModelError(
            f"logits: expected finite numbers, got {largest[row].item()} in row {row}: the weights "
            "are broken, or their results exceed the model's dtype; use an earlier checkpoint"
        )
