"""Our operations inside models of transformers: put in, and taken out again.

A patched model has the same parameters and gives the same numbers to rounding, forward and
backward, with a cache, with padding, under autocast, with gradient checkpointing and in
`transformers.Trainer`; `torch.compile(fullgraph=True)` does not take it yet. Where a cache or a
mask is used, attention is the model's own code with PyTorch's SDPA. In training, with labels, its
loss is made without logits: `outputs.logits` is None. Source: transformers 5.24, whose layers take
`cache`.
"""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

from mantrans.ops.registration import expect
from mantrans.patch import attention, gpt2, llama
from mantrans.patch.causal_lm import base_forward, causal_lm_forward
from mantrans.patch.replace import put, take_out

__all__ = ["patch_gpt2", "patch_llama", "patch_qwen3", "unpatch"]

ATTENTION = "_attention_before_patch"


def patch_gpt2(model: Any) -> Any:
    """Put our layer norm, attention, GELU and loss into a GPT2LMHeadModel; returns the model.

    ValueError that names the setting of its config that our operations do not serve.
    """
    from transformers import GPT2LMHeadModel

    return _patched(model, GPT2LMHeadModel, gpt2)


def patch_llama(model: Any) -> Any:
    """Put our RMS norm, RoPE, attention, SwiGLU and loss into a LlamaForCausalLM.

    Returns the model. ValueError as `patch_gpt2`.
    """
    from transformers import LlamaForCausalLM

    return _patched(model, LlamaForCausalLM, llama)


def patch_qwen3(model: Any) -> Any:
    """As `patch_llama`, for a Qwen3ForCausalLM, with its norms of heads and its window."""
    from transformers import Qwen3ForCausalLM

    return _patched(model, Qwen3ForCausalLM, llama)


def unpatch(model: Any) -> Any:
    """Take our operations out again. Returns the model, which is as it was before."""
    expect("model", hasattr(model, ATTENTION), "a patched model", type(model).__name__)
    for module in model.modules():
        take_out(module)
    model.set_attn_implementation(vars(model).pop(ATTENTION))
    return model


def _patched(model: Any, kind: type[Any], family: ModuleType) -> Any:
    expect("model", isinstance(model, kind), f"a {kind.__name__}", type(model).__name__)
    expect("model", not hasattr(model, ATTENTION), "one without our operations", "a patched one")
    for name, module in model.named_modules():
        hooked = hasattr(module, "_hf_hook")
        expect("model", not hooked, "one without accelerate's hooks", f"one on {name or 'it'}")
    _check(model.config, family.SETTINGS)
    attention.register()
    before = model.config._attn_implementation
    model.set_attn_implementation(attention.NAME)
    setattr(model, ATTENTION, before)
    family.patch_layers(model)
    put(getattr(model, model.base_model_prefix), base_forward)
    put(model, causal_lm_forward)
    return model


def _check(config: Any, settings: dict[str, tuple[Any, ...]]) -> None:
    """ValueError for the first setting that our operations do not serve."""
    import transformers
    from transformers.models.llama.modeling_llama import LlamaAttention

    known = "cache" in inspect.signature(LlamaAttention.forward).parameters
    expect("transformers", known, "5.24 or later", transformers.__version__)
    common = {"is_causal": (True,), "output_attentions": (False,)}
    for name, accepted in (common | settings).items():
        value = getattr(config, name, accepted[0])
        expected = " or ".join(map(str, accepted))
        expect(f"config.{name}", value in accepted, expected, value)
