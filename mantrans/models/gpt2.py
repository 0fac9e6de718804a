"""GPT-2 (Radford et al. 2019): transformers' names of its layers, and its fields.

Source: GPT2LMHeadModel and GPT2Config of transformers 5.24.
"""

from mantrans.models.family import Family

# outside the blocks and inside
OUTER_NAMES = {
    "token_embedding": "transformer.wte",
    "position_embedding": "transformer.wpe",
    "final_norm": "transformer.ln_f",
    "output": "lm_head",
}
INNER_NAMES = {
    "norm_1": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.projection": "attn.c_proj",
    "norm_2": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    outer=OUTER_NAMES,
    blocks="transformer.h",
    inner={ours: (theirs,) for ours, theirs in INNER_NAMES.items()},
    transposed=True,
    fields={
        "vocab_size": "vocab_size",
        "max_seq_len": "n_positions",
        "d_model": "n_embd",
        "n_blocks": "n_layer",
        "n_heads": "n_head",
        "d_ffn": "n_inner",
        "layer_norm_epsilon": "layer_norm_epsilon",
        "initializer_range": "initializer_range",
        "tie_embeddings": "tie_word_embeddings",
    },
    defaults={
        "d_ffn": None,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "tie_embeddings": True,
    },
    # A model without biases is written with zeros.
    fixed={
        "norm": "layer_norm",
        "position": "learned",
        "mlp": "gelu",
        "n_kv_heads": None,
        "head_dim": None,
        "qk_norm": False,
        "attention_window": None,
    },
    accepted={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    written={"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    repeated={"n_ctx": "max_seq_len"},  # llama.cpp's converter reads it
)
