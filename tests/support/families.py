"""transformers' Llama, Qwen2, Qwen3 and StarCoder2 with our weights: the oracle of the whole model.

In float64 they round to float32 in four places: RMS norm, the rotary tables, eager softmax and the
loss. `exact` puts float64 in place of the first two; the others are avoided by SDPA, and by forming
the loss from the logits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mantrans.config import ModelConfig
from mantrans.models import FAMILIES
from mantrans.models.family import Family, packed_rows
from mantrans.wrapper import CustomTransformerWrapper

V, T_MAX = 97, 40
_COMMON: dict[str, Any] = {
    "vocab_size": V, "d_model": 48, "n_blocks": 2, "n_heads": 4, "d_ffn": 80,
    "max_seq_len": T_MAX, "norm": "rms_norm", "position": "rope", "mlp": "swiglu", "bias": False,
    "layer_norm_epsilon": 1e-6, "tie_embeddings": False,
}  # fmt: skip
_SCALED = {
    "rope_theta": 500.0, "rope_scaling_factor": 8.0, "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0, "rope_original_length": 32,
}  # fmt: skip
_ROTARY_GPT = {"norm": "layer_norm", "mlp": "gelu", "bias": True}
# Groups of 1, 2, 3 and H; head widths 12, 10 (not d_model / n_heads), 8 and 2; each family with its
# biases, with and without a window.
CASES: dict[str, dict[str, Any]] = {
    "llama": {"n_kv_heads": 2},
    "llama, scaled, tied": {**_SCALED, "tie_embeddings": True, "n_kv_heads": 1, "head_dim": 10},
    "llama, biases": {"qkv_bias": True, "projection_bias": True, "mlp_bias": True},
    "llama, one head": {"n_heads": 1, "head_dim": 2},
    "qwen2": {"qkv_bias": True, "n_kv_heads": 2, "tie_embeddings": True},
    "qwen2, window": {"qkv_bias": True, "n_heads": 6, "n_kv_heads": 2, "attention_window": 7},
    "qwen3": {"qk_norm": True, "head_dim": 10, "n_kv_heads": 2, "rope_theta": 1e6},
    "qwen3, window, biases": {
        "qk_norm": True, "n_heads": 6, "n_kv_heads": 6, "attention_window": 2, "qkv_bias": True,
        "projection_bias": True, "tie_embeddings": True,
    },
    "qwen3, wide window": {"qk_norm": True, "n_kv_heads": 1, "attention_window": 39},
    "starcoder2": {**_ROTARY_GPT, "n_kv_heads": 2, "head_dim": 10},
    "starcoder2, scaled, tied": {**_ROTARY_GPT, **_SCALED, "tie_embeddings": True},
}  # fmt: skip


def family_of(config: ModelConfig) -> Family:
    (family,) = (f for f in FAMILIES if f.describes(config))
    return family


def ours(case: str, dtype: torch.dtype, backend: str, **options: Any) -> CustomTransformerWrapper:
    """Our model, with weights large enough that every path matters. options: also of the shape."""
    keywords = {"device": "cpu", **_COMMON, **CASES[case], **options}
    model = CustomTransformerWrapper(dtype=dtype, backend=backend, **keywords)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in list(model.model.named_parameters()):
        base = 1.0 if "norm" in name else 0.0
        scale = 0.3 if "norm" in name or "qkv" in name else 0.1
        noise = torch.randn(parameter.shape, generator=generator)
        model.model.parameters.write(name, base + scale * noise)
    return model


def theirs(
    model: CustomTransformerWrapper, exact: bool = False, dtype: torch.dtype | None = None
) -> torch.nn.Module:
    """{Llama,Qwen2,Qwen3,Starcoder2}ForCausalLM of the same shape, device and weights, with SDPA.

    exact: float64 in place of float32. dtype: that of our model unless given.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config, family = model.config, family_of(model.config)
    settings = AutoConfig.for_model(family.model_type, **_their_config(config, family))
    found = AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa")
    assert type(found).__name__ == family.architecture
    found = found.to(model.device, dtype or model.dtype)
    by_name = dict(found.named_parameters())
    with torch.no_grad():
        for name, value in model.model.named_parameters():
            names = family.their_names(name)
            parts = value.split(packed_rows(config, name) or len(value))
            for their_name, part in zip(names, parts, strict=True):
                by_name.pop(their_name).copy_(part)
    assert not by_name, f"not written: {sorted(by_name)}"
    if exact:
        for layer in found.modules():
            kind = type(layer).__name__
            if kind.endswith("RMSNorm"):
                layer.forward = _exact_norm(layer)
            elif kind.endswith("RotaryEmbedding"):
                layer.forward = _exact_tables(config)
    return found


def gradients(model: CustomTransformerWrapper, found: torch.nn.Module) -> dict[str, Tensor]:
    """Their gradients under our names."""
    by_name = dict(found.named_parameters())
    family = family_of(model.config)
    return {
        name: torch.cat([by_name[n].grad for n in family.their_names(name)])
        for name, _ in model.model.named_parameters()
    }


def weights(model: CustomTransformerWrapper, found: torch.nn.Module) -> dict[str, Tensor]:
    """Their weights under our names."""
    by_name = dict(found.named_parameters())
    family = family_of(model.config)
    return {
        name: torch.cat([by_name[n].detach() for n in family.their_names(name)])
        for name, _ in model.model.named_parameters()
    }


def _their_config(config: ModelConfig, family: Family) -> dict[str, Any]:
    resolved = config.resolved()
    values = {theirs: resolved[ours] for ours, theirs in family.fields.items()}
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling_factor is not None:
        rope = {theirs: resolved[ours] for ours, theirs in family.rope.items()}
        rope["rope_type"] = "llama3"
    if config.attention_window is not None:
        values |= {
            "use_sliding_window": True, "sliding_window": config.attention_window,
            "max_window_layers": 0,
        }  # fmt: skip
    special = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    return {**values, **special, "rope_parameters": rope}


def _exact_norm(layer: torch.nn.Module):
    def forward(x: Tensor) -> Tensor:
        mean_square = x.double().pow(2).mean(-1, keepdim=True)
        return layer.weight * (x.double() * torch.rsqrt(mean_square + layer.variance_epsilon))

    return forward


def _exact_tables(config: ModelConfig):
    """As `_compute_llama3_parameters` of transformers has it, in float64, one frequency a time."""
    D, theta = config.head_width, config.rope_theta
    frequencies = []
    for i in range(0, D, 2):
        f = 1.0 / theta ** (i / D)
        if (factor := config.rope_scaling_factor) is not None:
            low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
            length, wave = config.rope_original_length, 2 * math.pi / f
            if wave > length / low:
                f = f / factor
            elif wave >= length / high:
                smooth = (length / wave - low) / (high - low)
                f = (1 - smooth) * f / factor + smooth * f
        frequencies.append(f)
    table = torch.tensor(frequencies, dtype=torch.float64)

    def forward(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].double() * table.to(position_ids.device)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    return forward
