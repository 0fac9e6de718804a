"""Attention to a window of the last keys, in training and in decoding.

Tolerances on the relative RMS error: 1e-12 for float64, as everywhere; NATIVE is that of
test_operations: float32 sums in another order, 16-bit intermediates that one side rounds.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mantrans.kernels import native, reference, triton
from mantrans.kernels import operations as described
from mantrans.kernels.operations import Draw, Shapes
from tests.kernels.common import each_backend
from tests.support.compare import assert_close

NATIVE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
CPU = torch.device("cpu")
slow = pytest.mark.slow


def band(T: int, window: int, document_start: Tensor | None = None) -> Tensor:
    """(B, 1, T, T) bool, written down key by key: which keys a query sees."""
    B = 1 if document_start is None else len(document_start)
    seen = torch.zeros(B, 1, T, T, dtype=torch.bool)
    for b in range(B):
        for i in range(T):
            for j in range(i + 1):
                same = document_start is None or j >= document_start[b, i]
                seen[b, 0, i, j] = same and i - j < window
    return seen


def starts_of(B: int, T: int, window: int, documents: bool) -> Tensor:
    """Windows, in documents of a few hundred tokens at most if `documents`."""
    tokens = torch.randint(0, 9, (B, T), generator=torch.Generator().manual_seed(3))
    found = reference.document_starts(tokens, 0) if documents else None
    return reference.window_starts(tokens, window, found)


def attend(ops: Any, qkv: Tensor, dout: Tensor, heads: tuple[int, int], starts: Tensor | None):
    """out and dqkv."""
    H, H_kv = heads
    out, statistics = ops.attention_forward(qkv, H, starts, H_kv)
    return out, ops.attention_backward(dout, qkv, out, statistics, H, starts, H_kv)


def inputs(s: Shapes, dtype: torch.dtype) -> tuple[Tensor, Tensor, tuple[int, int]]:
    i = described.Attention().inputs(s, Draw(dtype, CPU))
    return i["qkv"], i["dout"], i["heads"]


# ------------------------------------------------------------------------------- the mathematics


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("window", "H_kv"), [(1, 6), (2, 2), (5, 1), (5, 6), (13, 2), (40, 1)])
def test_window_reference_equals_autograd(H_kv: int, window: int, documents: bool) -> None:
    B, T, H, D = 2, 13, 6, 5
    qkv, dout, heads = inputs(Shapes(B=B, T=T, H=H, H_kv=H_kv, D=D), torch.float64)
    tokens = torch.randint(0, 4, (B, T), generator=torch.Generator().manual_seed(0))
    found = reference.document_starts(tokens, 0) if documents else None
    leaf = qkv.clone().requires_grad_()
    q, k, v = described.split_heads(leaf, H, H_kv)
    plain = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, band(T, window, found), enable_gqa=True
    )
    plain = plain.transpose(1, 2).flatten(2)
    (dqkv,) = torch.autograd.grad(plain, leaf, dout)
    starts = reference.window_starts(tokens, window, found)
    actual = attend(reference, qkv, dout, heads, starts)
    for x, expected in zip(actual, (plain.detach(), dqkv), strict=True):
        assert_close(x, expected, 1e-12)


def test_window_wider_than_sequence() -> None:
    tokens = torch.zeros(2, 7, dtype=torch.int64)
    assert (reference.window_starts(tokens, 7) == 0).all()
    assert (reference.window_starts(tokens, 2**20) == 0).all()
    assert reference.window_starts(tokens, 3)[1].tolist() == [0, 0, 0, 1, 2, 3, 4]


# ---------------------------------------------------------------------------------------- native


@pytest.mark.parametrize("flash", ["forward", "forward and backward", "never"])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("window", [9, *(pytest.param(n, marks=slow) for n in (1, 40, 512))])
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.bfloat16,
        *(pytest.param(x, marks=slow) for x in (torch.float64, torch.float16)),
    ],
    ids=str,
)
def test_window_native_equals_reference(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, window: int, documents: bool, flash: str
) -> None:
    """Over three blocks of queries, by each way that a CPU may choose."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: flash != "never")
    monkeypatch.setattr(native, "LONGEST_BATCHED", 0 if "backward" in flash else 1024)
    if flash == "never":
        monkeypatch.setattr(native, "_flash_forward", lambda qkv: False)
    monkeypatch.setattr(native, "DOCUMENT_BLOCK", 32)
    B, T = 2, 77
    qkv, dout, heads = inputs(Shapes(B=B, T=T, H=2, H_kv=1, D=8), dtype)
    starts = starts_of(B, T, window, documents)
    expected = attend(reference, qkv.double(), dout.double(), heads, starts)
    for x, wanted in zip(attend(native, qkv, dout, heads, starts), expected, strict=True):
        assert x.dtype == dtype
        assert_close(x, wanted, NATIVE[dtype])


