"""The GPUs that kernels are compiled for: one card an architecture, and its limits.

Limits are those of the CUDA C++ Programming Guide ("Technical Specifications per Compute
Capability") and of AMD's "HIP: hardware features" and instruction set guides (CDNA 3, RDNA 3);
counts of multiprocessors those of the makers' data sheets. AMD calls a multiprocessor a compute
unit (on RDNA a pair of them, a work-group processor), a warp a wavefront, and shared memory local
data share.
"""

from __future__ import annotations

from typing import NamedTuple

KIB = 1024
LARGEST_GRID = (2**31 - 1, 65_535, 65_535)
LARGEST_PROGRAM = 1024  # threads


class Card(NamedTuple):
    """One GPU."""

    name: str
    capability: int  # 90 for compute capability 9.0, 942 for gfx942
    multiprocessors: int
    shared: int  # bytes of shared memory that a program can have
    shared_in_all: int  # bytes of a multiprocessor
    warps: int  # resident on a multiprocessor
    programs: int  # resident on a multiprocessor
    vendor: str = "nvidia"
    lanes: int = 32  # of a warp
    registers: int = 65_536  # of a multiprocessor
    granule: int = 256  # registers that a warp takes are a multiple of it
    reserved: int = KIB  # bytes of shared memory that a program takes besides

    @property
    def architecture(self) -> str:
        """The maker's name of it: sm_90, gfx942."""
        return f"{'gfx' if self.vendor == 'amd' else 'sm_'}{self.capability}"


CARDS = {
    card.capability: card
    for card in (
        Card("A100", 80, 108, 163 * KIB, 164 * KIB, 64, 32),
        Card("RTX 3090", 86, 82, 99 * KIB, 100 * KIB, 48, 16),
        Card("RTX 4090", 89, 128, 99 * KIB, 100 * KIB, 48, 24),
        Card("H100 SXM", 90, 132, 227 * KIB, 228 * KIB, 64, 32),
        Card("B200", 100, 148, 227 * KIB, 228 * KIB, 64, 32),
        Card("RTX 5090", 120, 170, 99 * KIB, 100 * KIB, 48, 24),
        Card("MI300X", 942, 304, 64 * KIB, 64 * KIB, 32, 32, "amd", 64, 131_072, 512, 0),
        Card("RX 7900 XTX", 1100, 48, 64 * KIB, 128 * KIB, 64, 32, "amd", 32, 196_608, 768, 0),
    )
}


def registers_taken(card: Card, registers: int, warps: int) -> int:
    """Registers that a program takes."""
    return -(-registers * card.lanes // card.granule) * card.granule * warps


def resident_programs(card: Card, registers: int, warps: int, shared: int) -> int:
    """How many programs of a kernel a multiprocessor holds; 0 if not one."""
    return min(
        card.programs,
        card.warps // warps,
        card.registers // max(1, registers_taken(card, registers, warps)),
        card.shared_in_all // max(1, shared + card.reserved),
    )
