"""The host: its device, the dtype that is fast on it, and its memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

import torch

from mantrans.cores import share_of_cores
from mantrans.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}

OUT_OF_MEMORY = (
    "out of memory; lower training.batch_size and raise training.gradient_accumulation_steps by "
    "the same factor, lower data.max_length, set training.recompute to block, make the model "
    "smaller, or, to evaluate a checkpoint, lower evaluation.batch_size"
)
# PyTorch has an exception only for GPUs; on a CPU its allocator is recognized by its message.
_CPU_ALLOCATOR = "DefaultCPUAllocator"

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
_LARGEST = 2**31 - 1
_SIZES = (2**30, 2**25)  # the second is the largest that older versions accept


def resolve_device(device: torch.device | str) -> torch.device:
    """The device; "auto" is a GPU if there is one. Raises ConfigError for a missing device."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
        if resolved.type == "cuda" and resolved.index is not None:
            torch.cuda.set_device(resolved)  # kernels are launched on the current device
        if resolved.type not in ("cpu", "cuda"):
            raise RuntimeError("not a CPU or a CUDA GPU")
    except (RuntimeError, AssertionError, TypeError) as wrong:
        reason = str(wrong).splitlines()[0]
        raise ConfigError(f"device: expected one that works, got {device!r} ({reason})") from None
    return resolved


def resolve_dtype(dtype: torch.dtype | str, device: torch.device) -> torch.dtype:
    """The dtype; "auto" is bfloat16 if the processor multiplies it natively, else float32.

    This is the case for every GPU since Ampere, and for CPUs with AVX512-BF16 or AMX, whose
    bfloat16 products are four times as fast as float32. Raises ConfigError for other dtypes.
    """
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    if dtype != "auto":
        raise ConfigError(f"dtype: expected auto, {', '.join(DTYPES)}, got {dtype}")
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def set_threads(threads: int | None, local_ranks: int = 1) -> None:
    """Set how many threads PyTorch computes with on a CPU; None: as it is with one process, else
    this process's share of the cores. (torchrun sets OMP_NUM_THREADS to 1.)"""
    if threads is None and local_ranks > 1:
        threads = share_of_cores(local_ranks)
    if threads is not None:
        torch.set_num_threads(threads)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is a failed allocation on a CPU or a GPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and _CPU_ALLOCATOR in str(error)
    )


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process could still take on the host without swapping.

    The least of what the system has (Linux's MemAvailable, elsewhere all memory) and what each
    control group that the process is in leaves of its limit, as in a container.
    root: where the system's files are.
    """
    lines = _lines(root / "proc/meminfo")
    found = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    found += [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, group = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root / "sys/fs/cgroup" / controllers
        path = top / group.strip("/")
        found += [left for folder in (path, *path.parents) if (left := _left(folder)) is not None]
    return max(0, min(found))


def _left(group: Path) -> int | None:
    """What a control group leaves of its memory limit, pages of files that it can drop counted as
    free; None without a limit. Both versions of its files are read."""
    for limit, usage, files in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        with contextlib.suppress(IndexError, ValueError):  # "max" is not a number
            most, used = (int(_lines(group / name)[0]) for name in (limit, usage))
            stat = dict(line.split() for line in _lines(group / "memory.stat"))
            return most - used + int(stat.get(files, 0))
    return None


def _lines(file: Path) -> list[str]:
    """A file's lines; none if it cannot be read."""
    try:
        return file.read_text().splitlines()
    except OSError:
        return []


def disable_malloc_trim() -> bool:
    """Let the C library keep freed memory in this process, which saves a tenth of a step on a CPU.

    By default glibc returns a large block to the system as soon as it is free (mallopt(3),
    M_TRIM_THRESHOLD and M_MMAP_THRESHOLD), and the next tensor of that size, a millisecond later,
    must map all pages again. A training step frees and allocates the same sizes over and over, so
    returning them gains nothing. Returns False if the C library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    kept = mallopt(_TRIM_THRESHOLD, _LARGEST) == 1
    return kept and any(mallopt(_MMAP_THRESHOLD, size) == 1 for size in _SIZES)
