"""GPT-2's layers through our operations."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from mantrans import ops
from mantrans.ops.registration import expect
from mantrans.patch.attention import is_plain
from mantrans.patch.causal_lm import base_forward, causal_lm_forward
from mantrans.patch.norms import add_norm, norm_forward
from mantrans.patch.replace import Part, is_bare

SETTINGS: dict[str, Any] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "attn_pdrop": (0,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
}


def parts(model: Any, kind: type[nn.Module]) -> Iterator[Part]:
    """What runs ours in a model of this kind, GPT2LMHeadModel."""
    home = import_module(kind.__module__)
    yield model, kind, causal_lm_forward
    yield model.transformer, home.GPT2Model, base_forward
    yield model.transformer.ln_f, nn.LayerNorm, norm_forward
    for block in model.transformer.h:
        yield block, home.GPT2Block, block_forward
        yield block.ln_1, nn.LayerNorm, norm_forward
        yield block.attn, home.GPT2Attention, attention_forward
        yield block.ln_2, nn.LayerNorm, norm_forward
        yield block.mlp, home.GPT2MLP, mlp_forward


def block_forward(
    self: Any,
    hidden_states: Tensor,
    cache: Any = None,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """x (B, T, C) -> (B, T, C). ValueError for an encoder: there is no cross-attention."""
    unread = encoder_hidden_states is None
    expect("encoder_hidden_states", unread, "None for a patched model", "a tensor")
    normed = self.ln_1(hidden_states)
    branch, _ = self.attn(normed, cache=cache, attention_mask=attention_mask, **kwargs)
    normed, total = add_norm(self.ln_2, branch, hidden_states)
    return total + self.mlp(normed)


def mlp_forward(self: Any, x: Tensor) -> Tensor:
    """The first product without its bias, which GELU adds. The module's own code for another
    activation, or one that is watched by a hook."""
    if type(self.act).__name__ not in ("NewGELUActivation", "GELUTanh") or not is_bare(self.act):
        return self.forward_before_patch(x)
    if type(self.c_fc).__name__ != "Conv1D" or not is_bare(self.c_fc):  # as with an adapter
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
    """The module's own code where ours is not all, as for a mask or a cache."""
    if cache is not None:
        kwargs = {"cache": cache, **kwargs}
    if not is_plain(self, attention_mask, self.attn_dropout.p, kwargs):
        return self.forward_before_patch(hidden_states, attention_mask=attention_mask, **kwargs)
    out = ops.packed_attention(self.c_attn(hidden_states), self.num_heads)
    return self.resid_dropout(self.c_proj(out)), None
