"""Our attention among those that transformers chooses from, by the name "mantrans".

It serves what is causal, scaled by 1/√D, with no more in a module's call. Where a mask hides keys,
as for padding or packed positions, and where a cache holds more keys than there are queries,
PyTorch's SDPA computes, as it does in transformers itself; so it does with arguments unknown here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mantrans import ops
from mantrans.ops.registration import expect

NAME = "mantrans"

# Of what reaches a layer, the arguments that change nothing there. is_causal: see `_causal`.
INERT = {
    "position_ids", "token_type_ids", "use_cache", "output_hidden_states", "output_attentions",
    "num_items_in_batch", "shift_labels", "is_causal",
}  # fmt: skip


def register() -> None:
    """Make transformers know it, and how its masks are made."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def is_plain(module: Any, mask: Tensor | None, dropout: float, kwargs: dict[str, Any]) -> bool:
    """Whether a layer's attention can be ours without the module's own code, which ends in
    `attention`. kwargs: its arguments but for hidden states, mask and rotations."""
    return (
        mask is None and _causal(module, module.scaling, module.head_dim, kwargs)
        and not (module.training and dropout) and module.config._attn_implementation == NAME
    )  # fmt: skip


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: query (B, H, T, D), key, value (B, H_kv, S, D) -> (B, T, H, D)."""
    same_length = query.shape[2] == key.shape[2]
    if attention_mask is None and same_length and _causal(module, scaling, query.shape[3], kwargs):
        expect("attention dropout", dropout == 0, 0, dropout)
        heads = (x.transpose(1, 2) for x in (query, key, value))
        return ops.attention(*heads, window=sliding_window), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is None and same_length and kwargs.get("is_causal") is not False:
        attention_mask = _of_window(sliding_window, query)  # `mask` made none
    return sdpa_attention_forward(
        module, query, key, value, attention_mask,
        dropout=dropout, scaling=scaling, sliding_window=sliding_window, **kwargs,
    )  # fmt: skip


def _causal(module: Any, scaling: float | None, D: int, kwargs: dict[str, Any]) -> bool:
    """Whether scores are causal and scaled by 1/√D, and no argument asks for anything else."""
    return (
        module.is_causal and kwargs.get("is_causal") is not False
        and scaling in (None, D**-0.5)
        and all(value is None or name in INERT for name, value in kwargs.items())
    )  # fmt: skip


def _of_window(window: int | None, query: Tensor) -> Tensor | None:
    """Which keys a query sees in a causal window, (T, T); None for a window of all."""
    if window is None or window >= query.shape[2]:
        return None
    position = torch.arange(query.shape[2], device=query.device)
    behind = position[:, None] - position
    return (behind >= 0) & (behind < window)


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
