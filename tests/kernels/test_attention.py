"""Attention and decode attention, interpreted, against `mantrans.kernels.reference` in float64.

Tolerances are relative root-mean-square errors, `n` roundings deep:
  * float32: each sum has up to a few hundred terms of relative error 2^-24 = 6e-8, which average
    out to under 1e-6; measured 2e-7 to 4e-7.
  * float16, bfloat16: results are rounded once (a uniform error of half a unit is 2^-p/√3 · ½ rms
    of the value's power of two: 0.17% for bfloat16's p = 8, 0.02% for float16's p = 11), and
    p and ds are rounded once more before their products; measured up to 0.28% and 0.035%.
    A missing scale, mask or row shows as 10% and more.
The interpreter takes Hopper's way through the kernels (tiles by descriptors); `other_ways` sends
the same shapes through plain pointers and the smaller tiles of older GPUs too.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mantrans.kernels import native, reference, triton
from mantrans.kernels.triton import attention_tiles
from mantrans.kernels.triton.attention import attention_backward, attention_forward
from mantrans.kernels.triton.decode_attention import decode_attention
from tests.support.compare import assert_close

TOLERANCE = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
DTYPES = list(TOLERANCE)
LN_2 = math.log(2)


def ids(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


@pytest.fixture(params=[90, 80], ids=["descriptors", "pointers"])
def other_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs a test once as on Hopper and once as on older GPUs."""
    monkeypatch.setattr(attention_tiles, "architecture", lambda device: request.param)
    return request.param


def in_each_dtype(*shapes: tuple[int, ...]) -> list[Any]:
    """Shapes (B, T, ...) in each dtype. Slow: more than a block in float32, whose tiles are many,
    and more than one position in float16, which goes bfloat16's way."""
    longest = {torch.float32: 65, torch.float16: 1, torch.bfloat16: 10**6}
    return [
        pytest.param(*shape, dtype, marks=[pytest.mark.slow] if shape[1] > most else [])
        for shape in shapes
        for dtype, most in longest.items()
    ]


def documents(B: int, T: int, *beginnings: int) -> Tensor:
    """document_start (B, T) for documents that begin at 0 and at `beginnings`, shifted by one in
    every further sequence so that no two are alike."""
    starts = torch.zeros(B, T, dtype=torch.int32)
    for b in range(B):
        for beginning in beginnings:
            if beginning + b < T:
                starts[b, beginning + b :] = beginning + b
    return starts


def log_sum_exp(statistics: Tensor, D: int) -> Tensor:
    """log Σ_j exp(score_ij) from what the kernel keeps: the largest q · k, and a log2 of a sum."""
    largest, log2_sum = statistics
    return largest * D**-0.5 + log2_sum * LN_2


def check(
    B: int,
    T: int,
    H: int,
    D: int,
    dtype: torch.dtype,
    starts: Tensor | None = None,
    H_kv: int | None = None,
) -> None:
    """Forward, backward and statistics of random inputs agree with the reference."""
    generator = torch.Generator().manual_seed(T * D + H)
    widths = (H * D, (H_kv or H) * D, (H_kv or H) * D)
    qkv = torch.randn(B, T, sum(widths), generator=generator).to(dtype)
    dout = torch.randn(B, T, H * D, generator=generator).to(dtype)
    heads = (H, starts, H_kv)
    want_out, exact = reference.attention_forward(qkv.double(), *heads)
    want = reference.attention_backward(dout.double(), qkv.double(), want_out, exact, *heads)

    out, statistics = attention_forward(qkv, *heads)
    dqkv = attention_backward(dout, qkv, out, statistics, *heads)

    tolerance = TOLERANCE[dtype]
    assert out.dtype == dqkv.dtype == dtype and statistics.shape == (2, B, H, T)
    assert_close(out, want_out, tolerance, "out")
    # |lse| is a few units and float32 throughout, whatever the inputs' dtype
    assert_close(log_sum_exp(statistics, D), exact.sum(0), 1e-6, "lse")
    for name, got, wanted in zip(
        ("dq", "dk", "dv"), dqkv.split(widths, -1), want.split(widths, -1), strict=True
    ):
        if wanted.abs().max() < 1e-12:  # softmax of a single score has no gradient
            # left is the rounding of do·v - do·o, of the size of one rounding of out
            assert got.abs().max() <= 4 * tolerance, name
        else:
            assert_close(got, wanted, tolerance, name)


