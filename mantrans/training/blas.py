"""The memory that PyTorch gives to cuBLAS and cuBLASLt for each stream that multiplies matrices.

From PyTorch's source (aten/src/ATen/cuda/CublasHandlePool.cpp, 2.11 and 2.14; compared with the
compiled libraries), which newer versions can be asked for:

    cuBLAS      32 MiB on compute capability 9.0 and newer (2.11: on 9.0 alone, so that a newer GPU
                gets less than is said here), else 8.125 MiB; CUBLAS_WORKSPACE_CONFIG
    cuBLASLt    1 MiB, at most cuBLAS's; CUBLASLT_WORKSPACE_SIZE. Nothing where both share theirs:
                TORCH_CUBLASLT_UNIFIED_WORKSPACE, the default of versions that can be asked
    on ROCm     32 MiB, on gfx94x and gfx95x 128 MiB; hipBLASLt 76 MiB
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

import torch

_KIB, _MIB = 1 << 10, 1 << 20


class Blas(NamedTuple):
    """cublas, cublaslt: bytes of a stream."""

    cublas: int
    cublaslt: int


def stream_workspace(device: torch.device | str) -> Blas:
    """Of a stream on this GPU, the current one; on an H100 where there is none."""
    unified = {"0": False, "1": True}.get(os.environ.get("TORCH_CUBLASLT_UNIFIED_WORKSPACE", ""))
    here = torch.cuda.is_available()
    if here and hasattr(torch._C, "_cuda_getCublasWorkspaceSize"):
        cublas = torch.backends.cuda.cublas_workspace_size()
        lt = torch.backends.cuda.cublaslt_workspace_size()
        return Blas(cublas, lt if unified is False or torch.version.hip else 0)
    if here and torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName
        large = name.startswith(("gfx94", "gfx95"))
        return Blas(_configured((128 if large else 32) * _MIB), _lt_configured(76 * _MIB))
    capability = torch.cuda.get_device_capability(device) if here else (9, 0)
    cublas = _configured(by_capability(capability))
    lt = _lt_configured(1 * _MIB)
    return Blas(cublas, 0 if unified else lt if unified is False else min(lt, cublas))


def by_capability(capability: tuple[int, int]) -> int:
    """PyTorch's choice of cuBLAS's bytes: 32 MiB, or the setting :4096:2:16:8."""
    return 32 * _MIB if capability >= (9, 0) else (4096 * 2 + 16 * 8) * _KIB


def _configured(default: int) -> int:
    """CUBLAS_WORKSPACE_CONFIG is pairs :SIZE:COUNT, in KiB; what is none of this is ignored."""
    pairs = re.findall(r":([0-9]+):([0-9]+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    return sum(int(size) * int(count) * _KIB for size, count in pairs) if pairs else default


def _lt_configured(default: int) -> int:
    """CUBLASLT_WORKSPACE_SIZE is in KiB."""
    found = re.match(r"\s*\+?([0-9]+)", os.environ.get("CUBLASLT_WORKSPACE_SIZE", ""))
    return int(found[1]) * _KIB if found else default
