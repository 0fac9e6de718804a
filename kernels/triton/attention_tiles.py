"""How the attention kernels are cut into blocks on each GPU, and how a call's tensors reach them.

A table of tiles per (kernel, architecture, dtype, head width), and `Problem`: the sizes of one call
with everything that follows from them. The kernels themselves are in `attention`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mantrans.kernels.reference import head_sizes
from mantrans.kernels.triton.launch import (
    cdiv,
    check_tensor,
    gpu_of,
    interpreted,
    next_power_of_two,
    refuse,
)

MAX_HEAD_WIDTH = 256


# Positions, rows of statistics and columns are int32 in the kernels (products with strides are
# not), and a tile may reach beyond the last.
LARGEST_INDEX = 2**31 - 2**12


class Tiles(NamedTuple):
    """How a kernel is cut: M queries and N keys a block, warps a program, depth of the pipeline."""

    M: int
    N: int
    num_warps: int
    num_stages: int


# {(kernel, architecture, bytes an element): {BLOCK_D: Tiles}}. Measured on an H100, T from 1,024 to
# 8,192: the rows of 90 for head widths 64 and 128. All others are unmeasured and chosen by the gate
# (tools/gate): nothing spilled, with documents and without; products of at least 64 columns a warp
# group; two programs a multiprocessor where they fit, so that one multiplies while the other takes
# exponentials. float32 is for exactness, not speed: it has no
# tensor cores, and one row serves all.
TILES: dict[tuple[str, int, int], dict[int, Tiles]] = {
    ("forward", 80, 2): {
        16: Tiles(128, 64, 8, 3),
        32: Tiles(128, 64, 8, 3),
        64: Tiles(128, 64, 8, 3),
        128: Tiles(128, 32, 8, 3),
        256: Tiles(64, 32, 8, 2),
    },
    ("dkdv", 80, 2): {
        16: Tiles(64, 128, 8, 2),
        32: Tiles(64, 128, 8, 2),
        64: Tiles(32, 64, 4, 2),
        128: Tiles(32, 64, 8, 2),
        256: Tiles(32, 32, 8, 2),
    },
    ("dq", 80, 2): {
        16: Tiles(128, 64, 8, 2),
        32: Tiles(128, 64, 8, 2),
        64: Tiles(128, 64, 8, 2),
        128: Tiles(64, 32, 8, 2),
        256: Tiles(32, 16, 8, 2),
    },
    ("forward", 90, 2): {
        16: Tiles(128, 128, 8, 3),
        32: Tiles(128, 128, 8, 3),
        64: Tiles(64, 64, 4, 2),
        128: Tiles(128, 64, 8, 2),
        256: Tiles(128, 64, 8, 2),
    },
    ("dkdv", 90, 2): {
        16: Tiles(64, 64, 4, 3),
        32: Tiles(64, 64, 4, 3),
        64: Tiles(64, 64, 4, 3),
        128: Tiles(64, 64, 4, 2),
        256: Tiles(16, 64, 8, 2),
    },
    ("dq", 90, 2): {
        16: Tiles(128, 64, 8, 3),
        32: Tiles(128, 64, 8, 3),
        64: Tiles(64, 64, 4, 2),
        128: Tiles(64, 64, 4, 2),
        256: Tiles(64, 32, 8, 2),
    },
    ("forward", 100, 2): {
        16: Tiles(128, 128, 8, 3),
        32: Tiles(128, 128, 8, 3),
        64: Tiles(128, 128, 8, 3),
        128: Tiles(128, 128, 8, 2),
        256: Tiles(128, 64, 8, 2),
    },
    ("dkdv", 100, 2): {
        16: Tiles(128, 64, 4, 2),
        32: Tiles(128, 64, 4, 2),
        64: Tiles(128, 128, 8, 2),
        128: Tiles(64, 128, 8, 2),
        256: Tiles(32, 64, 8, 2),
    },
    ("dq", 100, 2): {
        16: Tiles(128, 64, 8, 3),
        32: Tiles(128, 64, 8, 3),
        64: Tiles(128, 64, 8, 3),
        128: Tiles(128, 64, 8, 3),
        256: Tiles(64, 64, 8, 2),
    },
}
# With documents dk/dv has a loop more. At width 128 Triton 3.8 then spills in the row above. Not
# measured on a GPU.
TILES_WITH_DOCUMENTS = {("dkdv", 90, 2): {128: Tiles(32, 64, 4, 2)}}
# 16-bit tiles by plain loads have the rows of 80 on newer GPUs too, where nothing spills but these.
TILES_BY_LOADS = {
    ("dq", 90): {128: Tiles(64, 16, 8, 2)},
    ("dkdv", 100): {128: Tiles(32, 64, 8, 1)},
}
FLOAT32_TILES = {
    "forward": {
        16: Tiles(32, 16, 4, 1),
        32: Tiles(32, 32, 4, 1),
        64: Tiles(32, 32, 4, 1),
        128: Tiles(32, 16, 8, 1),
        256: Tiles(16, 16, 8, 1),
    },
    "dkdv": {
        16: Tiles(16, 32, 4, 1),
        32: Tiles(32, 16, 4, 1),
        64: Tiles(16, 16, 4, 1),
        128: Tiles(16, 16, 8, 1),
        256: Tiles(16, 16, 8, 1),
    },
    "dq": {
        16: Tiles(16, 16, 4, 1),
        32: Tiles(32, 16, 4, 1),
        64: Tiles(32, 32, 8, 1),
        128: Tiles(16, 16, 8, 1),
        256: Tiles(16, 16, 8, 1),
    },
}
TILES |= {(kernel, arch, 4): row for kernel, row in FLOAT32_TILES.items() for arch in (80, 90, 100)}

# AMD's GPUs, by the lanes of a warp; 64 KiB of shared memory a program. The rows of 80 where
# nothing spills: compiled by the gate, never run. RDNA's threads have 256 registers, and each warp
# holds its rows of k and v twice over: dk/dv for widths of 128 and 256 and dq for 256 spill
# whatever the tiles (docs/kernels.md says how much), these least for the keys or queries they own.
CDNA, RDNA = 64, 32
TILES |= {
    (kernel, arch, size): dict(TILES[kernel, 80, size])
    for kernel in FLOAT32_TILES
    for size in (2, 4)
    for arch in (CDNA, RDNA)
}
TILES["dkdv", CDNA, 2] = {
    16: Tiles(64, 64, 4, 2),
    32: Tiles(32, 64, 4, 2),
    64: Tiles(32, 64, 4, 2),
    128: Tiles(16, 64, 4, 2),
    256: Tiles(32, 16, 4, 2),
}
TILES["forward", RDNA, 2] |= {
    64: Tiles(64, 32, 4, 2),
    128: Tiles(32, 32, 8, 1),
    256: Tiles(16, 16, 4, 1),
}
TILES["dkdv", RDNA, 2] = {
    16: Tiles(32, 32, 4, 1),
    32: Tiles(32, 32, 4, 1),
    64: Tiles(16, 32, 4, 1),
    128: Tiles(16, 32, 8, 1),
    256: Tiles(16, 32, 16, 1),
}
TILES["dq", RDNA, 2] |= {
    32: Tiles(64, 64, 8, 1),
    64: Tiles(64, 32, 8, 1),
    128: Tiles(32, 16, 8, 1),
    256: Tiles(32, 16, 8, 1),
}
TILES["forward", RDNA, 4] |= {32: Tiles(32, 16, 4, 1), 64: Tiles(16, 16, 4, 1)}
TILES["dkdv", RDNA, 4] |= {
    32: Tiles(16, 16, 4, 1),
    64: Tiles(16, 16, 8, 1),
    128: Tiles(16, 16, 16, 1),
}
TILES["dq", RDNA, 4] |= {64: Tiles(16, 16, 8, 1)}

L2_BYTES = 16 * 2**20  # of tiles that programs under way may share: a part of the L2 cache


def architecture(device: torch.device) -> int:
    """Which rows of TILES serve `device`: 90, 100, CDNA, RDNA, or 80 for all others.

    The rows of 80 keep within the 99 KiB of shared memory that consumer cards have, and leave the
    registers that addresses take where tiles come by plain loads: newer GPUs use them too for head
    widths that the copy engine does not serve.
    """
    gpu = gpu_of(device)
    if gpu is not None and gpu.capability == 0:
        return CDNA if gpu.lanes == 64 else RDNA
    return {9: 90, 10: 100}.get(gpu.capability // 10 if gpu else 0, 80)


class Problem(NamedTuple):
    """The sizes of one call, and which way through the kernels it takes."""

    B: int
    T: int
    H: int
    H_kv: int
    D: int
    BLOCK_D: int
    element_bytes: int
    architecture: int
    TMA: bool  # tiles come through the copy engine, by descriptors

    def tiles(self, kernel: str, documents: bool) -> Tiles:
        """The kernel's row of TILES, or of the two tables of exceptions."""
        key = kernel, self.architecture, self.element_bytes
        if self.element_bytes == 2 and not self.TMA and self.architecture >= 80:
            rows = TILES[kernel, 80, 2] | TILES_BY_LOADS.get(key[:2], {})
        else:
            rows = TILES[key] | (TILES_WITH_DOCUMENTS.get(key, {}) if documents else {})
        return rows[self.BLOCK_D]

    def constants(self, kernel: str, documents: bool) -> dict[str, Any]:
        """The constexpr arguments of a kernel, and its launch options."""
        return {
            "D": self.D,
            "BLOCK_D": self.BLOCK_D,
            **self.tiles(kernel, documents)._asdict(),
            "GROUP": self.H // self.H_kv,
            "TMA": self.TMA,
            "WAIT": waits(self.architecture, self.element_bytes),
        }

    def schedule(self, rows: int, heads: int) -> tuple[tuple[int], int, int]:
        """The grid for blocks of `rows`, and the arguments of `heaviest_first` after the first.

        heads: H where programs own queries and read k and v, H_kv where it is the other way round.
        """
        pairs = self.B * heads
        read = self.H * self.H_kv // heads  # heads of which the programs of one sequence read
        tiles = 2 * self.T * self.D * self.element_bytes * read  # k and v, or q and do
        together = max(1, min(pairs, L2_BYTES * heads // tiles))
        return (cdiv(self.T, rows) * pairs,), pairs, together

    @property
    def scale(self) -> float:
        return self.D**-0.5


def waits(architecture: int, element_bytes: int) -> bool:
    """Whether `wait_for_product` has something to wait for: Hopper's products of 16-bit numbers."""
    return architecture == 90 and element_bytes == 2 and not interpreted()


def problem_of(qkv: Tensor, n_heads: int, n_kv_heads: int | None) -> Problem:
    """Checks the sizes of qkv against its heads. ValueError as `attention_forward`."""
    check_tensor("qkv", qkv, shape=(None, None, None), contiguous=False)
    B, T, width = qkv.shape
    if qkv.stride(2) != 1:
        refuse("qkv", f"strides {qkv.stride()}", "a last stride of 1")
    H_kv, D = accepted_head_sizes(width, n_heads, n_kv_heads)
    for what, n in (
        ("T · n_heads / n_kv_heads", T * n_heads // H_kv),
        ("2 · B · n_heads", 2 * B * n_heads),
        ("width", width),
    ):
        if n > LARGEST_INDEX:
            refuse("qkv", f"shape {tuple(qkv.shape)}", f"{what} of at most {LARGEST_INDEX:,}")
    arch = architecture(qkv.device)
    size = qkv.element_size()
    aligned = qkv.data_ptr() % 16 == 0 and all(s * size % 16 == 0 for s in qkv.stride()[:2])
    TMA = aligned and copy_engine_serves(arch, D, size)
    return Problem(B, T, n_heads, H_kv, D, padded(D), size, arch, TMA)


def accepted_head_sizes(width: int, n_heads: int, n_kv_heads: int | None) -> tuple[int, int]:
    """`reference.head_sizes`, and a ValueError too if D is not from 1 to 256."""
    H_kv, D = head_sizes(width, n_heads, n_kv_heads)
    return H_kv, accepted_width(D)


def accepted_width(D: int) -> int:
    """D, if it is from 1 to 256; otherwise a ValueError."""
    if not 1 <= D <= MAX_HEAD_WIDTH:
        refuse("head width", D, f"1 to {MAX_HEAD_WIDTH}")
    return D


def padded(D: int) -> int:
    """BLOCK_D: the width of a tile that holds D columns."""
    return max(16, next_power_of_two(D))


def copy_engine_serves(architecture: int, D: int, element_bytes: int) -> bool:
    """Whether tiles can come by descriptors: it exists, and heads begin on 16 bytes.

    float32 tiles come by plain loads: their products are formed in registers.
    """
    return architecture >= 90 and element_bytes == 2 and D * element_bytes % 16 == 0


def tiles_of(x: Tensor, problem: Problem, rows: int) -> Tensor | TensorDescriptor:
    """x (B, T, heads·D) as `load_tile` reads it, in tiles of `rows`."""
    if not problem.TMA:
        return x
    B, T, D = problem.B, problem.T, problem.D
    strides = [x.stride(0), D, x.stride(1), 1]
    return TensorDescriptor(x, [B, x.shape[2] // D, T, D], strides, [1, 1, rows, problem.BLOCK_D])


def row_statistics(x: Tensor, problem: Problem, rows: int) -> Tensor | TensorDescriptor:
    """x (n, B, H, T) float32 as `load_row_statistic` reads it, `rows` at a time."""
    if not problem.TMA:
        return x
    return TensorDescriptor(x, [x[..., 0].numel(), problem.T], [x.stride(2), 1], [1, rows])


def empty_row_statistics(n: int, like: Tensor, problem: Problem) -> Tensor:
    """`empty_rows` of a problem."""
    return empty_rows(n, problem.B, problem.H, problem.T, like.device)


def empty_rows(n: int, B: int, H: int, T: int, device: torch.device) -> Tensor:
    """(n, B, H, T) float32, unwritten. Rows start on 64 bytes: the copy engine wants 16, and a
    stride that is a multiple of 16 elements whatever T is makes Triton compile once for all T."""
    shape = (n, B, H, cdiv(T, 16) * 16)
    return torch.empty(shape, dtype=torch.float32, device=device)[..., :T]


def check_documents(document_start: Tensor | None, problem: Problem, device: torch.device) -> None:
    """ValueError unless document_start is None or (B, T) int32 on `device`."""
    if document_start is not None:
        shape = (problem.B, problem.T)
        check_tensor(
            "document_start", document_start, shape=shape, dtype=torch.int32, device=device
        )
