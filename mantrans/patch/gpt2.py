"""GPT-2's layers through our operations."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mantrans import ops
from mantrans.patch.norms import add_norm, norm_forward
from mantrans.patch.replace import own_forward, put

SETTINGS: dict[str, Any] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "attn_pdrop": (0,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
}


def patch_layers(model: Any) -> None:
    """Of a GPT2LMHeadModel."""
    put(model.transformer.ln_f, norm_forward)
    for block in model.transformer.h:
        put(block, block_forward)
        put(block.ln_1, norm_forward)
        put(block.attn, attention_forward)
        put(block.ln_2, norm_forward)
        put(block.mlp, mlp_forward)


def block_forward(
    self: Any,
    hidden_states: Tensor,
    cache: Any = None,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """x (B, T, C) -> (B, T, C). Without cross-attention there is nothing of an encoder."""
    normed = self.ln_1(hidden_states)
    branch, _ = self.attn(normed, cache=cache, attention_mask=attention_mask, **kwargs)
    normed, total = add_norm(self.ln_2, branch, hidden_states)
    return total + self.mlp(normed)


def mlp_forward(self: Any, x: Tensor) -> Tensor:
    """The first product without its bias, which GELU adds."""
    if type(self.c_fc).__name__ != "Conv1D":  # an adapter stands around it
        return self.dropout(self.c_proj(ops.bias_gelu(self.c_fc(x))))
    h = x @ self.c_fc.weight
    return self.dropout(self.c_proj(ops.bias_gelu(h, self.c_fc.bias)))


def attention_forward(
    self: Any,
    hidden_states: Tensor,
    cache: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The module's own code where there is a cache or a mask; it ends in `attention.attention`."""
    if cache is not None or attention_mask is not None:
        return own_forward(self)(
            hidden_states, cache=cache, attention_mask=attention_mask, **kwargs
        )
    out = ops.packed_attention(self.c_attn(hidden_states), self.num_heads)
    return self.resid_dropout(self.c_proj(out)), None
