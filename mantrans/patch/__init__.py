"""Our operations inside models of transformers: put in, and taken out again.

A patched model has the same parameters and gives the same numbers to rounding, forward and
backward, with a cache, with padding, under autocast, with gradient checkpointing, in
`torch.compile(fullgraph=True)` and in `transformers.Trainer`. Where a cache or a mask is used,
attention is the model's own code with PyTorch's SDPA. In training, with labels, its loss is made
without logits: `outputs.logits` is None. Source: transformers 5.24, whose layers take `cache`.
"""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

from torch import nn

from mantrans.ops.registration import expect
from mantrans.patch import attention, gpt2, llama
from mantrans.patch.replace import OWN, Part, is_put, put, take_out

__all__ = ["patch_gpt2", "patch_llama", "patch_qwen3", "unpatch"]

ATTENTION = "_attention_before_patch"


def patch_gpt2(model: Any) -> Any:
    """Put our layer norm, attention, GELU and loss into a GPT2LMHeadModel; returns the model.

    ValueError that names the setting of its config that our operations do not serve, or the module
    whose forward is not that of its class in transformers. Then the model is as it was.
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
    patched = isinstance(model, nn.Module) and ATTENTION in vars(model)
    expect("model", patched, "a patched model", type(model).__name__)
    for name, module in model.named_modules():
        covered = hasattr(type(module), OWN) and not is_put(module)
        expect("model", not covered, "no class around a patched one", f"one in {name or 'it'}")
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
    parts = list(family.parts(model, kind))
    _expect_own_code(model, parts)
    before = model.config._attn_implementation
    expect("config", before != attention.NAME, "the model's own", "that of a patched one")
    attention.register()
    model.set_attn_implementation(attention.NAME)
    setattr(model, ATTENTION, before)
    for module, _, forward in parts:
        if not is_put(module):  # a layer may be there twice
            put(module, forward)
    return model


def _expect_own_code(model: Any, parts: list[Part]) -> None:
    """ValueError for the first module that does not compute what ours would replace."""
    names = {module: name for name, module in model.named_modules()}
    for module, kind, _ in parts:
        own = type(module).forward is kind.forward and "forward" not in vars(module)
        expect(names[module] or "model", own, f"{kind.__name__}'s own forward", "another one")


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
