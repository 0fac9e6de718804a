"""Llama's and Qwen3's layers through our operations."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from mantrans import ops
from mantrans.patch.attention import is_plain
from mantrans.patch.causal_lm import base_forward, causal_lm_forward
from mantrans.patch.norms import add_norm, norm_forward
from mantrans.patch.replace import Part, is_bare

SETTINGS: dict[str, Any] = {"hidden_act": ("silu", "swish"), "attention_dropout": (0,)}


def parts(model: Any, kind: type[nn.Module]) -> Iterator[Part]:
    """What runs ours in a model of this kind: LlamaForCausalLM or Qwen3ForCausalLM."""
    home, family = import_module(kind.__module__), kind.__name__.removesuffix("ForCausalLM")
    names = ("RMSNorm", "DecoderLayer", "MLP", "Attention")
    norm, layer_kind, mlp, attention = (getattr(home, family + name) for name in names)
    yield model, kind, causal_lm_forward
    yield model.model, getattr(home, family + "Model"), base_forward
    yield model.model.norm, norm, norm_forward
    for layer in model.model.layers:
        yield layer, layer_kind, layer_forward
        yield layer.mlp, mlp, mlp_forward
        yield layer.self_attn, attention, attention_forward
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        if hasattr(layer.self_attn, "q_norm"):
            norms += [layer.self_attn.q_norm, layer.self_attn.k_norm]
        for module in norms:
            yield module, norm, norm_forward


def layer_forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    """x (B, T, C) -> (B, T, C)."""
    branch, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
    normed, total = add_norm(self.post_attention_layernorm, branch, hidden_states)
    return total + self.mlp(normed)


def mlp_forward(self: Any, x: Tensor) -> Tensor:
    """The module's own code for another activation, or one that is watched by a hook."""
    if type(self.act_fn).__name__ not in ("SiLUActivation", "SiLU") or not is_bare(self.act_fn):
        return self.forward_before_patch(x)
    return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))


def attention_forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The module's own code where ours is not all, as for a mask or a cache."""
    if not is_plain(self, attention_mask, self.attention_dropout, kwargs):
        return self.forward_before_patch(
            hidden_states=hidden_states, position_embeddings=position_embeddings,
            attention_mask=attention_mask, **kwargs,
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
