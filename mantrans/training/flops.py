"""The operations per token, and the share of the device's peak that they use (MFU).

Model FLOPs utilization as defined by Chowdhery et al. 2022 (PaLM, appendix B): the operations per
second that the mathematics of forward and backward needs, divided by the device's peak.
Recomputation to save memory is not counted. Muon's matrix products are: an update's operations,
divided by the step's tokens.

`Network.flops_per_token` says what is counted. PaLM's formula, 6N + 12·L·H·Q·T, counts all T keys
of a query; we count only the keys that it sees, so our figures are lower.
"""

from __future__ import annotations

import re

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


def peak_flops(
    device: torch.device | str, dtype: torch.dtype, *, name: str | None = None
) -> float | None:
    """Return the device's peak in operations per second, or None if it is not known.

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


def mfu(tokens_per_second: float, per_token: float, peak: float | None) -> float | None:
    """Return the model's operations per second as a share of `peak`; None without a peak."""
    if peak is None:
        return None
    return tokens_per_second * per_token / peak
