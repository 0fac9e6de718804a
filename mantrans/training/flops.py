"""How much arithmetic a token costs, and which share of the machine's best that is (MFU).

Model FLOPs utilisation as Chowdhery et al. 2022 (PaLM, appendix B) define it: the operations that
the mathematics of forward and backward needs, per second, over the peak of the device. What a
program computes a second time to save memory is not counted.

Counted, a multiplication and an addition being two operations:

    matrix products with weights    2 per weight and token: QKV 3C², projection C², MLP 2·C·F in
                                    each block, and the output projection V·C (the padded rows of
                                    the vocabulary not, the embedding's look-up not)
    attention                       scores QKᵀ and their product with V: 2·2·C for each key a query
                                    sees, causal: (T + 1) / 2 of them on average
    backward                        twice the forward: every product has two gradients

Not counted: norms, GELU, softmax, loss, optimizer; well under 2% at the sizes here. PaLM's formula,
6N + 12·L·H·Q·T, counts all T keys: ours is the lower figure.
"""

from __future__ import annotations

import re

import torch

from mantrans.config import ModelConfig

# Dense peaks in TFLOP/s: bfloat16 with float32 sums, and plain float32. From NVIDIA's data sheets
# and architecture whitepapers (GA100, GA102, GH100, AD102, Blackwell), which quote figures with
# sparsity for some: those are halved here. Names as the driver reports them. A part of a GPU (MIG),
# a laptop's, or any name not matched whole has another peak and is unknown.
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


def weights_in_products(model: ModelConfig, vocab_size: int | None = None) -> int:
    """Return how many weights each token is multiplied with: all matrices but the look-up tables.

    Raises:
        ValueError: the vocabulary's size is neither given nor in the model's configuration.
    """
    vocabulary = model.vocab_size if vocab_size is None else vocab_size
    if vocabulary is None:
        raise ValueError("vocab_size: found None; accepted: the tokenizer's count")
    width, inner = model.d_model, model.feed_forward_width
    block = 4 * width * width + 2 * width * inner
    return model.n_blocks * block + vocabulary * width


def flops_per_token(
    model: ModelConfig,
    sequence_length: int | None = None,
    vocab_size: int | None = None,
) -> float:
    """Return the operations of forward and backward for one token (see the module's text).

    Args:
        model: the network's shape.
        sequence_length: tokens T in one training sequence; model.max_seq_len if None.
        vocab_size: token ids V; model.vocab_size if None.

    Raises:
        ValueError: the vocabulary's size is not known.
    """
    length = model.max_seq_len if sequence_length is None else sequence_length
    forward = 2.0 * weights_in_products(model, vocab_size)
    forward += model.n_blocks * 4 * model.d_model * (length + 1) / 2
    return 3 * forward


def peak_flops(
    device: torch.device | str, dtype: torch.dtype, *, name: str | None = None
) -> float | None:
    """Return the device's peak in operations per second, or None where it is not known.

    Args:
        device: where the run computes. A CPU's peak is not known.
        dtype: of the matrix products' inputs.
        name: the GPU's name as the driver reports it; asked of the driver if None.
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
    """Return the share of `peak` that the model's arithmetic comes to; None if it is unknown."""
    if peak is None:
        return None
    return tokens_per_second * per_token / peak
