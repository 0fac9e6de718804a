"""Our attention among those that transformers chooses from, by the name "mantrans".

Where a mask hides keys, as for padding or packed positions, and where a cache holds more keys than
there are queries, PyTorch's SDPA computes, as it does in transformers itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mantrans import ops
from mantrans.ops.registration import expect

NAME = "mantrans"


def register() -> None:
    """Make transformers know it, and how its masks are made."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: query (B, H, T, D), key, value (B, H_kv, S, D) -> (B, T, H, D)."""
    if attention_mask is None and query.shape[2] == key.shape[2]:
        expect("attention dropout", dropout == 0, 0, dropout)
        heads = (x.transpose(1, 2) for x in (query, key, value))
        return ops.attention(*heads, window=sliding_window), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(
        module, query, key, value, attention_mask,
        dropout=dropout, sliding_window=sliding_window, **kwargs,
    )  # fmt: skip


def mask(
    *,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """SDPA's mask; none for a window that ours needs no mask for."""
    from transformers.masking_utils import sdpa_mask

    if allow_is_causal_skip and local_size is not None and q_length == kv_length:
        if attention_mask is None:
            return None
        if not torch.compiler.is_compiling() and bool(attention_mask.all()):
            return None
    return sdpa_mask(
        q_length=q_length, kv_length=kv_length, attention_mask=attention_mask,
        local_size=local_size, allow_is_causal_skip=allow_is_causal_skip, **kwargs,
    )  # fmt: skip
