"""The self-check passes a right backend, and names the operation of a wrong one.

Runs on a CPU: what is checked is `native`, whole, and `native` with one operation replaced by one
that is wrong in the way that kernels go wrong.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from mantrans.kernels import native, reference, selfcheck
from mantrans.kernels.selfcheck import (
    KernelCheckError,
    check,
    poisoned_memory,
    relative_error,
)

RUN: dict[str, Any] = {
    "d_model": 48,
    "n_heads": 3,
    "d_ffn": 80,
    "vocab_size": 200,
    "sequence_length": 37,
    "dtype": torch.float32,
    "device": torch.device("cpu"),
}


def backend(**replaced: Callable[..., Any]) -> types.SimpleNamespace:
    """`native` with some operations replaced."""
    return types.SimpleNamespace(**{**vars(native), **replaced})


def test_selfcheck_right_backend() -> None:
    results = check(native, **RUN)
    checked = {result.operation for result in results}
    operations = {
        name
        for name, value in vars(native).items()
        if isinstance(value, types.FunctionType)
        and hasattr(reference, name)
        and name.endswith(
            (
                "forward", "backward", "update", "norms", "gradient", "attention", "partials",
                "momentum", "orthogonalize",
            )
        )
    }  # fmt: skip
    assert checked == operations, "every operation of a backend must be checked"
    assert all(result.error <= result.bound for result in results)


def test_selfcheck_fewer_key_heads() -> None:
    """A right backend passes with fewer key heads."""
    widths = {result.output: result.shape[-2:] for result in check(native, **RUN, n_kv_heads=1)}
    assert widths["dqkv"] == (5, 16)  # three heads of queries, one of keys, one of values
    off_by_one = backend(attention_forward=attention_with_another_order_of_heads)
    check(off_by_one, **RUN)
    with pytest.raises(KernelCheckError, match="attention_forward is wrong"):
        check(off_by_one, **{**RUN, "d_model": 64, "n_heads": 4, "n_kv_heads": 2})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_selfcheck_other_dtypes(dtype: torch.dtype) -> None:
    # the reference rounds once per operation, so it is right in any dtype
    """Their roundings pass."""
    assert check(reference, **{**RUN, "dtype": dtype})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("vocab_size", "sequence_length"), [(5003, 1), (128, 300), (1, 5)])
def test_selfcheck_other_shapes(dtype: torch.dtype, vocab_size: int, sequence_length: int) -> None:
    run = {"vocab_size": vocab_size, "sequence_length": sequence_length, "dtype": dtype}
    assert check(reference, **{**RUN, **run})


# ----------------------------------------------------------------------------- wrong on purpose


def attention_that_sees_one_key_more(qkv, n_heads, starts, n_kv_heads):
    T = qkv.shape[1]
    q, k, v = reference.split_heads(qkv, n_heads, n_kv_heads)
    hidden = ~torch.ones(T, T, dtype=torch.bool).tril(1)
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf)
    return reference.merge_heads(torch.softmax(scores, -1) @ v), torch.logsumexp(scores, -1)


def attention_without_documents(qkv, n_heads, starts, n_kv_heads):
    return native.attention_forward(qkv, n_heads, None, n_kv_heads)


def attention_with_a_block_off(dout, qkv, out, statistics, n_heads, starts, n_kv_heads):
    """Wrong in the last rows of dk only: what an off-by-one at the end of a sequence does."""
    dqkv = native.attention_backward(dout, qkv, out, statistics, n_heads, starts, n_kv_heads)
    C = qkv.shape[-1] // 3
    dqkv[:, -1, C : 2 * C] = 0
    return dqkv


def attention_with_another_order_of_heads(qkv, n_heads, starts, n_kv_heads):
    """Query head h reads key head h mod H_kv: the right one only if there are as many."""
    heads = qkv.unflatten(-1, (n_heads + 2 * n_kv_heads, -1))
    q, k, v = heads.split((n_heads, n_kv_heads, n_kv_heads), dim=-2)
    repeated = (x.repeat(1, 1, n_heads // n_kv_heads, 1) for x in (k, v))
    return native.attention_forward(torch.cat([q, *repeated], -2).flatten(2), n_heads, starts)


def gelu_that_forgets_a_row(h: Tensor, bias: Tensor | None = None) -> Tensor:
    y = torch.empty_like(h)
    y[:-1] = native.bias_gelu_forward(h[:-1], bias)
    return y


def layer_norm_backward_without_residual(*arguments: Any) -> Tensor:
    return native.layer_norm_backward(*arguments[:-2], None, arguments[-1])


def overwriting_bias_gradient(dy: Tensor, dbias: Tensor) -> None:
    dbias.copy_(dy.sum(0))


def loss_that_leaves_the_padding(logits, targets, scale, vocab_size, ignore_index=-100):
    padding = logits[:, vocab_size:].clone()
    losses = native.cross_entropy_forward_backward(logits, targets, scale, vocab_size)
    logits[:, vocab_size:] = padding
    return losses


def adamw_that_never_skips(*arguments: Any) -> None:
    arguments = list(arguments)
    arguments[8] = torch.tensor(True)
    native.adamw_update(*arguments)


def sgd_that_decays_too_much(*arguments: Any) -> None:
    arguments = list(arguments)
    arguments[-1] *= 2
    native.sgd_update(*arguments)


def adamw_that_rounds_to_nearest(*arguments: Any, **rounding: Any) -> None:
    reference.adamw_update(*arguments)


def sgd_with_other_noise(*arguments: Any, offset: int = 0, **rounding: Any) -> None:
    native.sgd_update(*arguments, **rounding)


def momentum_that_never_skips(m, gradients, clip, finite, beta, update) -> None:
    native.nesterov_momentum(m, gradients, clip, torch.tensor(True), beta, update)


def momentum_without_a_look_ahead(m, gradients, clip, finite, beta, update) -> None:
    native.nesterov_momentum(m, gradients, clip, finite, beta, update)
    update.copy_(m)


def orthogonalize_four_times(matrices: Tensor, scale: float) -> None:
    with mock.patch.object(reference, "NEWTON_SCHULZ_STEPS", 4):
        native.orthogonalize(matrices, scale)


def decoding_that_reads_too_far(q, k_cache, v_cache, lengths, *heads, window=None):
    too_far = (lengths + 1).clamp(max=k_cache.shape[1])
    return native.decode_attention(q, k_cache, v_cache, too_far, *heads, window)


def decoding_without_window(*arguments: Any, window: int | None = None) -> Tensor:
    return native.decode_attention(*arguments)


def rotary_backward_that_turns_on(*arguments: Any) -> Tensor:
    return native.rotary_forward(*arguments)


def norm_rotary_with_one_gain(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, *rest: Any) -> Any:
    return native.norm_rotary_forward(qkv, q_weight, q_weight, *rest)


def linear_in_tf32(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    x, weight = ((t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (x, weight))
    return native.linear_forward(x, weight, bias)


@pytest.mark.parametrize(
    ("operation", "wrong", "output"),
    [
        ("attention_forward", attention_that_sees_one_key_more, "out (2, 37, 48)"),
        ("attention_forward", attention_without_documents, "out with documents"),
        ("attention_backward", attention_with_a_block_off, "dqkv (2, 37, 9, 16)"),
        ("bias_gelu_forward", gelu_that_forgets_a_row, "never written"),
        ("layer_norm_backward", layer_norm_backward_without_residual, "dresidual"),
        ("bias_gradient", overwriting_bias_gradient, "dbias (80,)"),
        ("cross_entropy_forward_backward", loss_that_leaves_the_padding, "dlogits"),
        ("adamw_update", adamw_that_never_skips, "finite=False"),
        ("sgd_update", sgd_that_decays_too_much, "finite=True"),
        ("adamw_update", adamw_that_rounds_to_nearest, "rounded as the reference"),
        ("sgd_update", sgd_with_other_noise, "rounded as the reference"),
        ("nesterov_momentum", momentum_that_never_skips, "finite=False"),
        ("nesterov_momentum", momentum_without_a_look_ahead, "update"),
        ("orthogonalize", orthogonalize_four_times, "matrices (2, 80, 48)"),
        ("decode_attention", decoding_that_reads_too_far, "never written"),
        ("decode_attention", decoding_without_window, "out with a window"),
        ("linear_forward", linear_in_tf32, "y"),
        ("rotary_backward", rotary_backward_that_turns_on, "dqkv"),
        ("norm_rotary_forward", norm_rotary_with_one_gain, "rotated"),
    ],
)
def test_selfcheck_wrong_operation(operation: str, wrong: Callable[..., Any], output: str) -> None:
    with pytest.raises(KernelCheckError) as caught:
        check(backend(**{operation: wrong}), **RUN)
    message = str(caught.value)
    assert message.startswith(f"{operation} is wrong on cpu in float32: ")
    assert output in message and "\n" not in message


def test_selfcheck_raising_operation() -> None:
    """An operation that raises is named."""

    def out_of_resources(*arguments: Any) -> None:
        raise RuntimeError("out of resource: shared memory\nRequired: 300000")

    with pytest.raises(KernelCheckError) as caught:
        check(backend(attention_backward=out_of_resources), **RUN)
    assert str(caught.value) == "attention_backward does not run: out of resource: shared memory"


def test_selfcheck_out_of_memory() -> None:
    """It is no fault of the kernel, and is said as what it is."""

    def out_of_memory(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(torch.OutOfMemoryError):
        check(backend(attention_backward=out_of_memory), **RUN)


def test_selfcheck_wrong_partial_sums() -> None:
    """`native` adds a whole sum to each row, so three rows have three times too much."""
    with pytest.raises(KernelCheckError, match=r"linear_backward .*dbias by partial sums \(80,\)"):
        check(backend(partial_rows=lambda device: 3), **RUN)


# ------------------------------------------------------------------------------------ its parts


def test_selfcheck_long_runs() -> None:
    """They are cut to what takes seconds."""
    shapes = selfcheck.run_shapes(2048, 16, 8192, 50_257, 32_768)
    assert (shapes.C, shapes.H, shapes.D, shapes.F) == (2048, 16, 128, 8192)
    assert shapes.B * shapes.H * shapes.T**2 <= selfcheck.MAX_SCORES
    assert shapes.N * shapes.V <= selfcheck.MAX_LOGITS
    assert shapes.Vp % 128 == 0 and shapes.Vp >= shapes.V
    assert selfcheck.run_shapes(768, 12, 3072, 50_257, 512).T == 512
    qwen3 = selfcheck.run_shapes(1024, 16, 3072, 151_936, 1024, n_kv_heads=8, head_dim=128)
    assert (qwen3.H, qwen3.H_kv, qwen3.D) == (16, 8, 128)


def test_selfcheck_error() -> None:
    exact = torch.ones(100, 10)
    assert relative_error(exact, exact) == 0
    assert relative_error(exact * 1.01, exact) == pytest.approx(0.01)
    one_row = exact.clone()
    one_row[7] = 1.8
    assert relative_error(one_row, exact) == pytest.approx(0.8 / selfcheck.WORST_ROW)
    hole = exact.clone()
    hole[3, 3] = torch.nan
    assert not relative_error(hole, exact) <= 1e9
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0
    assert relative_error(torch.full((3,), 1e-30), torch.zeros(3)) > 1


def test_poison_end() -> None:
    """Poisoning ends with its block."""
    before = torch.are_deterministic_algorithms_enabled()
    with poisoned_memory():
        assert torch.empty(5).isnan().all() and torch.zeros(2).new_empty(5).isnan().all()
        assert torch.empty_like(torch.zeros(4, dtype=torch.bfloat16)).isnan().all()
    assert torch.are_deterministic_algorithms_enabled() == before
