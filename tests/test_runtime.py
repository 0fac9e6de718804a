"""Freed memory is kept: counted in page faults, which do not depend on how busy the machine is."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from mantrans.runtime import disable_malloc_trim
assert not {keep} or disable_malloc_trim()

def step():
    for block in [torch.empty(3 << 23, dtype=torch.uint8) for _ in range(3)]:
        block.fill_(1)

for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


BLOCKS, PAGES = 30, (24 << 20) // 4096  # touched in ten rounds; of each block
# glibc's own first thresholds, held fixed: how far it raises them by itself depends on where the
# system happened to put the heap.
RETURNS_ALL = {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}


def page_faults(keep: bool) -> int:
    """Of ten rounds that take, fill and free three blocks of 24 MiB, in a process of their own."""
    command = [sys.executable, "-c", PROGRAM.format(keep=keep)]
    environment = {**os.environ, **RETURNS_ALL}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(ended.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_kept() -> None:
    """Where nothing is kept every page of every block is new; where it is, those of one round at
    most, while the heap still grows."""
    assert page_faults(keep=False) >= BLOCKS * PAGES
    assert page_faults(keep=True) <= 3 * PAGES