@pytest.mark.parametrize("flash", [True, False])
def test_window_native_blocks_outside(monkeypatch: pytest.MonkeyPatch, flash: bool) -> None:
    """NaN outside every window of a block of queries or keys does not reach that block."""
    if not flash:
        monkeypatch.setattr(native, "_flash_forward", lambda qkv: False)
    n, window = native.DOCUMENT_BLOCK, 10
    T, D = 3 * n, 4
    qkv, dout, _ = inputs(Shapes(B=2, T=T, D=D), torch.float32)
    starts = starts_of(2, T, window, documents=False)
    out, statistics = native.attention_forward(qkv, 1, starts)
    clean = native.attention_backward(dout, qkv, out, statistics, 1, starts)

    broken = qkv.clone()
    broken[:, : n - window, D:] = torch.nan  # keys and values of which block 1 sees none
    assert native.attention_forward(broken, 1, starts)[0][:, n:].equal(out[:, n:])
    dqkv = native.attention_backward(dout, broken, out, statistics, 1, starts)
    assert dqkv[:, n:].equal(clean[:, n:])

    dout[:, 2 * n :] = torch.nan  # nothing of which reaches keys before 2 n - window
    dqkv = native.attention_backward(dout, qkv, out, statistics, 1, starts)
    assert dqkv[:, : 2 * n - window].equal(clean[:, : 2 * n - window])
    assert dqkv[:, 2 * n - 1, D:].isnan().all()  # the test can see it


def test_attention_native_causal() -> None:
    """Without documents nothing has changed, to the last bit."""
    qkv, dout, _ = inputs(Shapes(B=2, T=600, H=2, H_kv=2, D=8), torch.float32)
    out, dqkv = attend(native, qkv, dout, (2, 2), None)
    q, k, v = reference.split_heads(qkv, 2)
    aten = torch.ops.aten
    o, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
    assert out.equal(reference.merge_heads(o))
    do = dout.unflatten(2, (2, 8)).transpose(1, 2)
    gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        do, q, k, v, o, lse, 0.0, True
    )
    assert dqkv.equal(reference.join_heads(gradients))


# ---------------------------------------------------------------------------------------- triton


@pytest.mark.parametrize(
    ("dtype", "D"), [(torch.bfloat16, 64), pytest.param(torch.float32, 12, marks=slow)], ids=str
)
@pytest.mark.parametrize(
    ("window", "H_kv", "documents"),
    [
        (10, 1, False),
        pytest.param(10, 1, True, marks=slow),
        *(pytest.param(n, 3, d, marks=slow) for n in (1, 64, 2000) for d in (False, True)),
    ],
)
def test_window_triton_equals_reference(
    window: int, H_kv: int, documents: bool, dtype: torch.dtype, D: int
) -> None:
    """Windows smaller than a block, of a block and more, and wider than the sequence."""
    B, T = 1, 131
    qkv, dout, heads = inputs(Shapes(B=B, T=T, H=3, H_kv=H_kv, D=D), dtype)
    starts = starts_of(B, T, window, documents)
    expected = attend(reference, qkv.double(), dout.double(), heads, starts)
    for x, wanted in zip(attend(triton, qkv, dout, heads, starts), expected, strict=True):
        assert_close(x, wanted, 4e-6 if dtype == torch.float32 else NATIVE[dtype])


def test_window_triton_blocks_outside() -> None:
    """NaN in keys, values and upstream gradients outside every window of a block of 128 positions,
    which no block of the kernels exceeds, does not reach that block: 0 · NaN would be NaN."""
    n, window, D = 128, 10, 64
    qkv, dout, _ = inputs(Shapes(T=3 * n, D=D), torch.bfloat16)
    starts = starts_of(1, 3 * n, window, documents=False)
    out, statistics = triton.attention_forward(qkv, 1, starts)
    clean = triton.attention_backward(dout, qkv, out, statistics, 1, starts)

    broken = qkv.clone()
    broken[:, :n, D:] = torch.nan  # queries from 2 n on see keys from 2 n - 9 on
    assert triton.attention_forward(broken, 1, starts)[0][:, 2 * n :].equal(out[:, 2 * n :])
    dqkv = triton.attention_backward(dout, broken, out, statistics, 1, starts)
    assert dqkv[:, 2 * n :].equal(clean[:, 2 * n :])

    dout[:, 2 * n :] = torch.nan  # keys before n are seen by queries before n + 10
    dqkv = triton.attention_backward(dout, qkv, out, statistics, 1, starts)
    assert dqkv[:, :n].equal(clean[:, :n])
    assert dqkv[:, 3 * n - 1].isnan().all()  # the test can see it


