"""What `sample` draws with, seen at the last moment before it draws."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mantrans.models import sampling


def probabilities_of(logits: Tensor, **options) -> Tensor:
    """The probabilities (B, V) that `sample` draws with, given its options; float64."""
    seen: list[Tensor] = []
    columns = torch.arange(logits.shape[1]).expand(len(logits), -1)
    most_likely = sampling._most_likely

    def choose(logits: Tensor, k: int) -> Tensor:
        nonlocal columns
        columns = most_likely(logits, k)
        return columns

    def note(p: Tensor, *rest, **named) -> Tensor:
        seen.append(p)
        return p.argmax(-1, keepdim=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "multinomial", note)
        patch.setattr(sampling, "_most_likely", choose)
        sampling.sample(logits, torch.Generator(), **options)
    whole = torch.zeros(logits.shape, dtype=torch.float64)
    return whole.scatter(1, columns, seen[0].double())
