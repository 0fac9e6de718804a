"""Where a figure was measured: the device, the versions of what computed it, the commit."""

from __future__ import annotations

import platform
import re
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

# What a CPU's last cache holds where the system does not tell.
USUAL_CPU_CACHE = 32 << 20


@cache
def device() -> torch.device:
    """The GPU if there is one, else the CPU: what every benchmark runs on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def on_gpu() -> bool:
    """Whether the benchmarks run on a GPU."""
    return device().type == "cuda"


@cache
def device_name() -> str:
    """The device as its driver names it; a CPU with the number of threads that PyTorch uses."""
    if on_gpu():
        return torch.cuda.get_device_name()
    return f"{_cpu_model()}, {torch.get_num_threads()} threads"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def slug(name: str) -> str:
    """A name that a folder can have: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@cache
def versions() -> dict[str, str | None]:
    """torch, triton, the ptxas that Triton calls, the driver, CUDA, Python; None: not there."""
    found: dict[str, str | None] = {
        "torch": torch.__version__,
        "triton": _package("triton"),
        "ptxas": _ptxas(),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }
    return found | {name: _package(name) for name in ("transformers", "liger-kernel")}


@cache
def commit() -> str | None:
    """The commit that is measured, "+changes" where code differs from it; None outside git.

    Results and the pages written from them do not count: measuring changes them.
    """
    root = Path(__file__).parents[1]
    paths = ["--", ".", ":!benchmarks/results", ":!docs"]
    try:
        head = _git(root, "rev-parse", "HEAD")
        return head + "+changes" * bool(_git(root, "diff", "--name-only", "HEAD", *paths))
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    return result.stdout.strip()


@cache
def cache_bytes() -> int:
    """The last level of cache: inputs larger than it must come from memory."""
    if on_gpu():
        return torch.cuda.get_device_properties(device()).L2_cache_size
    try:
        size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text(encoding="ascii")
        return int(size.strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        return USUAL_CPU_CACHE


@cache
def has_native_bfloat16() -> bool:
    """Whether the device multiplies bfloat16 itself: without that it is not worth training in."""
    if on_gpu():
        return torch.cuda.get_device_capability() >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _package(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _ptxas() -> str | None:
    if not on_gpu():
        return None
    try:
        import triton

        path = triton.knobs.nvidia.ptxas.path
    except (ImportError, AttributeError, RuntimeError):
        return None
    return _first_match(r"V([\d.]+)", [path, "--version"])


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return _first_match(r"[\d.]+", query) if on_gpu() else None


def _first_match(pattern: str, command: list[str]) -> str | None:
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(pattern, text)
    return found and (found.group(1) if found.groups() else found.group())
