"""Chooses which implementation of the operations a model runs on."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

BACKENDS = ("reference", "native", "triton")


def choose(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> ModuleType:
    """The module whose functions are the operations.

    name: "reference" (the mathematics), "native" (PyTorch's fused primitives), "triton" (our
    kernels; CUDA only, or any device under Triton's interpreter; not float64), or "auto": triton
    where it can run on CUDA, native elsewhere. dtype: the model's.
    Raises ValueError for any other name, or for triton where it cannot run.
    """
    if device.type == "cuda":
        # cuBLAS computes products in their own dtype and sums in float32. An environment variable
        # turns TF32 on in some images.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    if name == "auto":
        name = "triton" if device.type == "cuda" and dtype != torch.float64 else "native"
    if name not in BACKENDS:
        raise ValueError(f"backend: expected auto, {', '.join(BACKENDS)}, got {name!r}")
    if name != "triton":
        return importlib.import_module(f"mantrans.kernels.{name}")
    if dtype == torch.float64:
        raise ValueError("backend: expected native or reference for float64, got triton")
    try:
        module = importlib.import_module(f"mantrans.kernels.{name}")
        from mantrans.kernels.triton.launch import gpu_of
    except ImportError as missing:
        raise ValueError(f"backend: triton needs the package `triton` ({missing})") from missing
    if device.type != "cuda" and gpu_of(device) is None:
        raise ValueError(
            f"backend: expected native or reference on {device.type}, got triton, which needs cuda"
        )
    return module
