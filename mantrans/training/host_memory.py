"""Lets the C library keep memory that was given back to it: a tenth of a step on a CPU.

By default glibc returns a large block to the system as soon as it is free, and the next tensor of
that size, a millisecond later, pays for each of its pages again (mallopt(3)). A training step frees
and takes the same sizes over and over, so nothing is gained by returning them.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
_LARGEST = 2**31 - 1
_SIZES = (2**30, 2**25)  # older versions accept the second at most


def keep_freed_memory() -> bool:
    """Ask for it, for this whole process; False where the C library is not glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    kept = mallopt(_TRIM_THRESHOLD, _LARGEST) == 1
    return kept and any(mallopt(_MMAP_THRESHOLD, size) == 1 for size in _SIZES)
