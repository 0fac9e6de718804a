"""The operations per token, and the share of the device's peak that they use.

A step cannot take less time than its products at the peak, and nothing else: that time as a share
of a step's is what is logged. The peak is the table's, and where a device is not in it, measured.

With the table's it is also the model FLOPs utilization (MFU) as defined by Chowdhery et al. 2022
(PaLM, appendix B): the operations per second that the mathematics of forward and backward needs,
divided by the device's peak. Recomputation to save memory is not counted; the products of Muon's
update are, divided by the step's tokens.

`Network.flops_per_token` says what is counted. PaLM's formula, 6N + 12·L·H·Q·T, counts all T keys
of a query; we count only the keys that it sees, so our figures are lower.
"""

from __future__ import annotations

import re
import time
from typing import NamedTuple

import torch

from mantrans.config import ModelConfig
from mantrans.models import build
from mantrans.optim import muon

# Dense peaks in TFLOP/s: bfloat16 with float32 sums, and plain float32. From NVIDIA's data sheets
# and architecture whitepapers (GA100, GA102, GH100, AD102, Blackwell); figures with sparsity are
# halved. Names as the driver reports them. A name that does not match as a whole, such as a part of
# a GPU (MIG) or a laptop GPU, has another peak, which is not known.
_PEAKS: tuple[tuple[str, float, float], ...] = (
    (r"NVIDIA B200", 2250.0, 75.0),
    (r"NVIDIA GH200 \d+GB", 989.4, 66.9),
    (r"NVIDIA H200", 989.4, 66.9),
    (r"NVIDIA H200 NVL", 835.5, 60.0),
    (r"NVIDIA H100 80GB HBM3", 989.4, 66.9),
    (r"NVIDIA H100 PCIe", 756.0, 51.2),
    (r"NVIDIA H100 NVL", 835.5, 60.0),
    (r"NVIDIA A100-(?:SXM4|PCIE)-\d+GB", 312.0, 19.5),
    (r"NVIDIA A100 80GB PCIe", 312.0, 19.5),
    (r"NVIDIA A40", 149.7, 37.4),
    (r"NVIDIA A10", 125.0, 31.2),
    (r"NVIDIA L40S", 362.0, 91.6),
    (r"NVIDIA L4", 121.0, 30.3),
    (r"NVIDIA RTX A6000", 154.8, 38.7),
    (r"NVIDIA RTX 6000 Ada Generation", 364.2, 91.1),
    (r"NVIDIA GeForce RTX 3090", 71.0, 35.6),
    (r"NVIDIA GeForce RTX 4090", 165.2, 82.6),
    (r"NVIDIA GeForce RTX 5090", 209.5, 104.8),
)


def flops_per_token(model: ModelConfig, sequence_length: int | None = None) -> float:
    """Return the operations of forward and backward for one token.

    Args:
        model: the network's shape; vocab_size must be set.
        sequence_length: tokens T in one training sequence; model.max_seq_len if None.
    """
    return build(model).flops_per_token(sequence_length or model.max_seq_len)


def update_flops(model: ModelConfig, optimizer: str) -> int:
    """Return the operations of an update's matrix products, which only Muon has.

    Args:
        model: the network's shape; vocab_size must be set.
        optimizer: as training.optimizer.
    """
    return muon.update_flops(list(build(model).parameters())) if optimizer == "muon" else 0


class Peak(NamedTuple):
    """flops: operations per second. is_listed: in the table, otherwise measured."""

    flops: float
    is_listed: bool


def peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """Return the peak of a run's device, for products of `dtype`."""
    listed = peak_flops(device, dtype)
    return Peak(product_peak(device, dtype), False) if listed is None else Peak(listed, True)


def peak_flops(
    device: torch.device | str, dtype: torch.dtype, *, name: str | None = None
) -> float | None:
    """Return the device's listed peak in operations per second, or None if it is not known.

    Args:
        device: the run's device. A CPU's peak is not known.
        dtype: of the matrix products' inputs.
        name: the GPU's name as the driver reports it; None to ask the driver.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return None
    if name is None:
        name = torch.cuda.get_device_name(device)
    for pattern, bfloat16, float32 in _PEAKS:
        if re.fullmatch(pattern, name):
            if dtype == torch.bfloat16:
                return bfloat16 * 1e12
            if dtype == torch.float32:
                return float32 * 1e12
    return None


# Smallest and largest size of a product, and the seconds that products are tried.
_SIZES = {"cpu": (256, 2048), "cuda": (1024, 8192)}
_SECONDS = 0.1


def product_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations per second of a square matrix product, measured in under 0.3 s.

    On a CPU with all threads of PyTorch, and with one: where others compute, many may be slower.
    """
    threads = torch.get_num_threads()
    found = [_fastest_product(device, dtype)]
    if device.type == "cpu" and threads > 1:
        torch.set_num_threads(1)
        found.append(_fastest_product(device, dtype))
        torch.set_num_threads(threads)
    return max(found)


def _fastest_product(device: torch.device, dtype: torch.dtype) -> float:
    """The best of all sizes that fit into _SECONDS, in turn."""
    smallest, largest = _SIZES[device.type]
    operands: dict[int, torch.Tensor] = {}
    generator = torch.Generator(device)  # of its own: the user's is not touched
    size, fastest, begin = smallest, 0.0, time.perf_counter()
    while True:
        if size not in operands:
            shape = (size, size)
            operands[size] = torch.rand(shape, generator=generator, dtype=dtype, device=device)
            _seconds_of_product(operands[size])  # libraries are loaded, kernels chosen
        seconds = _seconds_of_product(operands[size])
        fastest = max(fastest, 2 * size**3 / seconds)
        left = begin + _SECONDS - time.perf_counter()
        if left <= 0:
            return fastest
        size = 2 * size if size < largest and 16 * seconds < left else smallest


def _seconds_of_product(a: torch.Tensor) -> float:
    """On a CPU those in which this thread computes, not those in which it waits for others."""
    clock = time.perf_counter if a.is_cuda else time.thread_time
    begin = clock()
    torch.mm(a, a)
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    return clock() - begin


def share_of_peak(tokens_per_second: float, per_token: float, peak: float) -> float:
    """Return the least time of the model's operations as a share of the time that they took."""
    return tokens_per_second * per_token / peak
