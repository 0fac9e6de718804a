"""Gradients of whole tiny models, with Llama's, Qwen's and mixed blocks, against differences.

No autograd and no other implementation takes part: what is compared is how the loss changes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mantrans.kernels.reference import document_starts
from mantrans.models.transformer import CustomTransformer
from mantrans.wrapper import CustomTransformerWrapper

V, B, T = 13, 2, 7
LLAMA: dict[str, Any] = {"norm": "rms_norm", "position": "rope", "mlp": "swiglu", "bias": False}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, "n_kv_heads": 2, "head_dim": 6},
    "qwen2, window": {**LLAMA, "qkv_bias": True, "attention_window": 3, "tie_embeddings": False},
    "qwen3": {**LLAMA, "qk_norm": True, "n_kv_heads": 1, "rope_scaling_factor": 4.0,
              "rope_original_length": 8, "rope_theta": 50.0},
    "all biases": {**LLAMA, "bias": True, "n_kv_heads": 2},
    "gpt2 with head norms": {"qk_norm": True, "head_dim": 4, "n_kv_heads": 2},
    "gpt2 with a window": {"attention_window": 2, "head_dim": 3},
    "layer norms and rope": {**LLAMA, "norm": "layer_norm", "bias": True},
    "rms norms and gelu": {"norm": "rms_norm", "n_kv_heads": 1},
}  # fmt: skip
FEW = ("qwen3", "gpt2 with head norms")
STEP = 2e-3


def loss(model: CustomTransformer, tokens: torch.Tensor, starts: torch.Tensor) -> float:
    return model.losses(tokens[:, :-1], tokens[:, 1:], starts).mean().item()


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [m if m in FEW else pytest.param(m, marks=pytest.mark.slow) for m in MODELS]
)
def test_gradient_equals_slope(name: str, backend: str) -> None:
    """Along a random direction of each parameter; the error of the difference is of sixth order."""
    wrapper = CustomTransformerWrapper(
        V, 16, 2, 4, 10, T, dtype=torch.float64, device="cpu", backend=backend,
        initializer_range=0.3, **MODELS[name],
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for parameter, value in wrapper.model.named_parameters():
        if value.dim() == 1:
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            wrapper.model.parameters.write(parameter, value + 0.2 * noise)
    tokens = torch.randint(0, V, (B, T + 1), generator=generator)
    tokens[0, 3] = 0  # the end of a document
    starts = document_starts(tokens[:, :-1], 0)
    model, scale = wrapper.model, torch.tensor(1 / (B * T), dtype=torch.float64)
    model.forward_backward(
        tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), scale, starts, accumulate=False
    )
    gradients = {n: g.clone() for n, g in model.named_gradients()}
    for parameter, value in model.named_parameters():
        direction = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        direction = direction / direction.norm()
        start, slope = value.clone(), 0.0
        for distance, weight in ((1, 3 / 4), (2, -3 / 20), (3, 1 / 60)):
            for sign in (1, -1):
                value.copy_(start + sign * distance * STEP * direction)
                slope += sign * weight * loss(model, tokens, starts) / STEP
        value.copy_(start)
        expected = (gradients[parameter] * direction).sum().item()
        assert abs(slope - expected) <= 1e-10, f"{parameter}: {slope} and {expected}"
        assert gradients[parameter].norm() > 0 or parameter.endswith("qkv.bias")
