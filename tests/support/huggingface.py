"""transformers' GPT-2 with our weights: the oracle of the whole model."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from mantrans.config import ModelConfig
from mantrans.interop.huggingface import to_theirs
from mantrans.models import GPT2


def their_name(name: str) -> str:
    """The name of our parameter in GPT2LMHeadModel."""
    return GPT2.their_names(name)[0]


def oriented(name: str, x: torch.Tensor) -> torch.Tensor:
    """A view of GPT-2's tensor (or its gradient) in our orientation, or of ours in theirs."""
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
        for name, value in to_theirs(GPT2, config, named_parameters).items():
            theirs[name].copy_(value)
    return model


def their_load(folder: Path, dtype: torch.dtype | str = "auto") -> torch.nn.Module:
    """What transformers makes of a folder; it must have nothing to remark about it."""
    from transformers import AutoModelForCausalLM

    remarks: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: remarks.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, attn_implementation="eager"
        )
    finally:
        logger.removeHandler(handler)
    assert not remarks and not any(info.values()), (remarks, info)
    return model.eval()
