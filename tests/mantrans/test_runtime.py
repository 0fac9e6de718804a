"""What the host gives, and what is said where it gives no more.

That freed memory is kept is counted in page faults, which do not depend on how busy the machine is.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mantrans.wrapper
from mantrans import CustomTransformerWrapper
from mantrans.errors import ConfigError
from mantrans.runtime import is_out_of_memory, resolve_device, resolve_dtype

PROGRAM = """
import resource, torch
from mantrans.runtime import disable_malloc_trim
assert not {keep} or disable_malloc_trim()

def step():
    for block in [torch.empty(3 << 23, dtype=torch.uint8) for _ in range(3)]:
        block.fill_(1)

for _ in range(10):  # the heap still grows
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
@pytest.mark.slow
def test_malloc_trim_disabled() -> None:
    """Where nothing is kept every page of every block is new; where it is, those of one round at
    most."""
    assert page_faults(keep=False) >= BLOCKS * PAGES
    assert page_faults(keep=True) <= 3 * PAGES


@pytest.mark.parametrize("name", ["abacus", "cuda:99", "cpu:x"])
def test_device_absent(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^device: expected one that works, got '{name}'"):
        resolve_device(name)


def test_dtype_names() -> None:
    """As names and as themselves."""
    cpu = torch.device("cpu")
    assert resolve_dtype("bfloat16", cpu) == resolve_dtype(torch.bfloat16, cpu) == torch.bfloat16
    assert resolve_dtype("auto", cpu) in (torch.bfloat16, torch.float32)
    for wrong in ("float16", torch.float16):
        with pytest.raises(ConfigError, match=r"^dtype: expected auto, float32.*got.*float16$"):
            resolve_dtype(wrong, cpu)


def test_model_memory_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a model is built: not taken for a bad checkpoint."""
    model = CustomTransformerWrapper(vocab_size=9, d_model=4, n_blocks=1, n_heads=1)
    model.save_checkpoint(tmp_path / "model.pt")

    def too_large(*_: object, **__: object) -> torch.Tensor:
        return torch.empty(2**50, dtype=torch.uint8)  # more than any address space

    monkeypatch.setattr(mantrans.wrapper, "CustomTransformer", too_large)
    with pytest.raises(RuntimeError) as refused:
        CustomTransformerWrapper.from_checkpoint(tmp_path / "model.pt")
    assert is_out_of_memory(refused.value)