# ------------------------------------------------------------------------- forward and backward


@pytest.mark.parametrize(
    ("B", "T", "H", "D", "dtype"),
    in_each_dtype(
        (2, 1, 2, 16),  # one position: one key, one row of every tile
        (1, 33, 3, 24),  # odd T; D between powers of two
        (2, 127, 1, 40),  # one under a block; one head
        (1, 128, 2, 64),  # exactly a block
        (1, 129, 1, 80),  # one over a block
        (1, 65, 1, 100),  # D without 16-byte rows in 16-bit dtypes: pointers even on Hopper
        (1, 270, 1, 16),  # several blocks: the unmasked loops
        (1, 70, 1, 256),  # the widest head
    ),
    ids=ids,
)
def test_attention_equals_reference(
    B: int, T: int, H: int, D: int, dtype: torch.dtype, other_ways: int
) -> None:
    check(B, T, H, D, dtype)


@pytest.mark.parametrize(
    ("B", "T", "H", "H_kv", "D", "dtype"),
    in_each_dtype(
        (2, 1, 2, 1, 16),  # one position
        (1, 33, 6, 2, 24),  # groups of three, odd T, D between powers of two
        (2, 70, 4, 2, 40),  # several blocks of both, several sequences
    ),
    ids=ids,
)
@pytest.mark.parametrize(
    "beginnings",
    [
        pytest.param((1, 30, 63, 65), id="documents"),
        pytest.param(None, id="plain", marks=pytest.mark.slow),
    ],
)
def test_attention_groups(
    B: int,
    T: int,
    H: int,
    H_kv: int,
    D: int,
    beginnings: tuple[int, ...] | None,
    dtype: torch.dtype,
    other_ways: int,
) -> None:
    check(B, T, H, D, dtype, beginnings and documents(B, T, *beginnings), H_kv)


@pytest.mark.parametrize("D", [5, 20, 96, 192])
def test_attention_head_widths(D: int, other_ways: int) -> None:
    check(1, 40, 2, D, torch.bfloat16)


@pytest.mark.parametrize(("B", "T", "dtype"), in_each_dtype((1, 270)), ids=ids)
@pytest.mark.parametrize(
    "beginnings",
    [
        (64, 128, 256),  # on edges of blocks of queries and of keys
        (1, 63, 65, 129, 255, 269),  # beside them; documents of one and two positions
        (150,),  # inside a block; whole blocks before it are skipped
        tuple(range(1, 270)),  # every position a document of its own
    ],
    ids=["on-edges", "beside-edges", "inside", "single-positions"],
)
def test_attention_documents(
    B: int, T: int, beginnings: tuple[int, ...], dtype: torch.dtype, other_ways: int
) -> None:
    check(B, T, 1, 64, dtype, documents(B, T, *beginnings))


def test_attention_documents_differ_between_sequences(other_ways: int) -> None:
    check(2, 140, 2, 32, torch.bfloat16, documents(2, 140, 20, 127))


def test_attention_one_document(other_ways: int) -> None:
    """One document is plain causal attention."""
    qkv = torch.randn(1, 200, 3 * 32).bfloat16()
    plain, _ = attention_forward(qkv, 1)
    one_document, _ = attention_forward(qkv, 1, documents(1, 200))
    assert torch.equal(plain, one_document)


