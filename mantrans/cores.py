"""The processor's cores, for those who do not need torch."""

from __future__ import annotations

import os


def share_of_cores(local_ranks: int = 1) -> int:
    """The cores that this process may use, divided by the processes that use them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // local_ranks)
