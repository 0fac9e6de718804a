"""Attention with scores of any size, any start that does not fall, and heads of any width."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from torch import Tensor

from mantrans.kernels import reference, triton
from mantrans.kernels.triton import attention_tiles
from tests.kernels.common import each_backend, generator
from tests.support.compare import assert_close

# Two roundings of 16 bits, in which probabilities enter products too; else a few of float32 sums
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-3}
WIDTHS = [1, 40, 96, 256, *(pytest.param(D, marks=pytest.mark.slow) for D in (64, 80, 128, 160))]
SCORES = [1e3, 9.5e6, -1e32, 1e32]


def with_scores(scores: Tensor, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """qkv (1, T, 3D) in which all queries give key j the score scores[j] to a few digits; random
    values, and dout. No product has more than one term, so that none depends on an order."""
    T = len(scores)
    source = generator(T, D)
    q, k = torch.zeros(2, T, D, dtype=torch.float64)
    size = scores.abs().max().sqrt() * D**0.25
    q[:, D // 2], k[:, D // 2] = size, scores / size * math.sqrt(D)
    v, dout = torch.randn(2, T, D, generator=source).double()
    qkv = torch.cat([q, k, v], -1)[None].to(dtype)
    return qkv, v.to(dtype), dout[None].to(dtype)


def run(
    ops: ModuleType, qkv: Tensor, dout: Tensor, H: int = 1, *rest: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, and dq, dk and dv of H heads each."""
    out, statistics = ops.attention_forward(qkv, H, *rest)
    dqkv = ops.attention_backward(dout, qkv, out, statistics, H, *rest)
    assert out.dtype == dqkv.dtype == qkv.dtype
    return out, *dqkv.chunk(3, -1)


