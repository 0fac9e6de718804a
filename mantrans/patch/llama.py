"""Llama's and Qwen3's layers through our operations."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mantrans import ops
from mantrans.patch.norms import add_norm, norm_forward
from mantrans.patch.replace import own_forward, put

SETTINGS: dict[str, Any] = {"hidden_act": ("silu", "swish"), "attention_dropout": (0,)}


def patch_layers(model: Any) -> None:
    """Of a LlamaForCausalLM or Qwen3ForCausalLM."""
    put(model.model.norm, norm_forward)
    for layer in model.model.layers:
        put(layer, layer_forward)
        put(layer.mlp, mlp_forward)
        put(layer.self_attn, attention_forward)
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        if hasattr(layer.self_attn, "q_norm"):
            norms += [layer.self_attn.q_norm, layer.self_attn.k_norm]
        for norm in norms:
            put(norm, norm_forward)


def layer_forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    """x (B, T, C) -> (B, T, C)."""
    branch, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
    normed, total = add_norm(self.post_attention_layernorm, branch, hidden_states)
    return total + self.mlp(normed)


def mlp_forward(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))


def attention_forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The module's own code where there is a cache or a mask; it ends in `attention.attention`."""
    if cache is not None or attention_mask is not None:
        return own_forward(self)(
            hidden_states=hidden_states, position_embeddings=position_embeddings,
            attention_mask=attention_mask, cache=cache, **kwargs,
        )  # fmt: skip
    q, k, v = (
        project(hidden_states).unflatten(-1, (-1, self.head_dim))
        for project in (self.q_proj, self.k_proj, self.v_proj)
    )
    if hasattr(self, "q_norm"):
        q, k = self.q_norm(q), self.k_norm(k)
    q, k = ops.rope(q, k, *position_embeddings)
    out = ops.attention(q, k, v, window=getattr(self, "sliding_window", None))
    return self.o_proj(out.flatten(-2)), None
