"""Counts of work and memory for Llama's and Qwen's blocks, as `test_flops.py` holds GPT-2's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import peak_on_cpu
from mantrans.config import ModelConfig
from mantrans.kernels import native, reference
from mantrans.models.transformer import CustomTransformer
from mantrans.training import flops, memory
from tests.mantrans.training.test_flops import Products, ResultsOnly, configured, storage_bytes

LLAMA: dict[str, Any] = {"norm": "rms_norm", "position": "rope", "mlp": "swiglu", "bias": False}
SMALL: dict[str, Any] = {
    "d_model": 32, "n_blocks": 3, "n_heads": 4, "d_ffn": 96, "max_seq_len": 24, "vocab_size": 130,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, "n_kv_heads": 2},
    "qwen2, window": {**LLAMA, "n_kv_heads": 1, "qkv_bias": True, "attention_window": 5},
    "qwen3": {**LLAMA, "qk_norm": True, "head_dim": 12, "tie_embeddings": False},
    "gpt2 with head norms": {"qk_norm": True, "head_dim": 12, "n_kv_heads": 2},
}
QWEN25 = ModelConfig(
    d_model=896, n_blocks=24, n_heads=14, n_kv_heads=2, d_ffn=4864, vocab_size=151_936,
    max_seq_len=1024, qkv_bias=True, **LLAMA,
)  # fmt: skip


def test_parameters_qwen25() -> None:
    """Its card says 0.49B parameters, 0.36B without the embedding."""
    groups = memory.parameter_groups(QWEN25)
    assert groups["token embedding"] == 151_936 * 896 and "position embedding" not in groups
    assert groups["MLP"] == 24 * 3 * 896 * 4864
    qkv = 16 + 2 * 1  # heads of width 64, of q, k and v
    assert groups["attention"] == 24 * (64 * qkv * 896 + 64 * qkv + 896 * 896)
    assert sum(groups.values()) == 494_032_768
    in_products = groups["MLP"] + groups["attention"] - 24 * 64 * qkv + groups["token embedding"]
    expected = 6 * in_products + 3 * 24 * 4 * 896 * 512.5
    assert flops.flops_per_token(QWEN25) == expected
    windowed = QWEN25.model_copy(update={"attention_window": 128})
    keys = (sum(range(1, 128)) + 128 * (1024 - 127)) / 1024
    assert flops.flops_per_token(windowed) == 6 * in_products + 3 * 24 * 4 * 896 * keys


@pytest.mark.parametrize("name", MODELS)
def test_flops_products(name: str) -> None:
    """The products that run are those that are counted."""
    shape = ModelConfig(**SMALL, **MODELS[name])
    model = CustomTransformer(shape, native, dtype=torch.float64, device=torch.device("cpu"))
    tokens = torch.randint(130, (2, 24))
    with Products() as products:
        model.forward_backward(tokens, tokens, torch.tensor(1.0, dtype=torch.float64))
    seen = sum(min(t + 1, shape.attention_window or 24) for t in range(24)) / 24
    attention = 3 * shape.n_blocks * 4 * shape.n_heads * shape.head_width * seen
    counted = flops.flops_per_token(shape, 24) - attention
    padding = 3 * 2 * (256 - 130) * shape.d_model  # products have the vocabulary's padded rows
    assert products.count == (counted + padding) * tokens.numel()


@pytest.mark.parametrize("recompute", ["none", "gelu", "block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_memory_buffers(name: str, recompute: str, dtype: torch.dtype) -> None:
    """The buffers and kept activations are those of the model."""
    shape = ModelConfig(**SMALL, **MODELS[name])
    config = configured(shape, recompute=recompute)
    model = CustomTransformer(
        shape, reference, dtype=dtype, device=torch.device("cpu"), recompute=recompute
    )
    predicted, held, angles = (
        memory.predict(config, dtype, "cpu"),
        model.parameters,
        model.network.angles,
    )
    assert predicted.weights == held.weights.nbytes + angles.cos.nbytes + angles.sin.nbytes
    assert predicted.masters == (0 if held.master is None else held.master.nbytes)
    assert predicted.gradients == held.gradients.nbytes
    assert predicted.moments == 2 * held.gradients.nbytes
    tokens = torch.randint(130, (5, 24))
    model._trunk_forward(tokens, torch.zeros(5, 24, dtype=torch.int32))
    kept = sum(storage_bytes(model._saved).values()) + tokens.nbytes  # the targets
    assert predicted.activations == pytest.approx(kept, rel=0.02)


class Results(ResultsOnly):
    """The further operations, as the fused kernels do them: a rotation in its own memory."""

    @staticmethod
    def embedding_forward(tokens: Tensor, token_table: Tensor, *_: Any) -> Tensor:
        return token_table.new_empty(*tokens.shape, token_table.shape[1])

    @staticmethod
    def rms_norm_forward(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x), torch.empty(x.shape[:-1].numel())

    @staticmethod
    def add_rms_norm_forward(branch: Tensor, residual: Tensor, *_: Any) -> tuple[Tensor, ...]:
        y, rstd = Results.rms_norm_forward(residual)
        return y, torch.empty_like(residual), rstd

    @staticmethod
    def rms_norm_backward(dy: Tensor, x: Tensor, *_: Any) -> Tensor:
        return torch.empty_like(x)

    @staticmethod
    def rotary_forward(qkv: Tensor, *_: Any) -> Tensor:
        return qkv

    rotary_backward = norm_rotary_backward = rotary_forward

    @staticmethod
    def norm_rotary_forward(qkv: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
        H, H_kv = inputs[5:7]
        return torch.empty_like(qkv), torch.empty(qkv.shape[:-1].numel(), H + H_kv)

    @staticmethod
    def attention_forward(
        qkv: Tensor, n_heads: int, _: Any, n_kv_heads: int
    ) -> tuple[Tensor, Tensor]:
        B, T, M = qkv.shape
        out = qkv.new_empty(B, T, M * n_heads // (n_heads + 2 * n_kv_heads))
        return out, torch.empty(2, B, n_heads, T)

    @staticmethod
    def swiglu_forward(h: Tensor) -> Tensor:
        return h.new_empty(*h.shape[:-1], h.shape[-1] // 2)

    @staticmethod
    def swiglu_backward(dy: Tensor, h: Tensor) -> Tensor:
        return torch.empty_like(h)


@pytest.mark.parametrize("recompute", ["none", "gelu", "block"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("inner", [1024, 256], ids=["MLP at the peak", "attention at the peak"])
def test_memory_peak(name: str, inner: int, recompute: str) -> None:
    """The predicted peak is that of the tensors alive."""
    sizes = {"d_model": 384, "d_ffn": inner, "max_seq_len": 256, "head_dim": 96}
    shape = ModelConfig(**{**SMALL, **MODELS[name], **sizes})
    config = configured(shape, recompute=recompute, batch_size=4, compile_step=False)
    model = CustomTransformer(
        shape, Results, dtype=torch.bfloat16, device=torch.device("cpu"), recompute=recompute
    )
    tokens = torch.zeros(4, 256, dtype=torch.int64)
    peak = peak_on_cpu(
        [tokens, tokens.clone(), tokens.int()],
        lambda: model.forward_backward(tokens, tokens, torch.ones(()), tokens.int()),
    )
    predicted = memory.predict(config, torch.bfloat16, "cuda")
    work = max(predicted.backward_workspace, predicted.loss_workspace)
    assert peak == pytest.approx(predicted.activations + work, rel=0.01)


def test_memory_samples_cache() -> None:
    """With a key head in four the keys and values of a sample take a quarter."""
    bytes_of = {}
    for heads in (4, 1):
        shape = ModelConfig(**SMALL, **{**LLAMA, "n_kv_heads": heads})
        config = configured(shape, batch_size=64)
        device = torch.device("cpu")
        bytes_of[heads] = memory.predict_evaluation(config, torch.float32, device, 1, 64)
        model = CustomTransformer(shape, reference, dtype=torch.float32, device=device)
        cache = model.new_cache(64, 24)
        assert sum(x.nbytes for layer in cache for x in layer) == 2 * 3 * heads * 8 * 4 * 64 * 24
    difference = bytes_of[4] - bytes_of[1]
    kept = 64 * 24 * 3 * 8 * 2 * 4  # and a block's packed projection is narrower
    assert difference >= 2 * 3 * 3 * 8 * 4 * 64 * 24 + kept
