"""StarCoder2 (Lozhkov et al. 2024): transformers' names of its layers, and its fields.

It has GPT-2's norms, biases and MLP with Llama's rotary positions, as the quickstart's model has.

Source: Starcoder2ForCausalLM and Starcoder2Config of transformers 5.24.
"""

from mantrans.models.family import Family
from mantrans.models.llama import FIELDS, LLAMA

STARCODER2 = Family(
    model_type="starcoder2",
    architecture="Starcoder2ForCausalLM",
    outer=LLAMA.outer,
    blocks=LLAMA.blocks,
    inner={
        "norm_1": ("input_layernorm",),
        "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.projection": ("self_attn.o_proj",),
        "norm_2": ("post_attention_layernorm",),
        "mlp.up": ("mlp.c_fc",),
        "mlp.down": ("mlp.c_proj",),
    },
    fields=FIELDS | {"layer_norm_epsilon": "norm_epsilon"},
    rope=LLAMA.rope,
    defaults={
        "n_kv_heads": 2,
        "head_dim": None,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.018042,
        "tie_embeddings": True,
    },
    # A model without biases is written with zeros.
    fixed={
        "norm": "layer_norm",
        "position": "rope",
        "mlp": "gelu",
        "qk_norm": False,
        "attention_window": None,
    },
    accepted={"hidden_act": ("gelu_pytorch_tanh", "gelu_new"), "use_bias": (True,)},
    written={"attention_dropout": 0.0, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    llama_cpp={"rope_scaling_factor": None},
    square_in_llama_cpp=True,
)
