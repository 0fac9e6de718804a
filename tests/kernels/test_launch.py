"""Grids: what no GPU takes is refused in one line, and attention asks for no such thing."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from mantrans.kernels.triton import attention
from mantrans.kernels.triton.decode_attention import decode_attention
from mantrans.kernels.triton.launch import GRID_LIMITS, launch


class Kernel:
    """Remembers the grids and options that it was launched with."""

    __name__ = "some_kernel"

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []
        self.options: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grids.append(grid)
        return lambda *_, **options: self.options.update(options)


@pytest.mark.parametrize("grid", [(2**31,), (1, 65_536), (1, 1, 65_536)])
def test_grid_too_large(grid: tuple[int, ...]) -> None:
    """A grid that no GPU takes is refused."""
    kernel = Kernel()
    with pytest.raises(ValueError, match=r"grid of some_kernel: .*65535") as refusal:
        launch(kernel, grid, torch.zeros(1))
    assert str(grid) in str(refusal.value) and "\n" not in str(refusal.value)
    assert not kernel.grids
    largest = GRID_LIMITS[: len(grid)]
    launch(kernel, largest, torch.zeros(1))
    launch(kernel, (*grid[:-1], 0), torch.zeros(1))  # nothing to do
    assert kernel.grids == [largest]


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("T", [1, 3])
def test_attention_most_heads(monkeypatch: pytest.MonkeyPatch, T: int, documents: bool) -> None:
    """B·H = 65,600 is more than the second axis of a grid takes. Nothing is run."""
    B, H, D = 4100, 16, 16
    launched: dict[str, tuple[int, ...]] = {}

    def recorded(kernel: Any, grid: tuple[int, ...], *_: Any, **__: Any) -> None:
        launched[kernel.__name__] = grid

    for module in (attention, sys.modules[decode_attention.__module__]):
        monkeypatch.setattr(module, "launch", recorded)
    qkv = torch.zeros(B, T, 3 * H * D, dtype=torch.bfloat16)
    start = torch.zeros(B, T, dtype=torch.int32) if documents else None
    out, statistics = attention.attention_forward(qkv, H, start)
    attention.attention_backward(torch.zeros_like(out), qkv, out, statistics, H, start)
    cache = torch.zeros(B, T, H * D, dtype=torch.bfloat16)
    lengths = torch.full((B,), T)
    decode_attention(cache[:, 0].contiguous(), cache, cache, lengths, H)
    assert len(launched) >= 6, launched
    for name, grid in launched.items():
        assert all(n <= most for n, most in zip(grid, GRID_LIMITS, strict=False)), (name, grid)
        assert torch.Size(grid).numel() >= B * H // 64, (name, grid)


def test_launch_fused_multiply_add() -> None:
    """Whatever Triton's default is: it changes with 3.10."""
    launch(kernel := Kernel(), (1,), torch.zeros(1), SIZE=16)
    assert kernel.options == {"enable_fp_fusion": True, "SIZE": 16}