def test_attention_masked_blocks(other_ways: int) -> None:
    """NaN in an earlier document, a block away, must not even be multiplied by zero."""
    qkv = torch.randn(1, 384, 3 * 32).bfloat16()
    starts = documents(1, 384, 256)
    out, statistics = attention_forward(qkv, 1, starts)
    dout = torch.randn(1, 384, 32).bfloat16()
    dqkv = attention_backward(dout, qkv, out, statistics, 1, starts)

    qkv[:, :256] = float("nan")
    broken_out, broken_statistics = attention_forward(qkv, 1, starts)
    assert torch.equal(broken_out[:, 256:], out[:, 256:])
    broken = attention_backward(dout, qkv, broken_out, broken_statistics, 1, starts)
    assert torch.equal(broken[:, 256:], dqkv[:, 256:])


def test_attention_later_documents(other_ways: int) -> None:
    """Later documents do not reach the gradient of earlier keys."""
    qkv = torch.randn(1, 384, 3 * 32).bfloat16()
    starts = documents(1, 384, 128)
    out, statistics = attention_forward(qkv, 1, starts)
    dout = torch.randn(1, 384, 32).bfloat16()
    dqkv = attention_backward(dout, qkv, out, statistics, 1, starts)
    dout[:, 128:] = float("nan")
    broken = attention_backward(dout, qkv, out, statistics, 1, starts)
    assert torch.equal(broken[:, :128], dqkv[:, :128])


def test_attention_strided_qkv(other_ways: int) -> None:
    """Strided qkv is read in place."""
    B, T, H, D = 2, 50, 2, 32
    wide = torch.randn(B, 2 * T, 3 * H * D + 16).bfloat16()
    qkv = wide[:, ::2, : 3 * H * D]
    out, statistics = attention_forward(qkv, H)
    want, want_statistics = attention_forward(qkv.contiguous(), H)
    assert torch.equal(out, want) and torch.equal(statistics, want_statistics)
    dout = torch.randn(B, T, H * D).bfloat16()
    got = attention_backward(dout, qkv, out, statistics, H)
    assert torch.equal(got, attention_backward(dout, qkv.contiguous(), out, statistics, H))


