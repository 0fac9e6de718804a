"""The GPUs that kernels are compiled for: one card an architecture, and its limits.

Limits are those of the CUDA C++ Programming Guide ("Technical Specifications per Compute
Capability"), counts of multiprocessors those of the makers' data sheets.
"""

from __future__ import annotations

from typing import NamedTuple

KIB = 1024
REGISTERS = 65_536  # of a multiprocessor, on all of these
LARGEST_GRID = (2**31 - 1, 65_535, 65_535)
LARGEST_PROGRAM = 1024  # threads


class Card(NamedTuple):
    """One GPU."""

    name: str
    capability: int  # 90 for compute capability 9.0
    multiprocessors: int
    shared: int  # bytes of shared memory that a program can have
    shared_in_all: int  # bytes of a multiprocessor; a program takes SHARED_RESERVED more
    warps: int  # resident on a multiprocessor
    programs: int  # resident on a multiprocessor


SHARED_RESERVED = KIB

CARDS = {
    card.capability: card
    for card in (
        Card("A100", 80, 108, 163 * KIB, 164 * KIB, 64, 32),
        Card("RTX 3090", 86, 82, 99 * KIB, 100 * KIB, 48, 16),
        Card("RTX 4090", 89, 128, 99 * KIB, 100 * KIB, 48, 24),
        Card("H100 SXM", 90, 132, 227 * KIB, 228 * KIB, 64, 32),
        Card("B200", 100, 148, 227 * KIB, 228 * KIB, 64, 32),
        Card("RTX 5090", 120, 170, 99 * KIB, 100 * KIB, 48, 24),
    )
}


def registers_taken(registers: int, warps: int) -> int:
    """Registers that a program takes: a warp's are rounded up to 256."""
    return -(-registers * 32 // 256) * 256 * warps


def resident_programs(card: Card, registers: int, warps: int, shared: int) -> int:
    """How many programs of a kernel a multiprocessor holds; 0 if not one."""
    return min(
        card.programs,
        card.warps // warps,
        REGISTERS // max(1, registers_taken(registers, warps)),
        card.shared_in_all // (shared + SHARED_RESERVED),
    )
