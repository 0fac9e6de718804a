"""transformers' GPT-2 with our weights: the oracle of the whole model."""

from __future__ import annotations

import torch

from mantrans.config import ModelConfig
from mantrans.interop.huggingface import oriented, their_name

__all__ = ["gpt2", "oriented", "their_name"]


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
            theirs[their_name(name)].copy_(oriented(name, value))
    return model