def test_attention_pairs_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room in the cache for two of five pairs at a time, the last group is not full."""
    T, D = 150, 16
    monkeypatch.setattr(attention_tiles, "L2_BYTES", 2 * (2 * T * D * 2))
    check(1, T, 5, D, torch.bfloat16)
    check(1, T, 6, D, torch.bfloat16, H_kv=3)


def test_attention_large_scores() -> None:
    """Large scores do not overflow."""
    qkv = 30 * torch.randn(1, 100, 3 * 32)
    want, exact = reference.attention_forward(qkv.double(), 1)
    out, statistics = attention_forward(qkv, 1)
    # scores of ±5000 carry an absolute error of 5000 · 2^-24 = 3e-4, which exp makes relative
    assert_close(out, want, 1e-3, "out")
    assert_close(log_sum_exp(statistics, 32), exact.sum(0), 1e-6, "lse")


def test_attention_empty_batch() -> None:
    out, statistics = attention_forward(torch.randn(0, 8, 3 * 16), 1)
    assert out.shape == (0, 8, 16) and statistics.shape == (2, 0, 1, 8)
    empty = torch.randn(0, 8, 48)
    dqkv = attention_backward(torch.randn(0, 8, 16), empty, out, statistics, 1)
    assert dqkv.shape == (0, 8, 48)


# ---------------------------------------------------------------------------------------- decode


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize(
    ("lengths", "T", "H", "H_kv", "D"),
    [
        ([1, 2, 64], 64, 2, None, 64),  # one key; a block; a full cache
        ([63, 65, 300], 300, 1, None, 40),  # one under and over a block; shares of unequal length
        ([1, 1100, 513], 1100, 1, None, 24),  # empty shares beside full ones
        ([7], 9, 3, None, 100),
        ([17, 40], 40, 1, None, 256),
        ([17, 41], 41, 6, 2, 24),  # groups of three
    ],
)
def test_decode_attention_equals_reference(
    lengths: list[int], T: int, H: int, H_kv: int | None, D: int, dtype: torch.dtype
) -> None:
    B = len(lengths)
    generator = torch.Generator().manual_seed(T)
    q, k, v = (
        torch.randn(*shape, heads * D, generator=generator).to(dtype)
        for *shape, heads in ((B, H), (B, T, H_kv or H), (B, T, H_kv or H))
    )
    for b, length in enumerate(lengths):
        k[b, length:] = v[b, length:] = float("nan")  # never written by a generator
    counts = torch.tensor(lengths)
    want = reference.decode_attention(q.double(), k.double(), v.double(), counts, H, H_kv)
    assert_close(decode_attention(q, k, v, counts, H, H_kv), want, TOLERANCE[dtype])


def test_decode_attention_packed_projection() -> None:
    """Decode reads slices of a packed projection."""
    B, T, H, D = 2, 20, 2, 16
    packed = torch.randn(B, T, 3 * H * D)
    q, k, v = packed.split(H * D, dim=-1)
    lengths = torch.tensor([T, 5])
    got = decode_attention(q[:, -1], k, v, lengths, H)
    want = decode_attention(*(x.contiguous() for x in (q[:, -1], k, v)), lengths, H)
    assert torch.equal(got, want)


# ---------------------------------------------------------------------------------------- errors

QKV = torch.zeros(2, 8, 3 * 32)
STATISTICS = torch.zeros(2, 2, 8, 2).mT  # of the right shape


@pytest.mark.parametrize(
    ("qkv", "n_heads", "document_start", "message"),
    [
        (QKV.double(), 2, None, "qkv: expected dtype .*, got float64"),
        (QKV[0], 2, None, r"qkv: expected shape .*, got \(8, 96\)"),
        (
            torch.zeros(2, 8, 97),
            2,
            None,
            "q, k and v: expected a width of .* = 6·D together, got 97",
        ),
        (torch.zeros(2, 96, 8).mT, 2, None, r"qkv: expected .*last stride of 1, got strides"),
        (QKV, 5, None, "q, k and v: expected a width of .* = 15·D together, got 96"),
        (QKV, 0, None, "n_kv_heads: expected a divisor of n_heads = 0, got 0"),
        (torch.zeros(1, 2, 3 * 512), 1, None, "head width: expected 1 to 256, got .*512"),
        (QKV, 2, torch.zeros(2, 8), "document_start: expected dtype int32, got float32"),
        (QKV, 2, torch.zeros(2, 9, dtype=torch.int32), r"document_start: .* got \(2, 9\)"),
        (QKV, 2, torch.zeros(8, 2, dtype=torch.int32).T, "document_start: .* got strides"),
        (QKV.to("meta"), 2, QKV.int()[..., 0].contiguous(), "document_start: expected device meta"),
    ],
)
def test_attention_forward_refuses(
    qkv: Tensor, n_heads: int, document_start: Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        attention_forward(qkv, n_heads, document_start)


def test_attention_key_heads_not_dividing() -> None:
    """Key heads that do not divide the query heads are refused."""
    message = "n_kv_heads: expected a divisor of n_heads = 6, got 4"
    for ops in (triton, triton.attention):
        with pytest.raises(ValueError, match=f"^{message}$"):
            ops.attention_forward(torch.zeros(2, 8, 14 * 16), 6, None, 4)
    with pytest.raises(ValueError, match=f"^{message}$"):
        cache = torch.zeros(2, 8, 64)
        decode_attention(torch.zeros(2, 96), cache, cache, torch.ones(2).long(), 6, 4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dout": torch.zeros(2, 8, 33)}, r"dout: expected shape .*, got \(2, 8, 33\)"),
        ({"dout": torch.zeros(2, 8, 32).half()}, "dout: expected dtype float32.*, got float16"),
        ({"dout": torch.zeros(2, 32, 8).mT}, "dout: expected .*, got strides"),
        ({"out": torch.zeros(2, 8, 32).double()}, "out: expected dtype .*, got float64"),
        ({"statistics": torch.zeros(2, 8)}, r"statistics: expected shape .*, got \(2, 8\)"),
        ({"statistics": STATISTICS.double()}, "statistics: expected dtype .*, got float64"),
        ({"statistics": STATISTICS}, "statistics: .* strides .*, as attention_forward"),
        ({"n_heads": 5}, "q, k and v: expected a width of .* = 15·D together, got 96"),
        ({"n_kv_heads": 1}, r"dout: expected shape \(2, 8, 48\), got \(2, 8, 32\)"),
    ],
)
def test_attention_backward_refuses(changed: dict[str, object], message: str) -> None:
    out, statistics = attention_forward(QKV, 2)
    arguments = {
        "dout": out,
        "qkv": QKV,
        "out": out,
        "statistics": statistics,
        "n_heads": 2,
        **changed,
    }
    with pytest.raises(ValueError, match=message):
        attention_backward(**arguments)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": torch.zeros(2, 1, 32)}, r"q: expected shape .*, got \(2, 1, 32\)"),
        ({"q": torch.zeros(32, 2).T}, "q: expected .*, got strides"),
        ({"k_cache": torch.zeros(2, 8, 16)}, "q, k and v: expected a width of .* = 6·D .* got 64"),
        ({"k_cache": torch.zeros(2, 8, 17)}, r"k_cache: expected .*\(2, 8, 32\), got \(2, 8, 17\)"),
        ({"k_cache": torch.zeros(3, 8, 32)}, r"k_cache: expected .*\(2, .*\), got \(3, 8, 32\)"),
        ({"v_cache": torch.zeros(2, 9, 32)}, r"v_cache: expected shape .*, got \(2, 9, 32\)"),
        ({"v_cache": torch.zeros(2, 8, 32).half()}, "v_cache: expected dtype .*, got float16"),
        ({"lengths": torch.ones(2).int()}, "lengths: expected dtype int64, got int32"),
        ({"lengths": torch.ones(3).long()}, r"lengths: expected shape .*, got \(3,\)"),
        ({"n_heads": 7}, "q, k and v: expected a width of .* = 21·D together, got 96"),
        ({"n_kv_heads": 1}, r"k_cache: expected .*\(2, 8, 16\), got \(2, 8, 32\)"),
    ],
)
def test_decode_attention_refuses(changed: dict[str, object], message: str) -> None:
    cache = torch.zeros(2, 8, 32)
    arguments = {
        "q": torch.zeros(2, 32),
        "k_cache": cache,
        "v_cache": cache,
        "lengths": torch.ones(2).long(),
        "n_heads": 2,
        **changed,
    }
    with pytest.raises(ValueError, match=message):
        decode_attention(**arguments)


def test_attention_wide_float32_heads() -> None:
    """Their dk/dv kernel would spill: `triton` ships the products of `native` instead."""
    generator = torch.Generator().manual_seed(0)
    qkv, dout = (torch.randn(2, 17, n * 200, generator=generator) for n in (3, 1))
    assert triton._attention_of(qkv, 1, None) is native
    assert triton._attention_of(qkv.bfloat16(), 1, None) is not native
    out, statistics = triton.attention_forward(qkv, 1)
    expected, expected_statistics = reference.attention_forward(qkv, 1)
    assert_close(out, expected, TOLERANCE[torch.float32], "out")
    dqkv = triton.attention_backward(dout, qkv, out, statistics, 1)
    expected = reference.attention_backward(dout, qkv, expected, expected_statistics, 1)
    assert_close(dqkv, expected, TOLERANCE[torch.float32], "dqkv")
    with pytest.raises(ValueError, match="1 to 256"):
        triton.attention_forward(torch.randn(1, 4, 3 * 300), 1)
