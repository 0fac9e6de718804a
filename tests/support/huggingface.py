"""transformers' GPT-2 with our weights: the oracle of the whole model."""

from __future__ import annotations

import torch
from torch import Tensor

from mantrans.config import ModelConfig

# our name -> theirs; their Conv1D stores matrices transposed, (in, out)
OUTER = {
    "token_embedding.weight": "transformer.wte.weight",
    "position_embedding.weight": "transformer.wpe.weight",
    "output.weight": "lm_head.weight",
    "final_norm": "transformer.ln_f",
}
INNER = {
    "norm_1": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.projection": "attn.c_proj",
    "norm_2": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}


def their_name(name: str) -> str:
    """The name of one of our parameters in GPT2LMHeadModel."""
    if name in OUTER:
        return OUTER[name]
    layer, _, kind = name.rpartition(".")
    if layer in OUTER:
        return f"{OUTER[layer]}.{kind}"
    _, index, layer = layer.split(".", 2)
    return f"transformer.h.{index}.{INNER[layer]}.{kind}"


def oriented(name: str, x: Tensor) -> Tensor:
    """A tensor of theirs (or a gradient) in our orientation."""
    return x.T if name.startswith("blocks.") and x.dim() == 2 else x


def gpt2(config: ModelConfig, dtype: torch.dtype, named_parameters) -> torch.nn.Module:
    """GPT2LMHeadModel of the same shape, without dropout, holding the given weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.max_seq_len,
            n_embd=config.d_model,
            n_layer=config.n_blocks,
            n_head=config.n_heads,
            n_inner=config.d_ffn,
            activation_function="gelu_new",
            bos_token_id=None,
            eos_token_id=None,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            layer_norm_epsilon=config.layer_norm_epsilon,
            tie_word_embeddings=config.tie_embeddings,
            attn_implementation="eager",
        )
    ).to(dtype)
    theirs = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in named_parameters:
            target = theirs[their_name(name)]
            target.copy_(oriented(name, value))
    return model
