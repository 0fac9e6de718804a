"""Llama and Qwen (Touvron et al. 2023; Yang et al. 2024, 2025): transformers' names and fields.

They differ in biases and in norms of the heads of q and k: Llama has neither unless its config says
so, Qwen2 has biases of q, k and v alone, Qwen3 has the norms.

Source: {Llama,Qwen2,Qwen3}ForCausalLM and their configs of transformers 5.24.
"""

from dataclasses import replace

from mantrans.models.family import Family

_BIASES = {"qkv_bias": "attention_bias", "projection_bias": "attention_bias"}
FIELDS = {
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "d_model": "hidden_size",
    "n_blocks": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "d_ffn": "intermediate_size",
    "layer_norm_epsilon": "rms_norm_eps",
    "initializer_range": "initializer_range",
    "tie_embeddings": "tie_word_embeddings",
}
_DEFAULTS = {
    "head_dim": None,
    "layer_norm_epsilon": 1e-6,
    "initializer_range": 0.02,
    "tie_embeddings": False,
}
_FIXED = {"norm": "rms_norm", "position": "rope", "mlp": "swiglu", "bias": False}

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    outer={
        "token_embedding": "model.embed_tokens",
        "final_norm": "model.norm",
        "output": "lm_head",
    },
    blocks="model.layers",
    inner={
        "norm_1": ("input_layernorm",),
        "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.q_norm": ("self_attn.q_norm",),
        "attention.k_norm": ("self_attn.k_norm",),
        "attention.projection": ("self_attn.o_proj",),
        "norm_2": ("post_attention_layernorm",),
        "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.down": ("mlp.down_proj",),
    },
    fields=FIELDS | _BIASES | {"mlp_bias": "mlp_bias"},
    rope={
        "rope_theta": "rope_theta",
        "rope_scaling_factor": "factor",
        "rope_low_freq_factor": "low_freq_factor",
        "rope_high_freq_factor": "high_freq_factor",
        "rope_original_length": "original_max_position_embeddings",
    },
    defaults=_DEFAULTS
    | {"n_kv_heads": None, "qkv_bias": False, "projection_bias": False, "mlp_bias": False},
    fixed=_FIXED | {"qk_norm": False, "attention_window": None},
    accepted={"hidden_act": ("silu",), "pretraining_tp": (1,)},
    written={"attention_dropout": 0.0},
    whole_heads=True,
    interleaved_in_gguf=True,
)
QWEN2 = replace(
    LLAMA,
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    window=True,
    fields=FIELDS,
    defaults=_DEFAULTS | {"n_kv_heads": 32},
    fixed=_FIXED
    | {"qk_norm": False, "qkv_bias": True, "projection_bias": False, "mlp_bias": False},
    accepted={"hidden_act": ("silu",)},
    whole_heads=False,
    interleaved_in_gguf=False,
    llama_cpp={"attention_window": None, "rope_scaling_factor": None},
    square_in_llama_cpp=True,
)
QWEN3 = replace(
    QWEN2,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    fields=FIELDS | _BIASES,
    defaults=_DEFAULTS
    | {"n_kv_heads": 32, "head_dim": 128, "qkv_bias": False, "projection_bias": False},
    fixed=_FIXED | {"qk_norm": True, "mlp_bias": False},
    llama_cpp={"attention_window": None, "rope_scaling_factor": None, "qkv_bias": False},
    square_in_llama_cpp=False,
)
