"""No sequences, or sequences of no positions: every operation of every backend does the same."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor, ones

from mantrans import CustomTransformerWrapper
from mantrans.kernels import native, reference, triton

C, H, D, F, V = 8, 2, 4, 16, 11
SCALE = torch.tensor(1.0)


def embedding(ops: ModuleType, B: int, T: int) -> list[Tensor]:
    tokens, tables = torch.zeros(B, T, dtype=torch.int64), [ones(V, C), ones(6, C)]
    x = ops.embedding_forward(tokens, *tables)
    ops.embedding_backward(x, tokens, *tables)
    alone = ops.embedding_forward(tokens, tables[0])
    ops.embedding_backward(alone, tokens, tables[0])
    return [x, alone, *tables]


def linear(ops: ModuleType, B: int, T: int) -> list[Tensor]:
    x, dweight, dbias, overwritten = ones(B, T, C), ones(F, C), ones(F), ones(F, C)
    y = ops.linear_forward(x, ones(F, C), ones(F))
    dx = ops.linear_backward(y, x, ones(F, C), dweight, dbias)
    ops.linear_backward(y, x, ones(F, C), overwritten, accumulate=False)
    return [y, dx, dweight, dbias, overwritten]


def layer_norm(ops: ModuleType, B: int, T: int) -> list[Tensor]:
    x, vectors = ones(B, T, C), list(ones(3, C))
    y, mean, rstd = ops.layer_norm_forward(x, ones(C), ones(C), 1e-5)
    added = ops.add_layer_norm_forward(x, x, ones(C), None, 1e-5)
    dweight, dbias, dbranch_bias = vectors
    dx = ops.layer_norm_backward(y, x, ones(C), mean, rstd, dweight, dbias, x, dbranch_bias)
    return [y, mean, rstd, *added, dx, *vectors]


def rms_norm(ops: ModuleType, B: int, T: int) -> list[Tensor]:
    x, (dweight, dbranch_bias) = ones(B, T, C), ones(2, C)
    y, rstd = ops.rms_norm_forward(x, ones(C), 1e-5)
    added = ops.add_rms_norm_forward(x, x, ones(C), 1e-5)
    dx = ops.rms_norm_backward(y, x, ones(C), rstd, dweight, x, dbranch_bias)
    return [y, rstd, *added, dx, dweight, dbranch_bias]


def attention(ops: ModuleType, B: int, T: int) -> list[Tensor]:
    qkv, results = ones(B, T, 3 * H * D), []
    for start in (None, torch.zeros(B, T, dtype=torch.int32)):
        out, statistics = ops.attention_forward(qkv, H, start)
        results += [out, ops.attention_backward(out, qkv, out, statistics, H, start)]
    return results


def decoding(ops: ModuleType, B: int, T: int) -> list[Tensor]:
    cache = ones(0, 3, H * D)
    return [ops.decode_attention(ones(0, H * D), cache, cache, ones(0).long(), H)]


def gelu(ops: ModuleType, B: int, T: int) -> list[Tensor]:
    h, dbias = ones(B, T, F), ones(F)
    y = ops.bias_gelu_forward(h, ones(F))
    return [y, ops.bias_gelu_backward(y, h, ones(F), dbias), dbias]


def swiglu(ops: ModuleType, B: int, T: int) -> list[Tensor]:
    h = ones(B, T, 2 * F)
    y = ops.swiglu_forward(h)
    return [y, ops.swiglu_backward(y, h)]


def loss(ops: ModuleType, B: int, T: int) -> list[Tensor]:
    z, targets, x = ones(B * T, V), torch.zeros(B * T, dtype=torch.int64), ones(B * T, C)
    losses, kept = ops.cross_entropy_forward(z, targets, V)
    results = [losses, ops.cross_entropy_backward(z, targets, kept, SCALE, V)]
    results.append(ops.cross_entropy_forward_backward(z, targets, SCALE, V))
    results.append(ops.linear_cross_entropy_forward(x, ones(V, C), targets, V))
    for accumulate in (True, False):
        dweight = ones(V, C)
        both = ops.linear_cross_entropy_forward_backward(
            x, ones(V, C), targets, SCALE, dweight, V, accumulate
        )
        results += [*both, dweight]
    return results


def starts_and_norm(ops: ModuleType, B: int, T: int) -> list[Tensor]:
    starts = ops.document_starts(torch.zeros(B, T, dtype=torch.int64), 0)
    return [starts] if B or T else [starts, ops.gradient_norms(torch.zeros(0), 1)[0].double()]


@pytest.mark.parametrize(("B", "T"), [(0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize(
    "program",
    [
        embedding,
        linear,
        layer_norm,
        rms_norm,
        attention,
        decoding,
        gelu,
        swiglu,
        loss,
        starts_and_norm,
    ],
)
def test_operations_no_rows(program, B: int, T: int) -> None:
    expected = program(reference, B, T)
    assert all(x.numel() == 0 or x.unique().tolist() in ([0], [1]) for x in expected)
    for ops in (native, triton):
        for got, want in zip(program(ops, B, T), expected, strict=True):
            assert got.shape == want.shape
            assert torch.equal(got.double(), want.double())


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
@pytest.mark.parametrize(("B", "T"), [(0, 5), (3, 0)])
def test_wrapper_no_tokens(backend: str, B: int, T: int) -> None:
    """They are refused."""
    model = CustomTransformerWrapper(
        V, C, n_blocks=1, n_heads=H, max_seq_len=6, dtype=torch.float32, device="cpu",
        backend=backend,
    )  # fmt: skip
    tokens = torch.zeros(B, T, dtype=torch.int64)
    for call in (model.forward, model.generate, lambda x: model.train_step(x, x)):
        with pytest.raises(ValueError, match=r"^input_ids: expected .*at least one") as refused:
            call(tokens)
        assert "\n" not in str(refused.value)
