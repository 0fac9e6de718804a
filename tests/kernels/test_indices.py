"""Offsets beyond 2³¹: single programs of kernels on tensors whose pages are never touched."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from mantrans.kernels import native, reference, triton
from mantrans.kernels.triton import (
    attention_tiles,
    embedding,
    gelu,
    layer_norm,
    norm_rotary,
    rms_norm,
    rotary,
    swiglu,
)
from mantrans.kernels.triton import partials as partial_sums
from mantrans.kernels.triton.bias_gradient import BLOCK_COLUMNS, column_sums_kernel
from tests.support.compare import assert_close

FAR = 2**31
MAP_NORESERVE = 0x4000  # Linux's, which Python does not name


def untouched(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Zeros that take address space alone: pages come when they are written."""
    size = torch.Size(shape).numel() * dtype.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=dtype).view(shape)


@contextmanager
def program(*index: int) -> Iterator[None]:
    """The kernel's only program has this index."""
    builder = interpreter.interpreter_builder
    whole = (*index, 0, 0)[:3]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(builder, "set_grid_idx", lambda *_: setattr(builder, "grid_idx", whole))
        # the interpreter would copy whole storages back
        patched.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
        yield


def run(kernel: Any, index: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    with program(*index):
        kernel[(1,) * len(index)](*arguments, **constants)


@pytest.mark.parametrize("T", [2**16])
def test_attention_second_sequence(T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """T · C = 2³¹: the last 64 positions of the last head, a document of their own."""
    monkeypatch.setattr(attention_tiles, "architecture", lambda _: 80)  # by pointers
    H, D, n = FAR // T // 64, 64, 64
    C = H * D
    generator = torch.Generator().manual_seed(0)
    q, k, v, do = (torch.randn(1, n, D, generator=generator).bfloat16() for _ in range(4))
    dout, out = untouched(2, T, C), untouched(2, T, C)
    dout[1, -n:, -D:] = do
    small = torch.cat([q, k, v], -1)
    want_out, statistics = reference.attention_forward(small.double(), 1)
    out[1, -n:, -D:] = want_out[0].bfloat16()
    delta = untouched(2 * H, T, dtype=torch.float32)
    run(triton.attention.delta_kernel, (2 * H - 1, T // 64 - 1), delta, None, out, dout, None, T, T,
        H, D=D, BLOCK_D=D, M=64)  # fmt: skip
    assert_close(delta[-1, -n:], (do.double() * want_out.bfloat16().double()).sum(-1)[0], 1e-6)

    # dk and dv: dout lies T · C apart, of which 2³¹ would wrap to a negative number
    qkv, dqkv = small, untouched(2, T, 3 * C)
    stats = untouched(4 * H, T, dtype=torch.float32)
    stats[2 * H - 1, -n:] = statistics[0, 0, 0].float() * D**0.5
    stats[4 * H - 1, -n:] = statistics[1, 0, 0].float() / 0.6931471805599453
    packed = untouched(2, T, 3 * C)
    for i, x in enumerate((q, k, v)):
        packed[1, -n:, (i + 1) * C - D : (i + 1) * C] = x
    start = torch.zeros(2, T, dtype=torch.int32)
    seen_until = torch.full((2, T), T, dtype=torch.int32)
    start[1, -n:] = T - n
    sizes = (T, packed.stride(0), packed.stride(1), T, H)
    constants = {"D": D, "BLOCK_D": D, "M": 64, "N": 64, "GROUP": 1, "TMA": False, "WAIT": False}
    blocks = T // 64
    run(triton.attention.dkdv_kernel, (2 * H * blocks - 1,), dqkv, packed, packed, dout, stats,
        delta, start, seen_until, *sizes, 2 * H, 1, D**-0.5, **constants)  # fmt: skip
    run(triton.attention.dq_kernel, ((2 * H - 1) * blocks,), dqkv, packed, packed, dout, stats,
        delta, start, *sizes, 2 * H, 1, D**-0.5, **constants)  # fmt: skip
    want = reference.attention_backward(do.double(), qkv.double(), want_out, statistics, 1)
    for i, wanted in enumerate(want.chunk(3, -1)):
        got = dqkv[1, -n:, (i + 1) * C - D : (i + 1) * C]
        assert_close(got, wanted[0], 5e-3, ("dq", "dk", "dv")[i])


def test_column_sums_beyond_int32() -> None:
    width, rows = FAR + 500, 3
    matrix = untouched(rows, width)
    matrix[:, -10:] = 1
    sums = untouched(1, width, dtype=torch.float32)
    block = BLOCK_COLUMNS
    run(column_sums_kernel, (width // block, 0), matrix, sums, rows, width, 1, width,
        ACCUMULATE=False, BLOCK_ROWS=8, BLOCK_COLUMNS=block)  # fmt: skip
    assert sums[0, -10:].tolist() == [3.0] * 10

    total = untouched(width, dtype=torch.float32)
    block = partial_sums.BLOCK_COLUMNS
    run(partial_sums.sum_partials_kernel, (width // block,), sums, total, 1, width, width,
        BLOCK_ROWS=64, BLOCK_COLUMNS=block)  # fmt: skip
    assert total[-10:].tolist() == [3.0] * 10


@pytest.mark.parametrize("n_rows", [FAR - 3, FAR + 5])
def test_rows_beyond_int32(n_rows: int) -> None:
    """The last program's only tile; a loop over int32 rows would not end."""
    x, dy, dx = untouched(n_rows, 1), untouched(n_rows, 1), untouched(n_rows, 1)
    dy[-2:], x[-2:] = 1, 2
    mean, rstd = untouched(n_rows, dtype=torch.float64), untouched(n_rows, dtype=torch.float32)
    mean[-2:], rstd[-2:] = 1, 3
    tiles = -(-n_rows // 512)
    dweight = untouched(tiles, 1, dtype=torch.float32)
    run(layer_norm.layer_norm_backward_kernel, (tiles - 1,), dy, x, torch.ones(1), mean, rstd, None,
        dx, dweight, None, None, n_rows, 1, tiles, 1, ACCUMULATE=False, BLOCK_ROWS=512,
        BLOCK_COLUMNS=1)  # fmt: skip
    assert dweight[-1].item() == 6
    dweight.zero_()
    run(rms_norm.rms_norm_backward_kernel, (tiles - 1,), dy, x, torch.ones(1), rstd, None, dx,
        dweight, None, n_rows, 1, tiles, 1, ACCUMULATE=False, BLOCK_ROWS=512,
        BLOCK_COLUMNS=1)  # fmt: skip
    assert dweight[-1].item() == 12
    tiles = -(-n_rows // 8)
    dbias = untouched(tiles, 1, dtype=torch.float32)
    run(gelu.bias_gelu_backward_kernel, (0, tiles - 1), dy, x, None, dx, dbias, n_rows, 1, tiles, 1,
        ACCUMULATE=False, BLOCK_ROWS=8, BLOCK_COLUMNS=1)  # fmt: skip
    want = native.bias_gelu_backward(torch.ones(2), torch.full((2,), 2.0))
    assert_close(dx[-2:, 0], want, 4e-3)
    assert_close(dbias[-1], want.sum()[None], 1e-6)


def test_swiglu_beyond_int32() -> None:
    """2 F of a row passes 2³¹ at its second half, and rows do, however narrow."""
    for N, F in ((3, FAR // 2 + 512), (FAR + 3, 1)):
        h, dy, dh = untouched(N, 2 * F), untouched(N, F), untouched(N, 2 * F)
        h[-1, F - 1], h[-1, -1], dy[-1, -1] = 2, 3, 1
        block = min(F, 256)
        last = -(-N // 8) * -(-F // block) - 1
        shape = {"BLOCK_ROWS": 8, "BLOCK_COLUMNS": block}
        y = untouched(N, F)
        run(swiglu.swiglu_forward_kernel, (last,), h, y, N, F, **shape)
        run(swiglu.swiglu_backward_kernel, (last,), dy, h, dh, N, F, **shape)
        small = torch.tensor([[2.0, 3.0]])
        assert_close(y[-1, -1:], native.swiglu_forward(small)[0], 4e-3)
        want = native.swiglu_backward(torch.ones(1, 1), small)
        assert_close(torch.stack([dh[-1, F - 1], dh[-1, -1]]), want[0], 4e-3)


def test_embedding_positions_beyond_int32() -> None:
    """A position table of more than 2³¹ elements, and a token that is row 5 but for 2³²."""
    T, C = 2**21 + 8, 1024
    table, positions = torch.zeros(4, C).bfloat16(), untouched(T, C)
    positions[-4:] = 7
    tokens = untouched(1, T, dtype=torch.int64)
    x = untouched(1, T, C)
    run(embedding.embedding_forward_kernel, (T // 4 - 1, 0), tokens, table, positions, x, T, T, 4,
        C, BLOCK_ROWS=4, BLOCK_COLUMNS=1024)  # fmt: skip
    assert (x[0, -4:] == 7).all()

    dtable = torch.zeros(8, 16)
    tokens = torch.tensor([[5, 5 + 2**32, -(2**32) + 5]])
    embedding.embedding_backward(torch.ones(1, 3, 16), tokens, dtable, torch.zeros(3, 16))
    assert dtable.sum(1).tolist() == [0, 0, 0, 0, 0, 16, 0, 0]


def test_attention_refuses_beyond_int32() -> None:
    with pytest.raises(ValueError, match="qkv: expected T · n_heads / n_kv_heads of at most"):
        triton.attention_forward(torch.zeros(1, 1, 10 * 16).expand(1, 2**28, 160), 8, None, 1)


@pytest.mark.parametrize("n_rows", [FAR // 6 + 5, FAR + 5])
def test_rotary_beyond_int32(n_rows: int) -> None:
    """Elements, heads counted through all rows, and rows; the last program's only tile."""
    T, H, H_kv, D, block = 8, 1, 1, 2, 1024
    generator = torch.Generator().manual_seed(0)
    last = torch.randn(3, 3 * D, generator=generator).bfloat16()
    positions = torch.arange(n_rows - 3, n_rows) % T
    cos, sin = torch.randn(2, T, D // 2, generator=generator)
    gains = torch.randn(2, D, generator=generator)
    x, y, dy = (untouched(n_rows, 3 * D) for _ in range(3))
    rstd = untouched(n_rows, H + H_kv, dtype=torch.float32)
    shapes = {"HALF": D // 2, "BLOCK_HEADS": block, "BLOCK_HALF": 1}
    table = cos[positions], sin[positions]

    x[-3:] = last
    run(rotary.rotary_kernel, ((n_rows * 2 - 1) // block,), x, cos, sin, None, n_rows, 2, T, 3 * D,
        BACK=False, **shapes)  # fmt: skip
    assert_close(x[-3:], reference.rotary_forward(last[None], *table, H)[0], 4e-3)

    x[-3:], dy[-3:] = last, last.flip(0)
    run(norm_rotary.norm_rotary_forward_kernel, ((n_rows * 3 - 1) // block,), y, x, *gains, rstd,
        cos, sin, None, n_rows, H, H + H_kv, H + 2 * H_kv, T, 3 * D, 1e-5, **shapes)  # fmt: skip
    want, want_rstd = reference.norm_rotary_forward(last[None], *gains, *table, 1e-5, H)
    assert_close(y[-3:], want[0], 4e-3)
    assert_close(rstd[-3:], want_rstd, 1e-6)

    tiles = -(-n_rows // block)  # of q, and as many of k
    dq, dk = (untouched(tiles, D, dtype=torch.float32) for _ in range(2))
    run(norm_rotary.norm_rotary_backward_kernel, (tiles - 1,), dy, x, *gains, rstd, cos, sin, dq,
        dk, n_rows, H, H_kv, T, tiles, tiles, 3 * D, D, ACCUMULATE=False, **shapes)  # fmt: skip
    sums = torch.zeros(2, D)
    want = reference.norm_rotary_backward(
        last.flip(0)[None], last[None], *gains, want_rstd, *table, *sums, H
    )
    assert_close(dy[-3:], want[0], 4e-3)
    assert_close(torch.stack((dq[-1], dk[-1])), sums, 2e-6)