def exact(qkv: Tensor, dout: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return run(reference, qkv.double(), dout.double(), *rest)


@each_backend
@pytest.mark.parametrize("D", WIDTHS)
def test_attention_one_key(ops: ModuleType, dtype: torch.dtype, D: int) -> None:
    """p = 1 whatever the score: out = v and dv = dout, to the last bit."""
    for score in SCORES:
        qkv, v, dout = with_scores(torch.tensor([score], dtype=torch.float64), D, dtype)
        out, dq, dk, dv = run(ops, qkv, dout)
        assert torch.equal(out[0], v), score
        assert torch.equal(dv, dout), score
        assert dq.isfinite().all() and dk.isfinite().all()


@each_backend
@pytest.mark.parametrize("D", [1, 96])
def test_attention_equal_scores(ops: ModuleType, dtype: torch.dtype, D: int) -> None:
    """Query i sees i + 1 keys of one score: both passes give each 1 / (i + 1)."""
    T = 5
    p = torch.ones(T, T, dtype=torch.float64).tril() / torch.arange(1, T + 1)[:, None]
    for score in SCORES:
        qkv, v, dout = with_scores(torch.full((T,), score, dtype=torch.float64), D, dtype)
        out, _, _, dv = run(ops, qkv, dout)
        assert_close(out[0], p @ v.double(), TOLERANCE[dtype], f"out, {score}")
        assert_close(dv[0], p.T @ dout[0].double(), TOLERANCE[dtype], f"dv, {score}")


@each_backend
@pytest.mark.parametrize("largest", [3e2, -1e32, 1e32])
def test_attention_one_large_score(ops: ModuleType, dtype: torch.dtype, largest: float) -> None:
    """Key 1 wins wherever it is seen; what is masked, in whole blocks too, counts for nothing."""
    T, D = 100, 16
    scores = torch.full((T,), largest - abs(largest) / 2, dtype=torch.float64)
    scores[[1, 75]] = largest
    qkv, v, dout = with_scores(scores, D, dtype)
    start = torch.zeros(1, T, dtype=torch.int32)
    start[:, 70:] = 70
    out, dq, dk, dv = run(ops, qkv, dout, 1, start)
    want = exact(qkv, dout, 1, start)
    assert_close(out, want[0], TOLERANCE[dtype], "out")
    assert_close(dv, want[3], TOLERANCE[dtype], "dv")
    assert dq.isfinite().all() and dk.isfinite().all()
    assert torch.equal(out[0, 1:70], v[1:2].expand(69, D))


@each_backend
@pytest.mark.parametrize("score", [9.5e6, -1e32, -1e38, 1e38])
def test_decode_attention_any_scores(ops: ModuleType, dtype: torch.dtype, score: float) -> None:
    """Keys of one score, in several shares, one of them empty: the mean of their values."""
    T, D, lengths = 600, 4, torch.tensor([1, 300, 600])
    q = torch.zeros(3, D, dtype=torch.float64)
    k, v = torch.zeros(3, T, D, dtype=torch.float64), torch.randn(3, T, D, generator=generator(T))
    size = math.sqrt(abs(score)) * D**0.25
    q[:, 2], k[:, :, 2] = size, score / size * math.sqrt(D)
    v = v.to(dtype)
    out = ops.decode_attention(q.to(dtype), k.to(dtype), v, lengths, 1)
    want = torch.stack([row[:n].double().mean(0) for row, n in zip(v, lengths, strict=True)])
    assert_close(out, want, TOLERANCE[dtype])


# -------------------------------------------------------------------------------------- starts


def window(T: int, W: int) -> Tensor:
    return torch.arange(T) - W + 1


def any_starts(T: int) -> Tensor:
    """Starts that rise now and then, by any step, never above the position."""
    steps = torch.randint(0, 9, (T,), generator=generator(T)) ** 2 % 11
    return torch.minimum(steps.cumsum(0) - steps[0], torch.arange(T))


SLOW_STARTS = ("window-63", "any")
STARTS = {
    "window-1": window(70, 1),  # every document is one position
    "window-4": window(33, 4),
    "window-63": window(140, 63),
    "window-65": window(140, 65),
    "any": any_starts(140),
    "window-in-documents": torch.maximum(window(100, 20), torch.arange(100) // 50 * 50),
}


@each_backend
@pytest.mark.parametrize(
    "start",
    [
        pytest.param(start, id=name, marks=[pytest.mark.slow] if name in SLOW_STARTS else [])
        for name, start in STARTS.items()
    ],
)
def test_attention_any_document_start(ops: ModuleType, dtype: torch.dtype, start: Tensor) -> None:
    """Below 0 means 0. On both ways through the kernels, of which float32, in smaller tiles, has
    one."""
    if dtype == torch.float32 and ops is triton:
        start = start[:70]
    T, H, D = len(start), 1, 16
    source = generator(T, int(start.sum()))
    qkv, dout = (torch.randn(2, T, n * H * D, generator=source).to(dtype) for n in (3, 1))
    other = torch.zeros_like(start)  # the second sequence has one document
    starts = torch.stack([start, other]).int()
    want = exact(qkv, dout, H, starts.clamp(min=0))
    for architecture in (90, 80) if ops is triton and dtype == torch.bfloat16 else (None,):
        with pytest.MonkeyPatch.context() as patched:
            if architecture:
                patched.setattr(attention_tiles, "architecture", lambda _, a=architecture: a)
            got = run(ops, qkv, dout, H, starts)
        for name, ours, wanted in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
            if wanted.norm() < 1e-9:  # one key has no gradient; left is the rounding of out
                assert ours.double().norm() <= TOLERANCE[dtype] * want[0].norm(), name
            else:
                assert_close(ours, wanted, TOLERANCE[dtype], name)


def test_attention_window_grouped_heads() -> None:
    T = 40
    source = generator(T)
    H, H_kv, D = 4, 2, 16
    qkv = torch.randn(1, T, (H + 2 * H_kv) * D, generator=source)
    dout = torch.randn(1, T, H * D, generator=source)
    start = window(T, 21).clamp(min=0)[None].int()
    got, want = (
        ops.attention_backward(
            dout.to(dtype), qkv.to(dtype), *ops.attention_forward(qkv.to(dtype), H, start, H_kv),
            H, start, H_kv,
        )
        for ops, dtype in ((triton, torch.float32), (reference, torch.float64))
    )  # fmt: skip
    assert_close(got, want, 1e-6)


# -------------------------------------------------------------------- held before, and to stay so


@each_backend
@pytest.mark.parametrize("D", WIDTHS)
def test_attention_head_widths(ops: ModuleType, dtype: torch.dtype, D: int) -> None:
    T, H = 9, 2
    source = generator(D)
    qkv, dout = (torch.randn(1, T, n * H * D, generator=source).to(dtype) for n in (3, 1))
    for name, got, want in zip(
        ("out", "dq", "dk", "dv"), run(ops, qkv, dout, H), exact(qkv, dout, H), strict=True
    ):
        assert_close(got, want, TOLERANCE[dtype], name)


@each_backend
def test_attention_sliced_and_transposed(ops: ModuleType, dtype: torch.dtype) -> None:
    """Read right, or, where the last axis is not dense, refused."""
    T, H, D = 10, 2, 16
    wide = torch.randn(2, 2 * T, 6 * H * D, generator=generator(D)).to(dtype)
    dout = torch.randn(2, T, H * D, generator=generator(T)).to(dtype)
    dense = [wide[:, ::2, : 3 * H * D], wide[:, T:, 3 * H * D :], wide[:1, :T, 16:][..., :96]]
    dense.append(wide[:, :T, : 3 * H * D].transpose(0, 1).contiguous().transpose(0, 1))
    for qkv in dense:
        got = run(ops, qkv, dout[: len(qkv)], H)
        want = run(ops, qkv.contiguous(), dout[: len(qkv)], H)
        assert all(map(torch.equal, got, want))
    for qkv in (wide[:, :T, ::2], wide[:, :T, : 3 * H * D].mT.contiguous().mT):
        if ops is triton:
            with pytest.raises(ValueError, match="qkv: expected a last stride of 1"):
                run(ops, qkv, dout, H)
            continue
        for got, want in zip(
            run(ops, qkv, dout, H), run(ops, qkv.contiguous(), dout, H), strict=True
        ):
            assert_close(got, want, TOLERANCE[dtype])


@each_backend
@pytest.mark.parametrize("T", [0, 1, 17])
@pytest.mark.parametrize("H_kv", [1, 2])
def test_attention_empty_statistics(ops: ModuleType, dtype: torch.dtype, T: int, H_kv: int) -> None:
    """What is promised before a forward is what it gives."""
    qkv = torch.ones(2, T, (4 + 2 * H_kv) * 16, dtype=dtype)
    _, given = ops.attention_forward(qkv, 4, None, H_kv)
    promised = ops.empty_statistics(qkv, 4, H_kv)
    assert (promised.shape, promised.dtype) == (given.shape, given.dtype)
    if ops is triton:
        assert promised.stride() == given.stride()