def test_window_triton_decode_shares() -> None:
    """Shares of a long cache are those of its last keys, with the bits of a cache of these."""
    B, T, window, H, D = 2, 3000, 700, 2, 16
    s = Shapes(B=B, T=T, H=H, H_kv=H, D=D)
    i = described.DecodeAttention().inputs(s, Draw(torch.float32, CPU))
    q, k, v = i["q"], i["k"], i["v"]
    k[:, : T - window] = v[:, : T - window] = torch.nan
    out = triton.decode_attention(q, k, v, i["lengths"], H, window=window)
    lengths = torch.full((B,), window)
    alone = triton.decode_attention(q, *(x[:, -window:].contiguous() for x in (k, v)), lengths, H)
    assert out.equal(alone)


# -------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("lengths", [[11, 1, 6], [7, 7, 7]], ids=str)
@pytest.mark.parametrize(("window", "H_kv"), [(1, 2), (3, 1), (7, 2), (11, 1), (99, 2)])
@each_backend
def test_window_decode(
    ops: Any, dtype: torch.dtype, H_kv: int, window: int, lengths: list[int]
) -> None:
    """NaN in all that a row does not see; and the caches stay as they are where it was written."""
    operation = described.WindowDecodeAttention()
    i = dict(operation.inputs(Shapes(B=3, T=11, H=2, H_kv=H_kv, D=5), Draw(dtype, CPU)))
    full = described.DecodeAttention().inputs(
        Shapes(B=3, T=11, H=2, H_kv=H_kv, D=5), Draw(dtype, CPU)
    )
    i |= {"lengths": torch.tensor(lengths), "window": window, "k": full["k"], "v": full["v"]}
    seen = operation.seen(i)
    i["k"][~seen] = i["v"][~seen] = torch.nan
    kept = i["k"].clone(), i["v"].clone()
    wide = {name: x.double() for name, x in i.items() if name in ("q", "k", "v")}
    expected = operation.plain(i | wide)["out"]
    assert expected.isfinite().all()
    out = operation.forward(ops, i)["out"]
    assert out.dtype == dtype
    assert_close(out, expected, NATIVE[dtype] if ops is not reference else 4e-3)
    for x, before in zip((i["k"], i["v"]), kept, strict=True):
        assert x[seen].equal(before[seen])
        past = torch.arange(11) < i["lengths"][:, None]
        assert x[past & ~seen].isnan().all()


@each_backend
def test_window_decode_equals_sequence(ops: Any, dtype: torch.dtype) -> None:
    """Position after position, the cached step gives what the whole sequence gives."""
    T, H, H_kv, D, window = 6, 2, 1, 6, 3
    qkv, _, _ = inputs(Shapes(B=2, T=T, H=H, H_kv=H_kv, D=D), dtype)
    starts = starts_of(2, T, window, documents=False)
    whole, _ = reference.attention_forward(qkv.double(), H, starts, H_kv)
    q, k, v = qkv.split([H * D, H_kv * D, H_kv * D], -1)
    for t in range(T):
        lengths = torch.full((2,), t + 1)
        out = ops.decode_attention(
            q[:, t].contiguous(), k.clone(), v.clone(), lengths, H, H_kv, window=window
        )
        assert_close(out, whole[:, t], NATIVE[dtype])


@pytest.mark.parametrize("ops", [reference, native, triton], ids=["reference", "native", "triton"])
def test_window_without_keys(ops: Any) -> None:
    q, cache = torch.zeros(1, 4), torch.zeros(1, 3, 4)
    with pytest.raises(ValueError, match=r"^window: expected at least 1, got 0$"):
        ops.decode_attention(q, cache, cache, torch.tensor([2]), 1, window=0)
    with pytest.raises(ValueError, match=r"^window: expected at least 1, got -3$"):
        ops.window_starts(torch.zeros(1, 3), -3)
