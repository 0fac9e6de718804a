"""Predicts a training step's peak memory from the configuration, tensor by tensor.

Counted are the tensors that are alive at the peak:

    weights, masters, gradients, moments    the flat buffers of `parameters.py`, padding included;
                                            with the gradients, rows of partial sums on a GPU
    activations                             what the layers keep (`kept`), or with recompute: block
                                            only each block's input; what the final norm and the
                                            output keep; each token's id, target, document start
    during a block's backward               its temporary tensors (`workspace`), and with recompute:
                                            block also its recomputed activations
    while the loss is computed              its gradient, and the logits of one chunk
    library                                 cuBLAS's workspace on a GPU, 32 MiB a stream

The peak is the sum of these, with only the larger of "during a block's backward" and "while the
loss is computed". It does not include CUDA's context and the fragmentation of PyTorch's allocator:
compare it with `torch.cuda.max_memory_allocated()`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from mantrans.config import Config, ModelConfig
from mantrans.errors import ConfigError
from mantrans.kernels.reference import wide_dtype
from mantrans.models import build
from mantrans.models.network import Network
from mantrans.parameters import Parameter, numel
from mantrans.runtime import resolve_device, resolve_dtype

CUBLAS_WORKSPACE = 32 << 20
# The share of a GPU's memory that the allocator's blocks and libraries take beside a step: 2% were
# missing at 252 sequences of GPT-2 124M on an H100.
HEADROOM = 0.02
# The share of the memory that a step leaves free which logits may take, to have them in one chunk.
LOGITS_SHARE = 0.25
_PARTIAL_ROWS = 4 * 132  # of an H100; used without a GPU
_TOKEN_BYTES = 8 + 8 + 4  # id, target, document start


@dataclass(frozen=True)
class MemoryPrediction:
    """Bytes at the peak of a training step, by purpose."""

    weights: int
    masters: int
    gradients: int
    moments: int
    activations: int
    backward_workspace: int
    loss_workspace: int
    library: int

    @property
    def total(self) -> int:
        """Bytes at the peak; only the larger of the two workspaces counts."""
        return (
            self.weights
            + self.masters
            + self.gradients
            + self.moments
            + self.activations
            + max(self.backward_workspace, self.loss_workspace)
            + self.library
        )


def predict(
    config: Config,
    dtype: torch.dtype,
    device: torch.device | str,
    chunk_rows: int | None = None,
) -> MemoryPrediction:
    """Return the peak of one micro-batch of `config`; config.model.vocab_size must be set.

    Args:
        config: the run; batch size, sequence length, recompute mode and optimizer come from it.
        dtype: of weights and activations, "auto" resolved.
        device: the run's device.
        chunk_rows: rows of logits at a time; None for the backend's choice.

    Raises:
        ValueError: the vocabulary's size is not known.
    """
    training = config.training
    network = _network(config.model, training.recompute)
    narrow, wide = dtype.itemsize, wide_dtype(dtype).itemsize
    on_gpu = torch.device(device).type == "cuda"
    stored = sum(p.stored_elements for p in network.parameters())
    partials = _partial_sums(network, device) if _by_triton(config, on_gpu) else 0
    tokens = training.batch_size * config.sequence_length
    block = network.blocks[0].kept().bytes(narrow, wide)
    C = config.model.d_model * narrow
    kept = C if training.recompute == "block" else block
    final = network.final_norm.kept().bytes(narrow, wide) + C + _TOKEN_BYTES
    backward = network.blocks[0].workspace() * narrow + block - kept
    loss = network.output.workspace().bytes(narrow, wide)
    has_master = narrow < wide and not training.stochastic_rounding
    return MemoryPrediction(
        weights=stored * narrow,
        masters=stored * wide if has_master else 0,
        gradients=stored * wide + partials,
        moments=2 * stored * wide if training.optimizer == "adamw" else 0,
        activations=tokens * (len(network.blocks) * kept + final),
        backward_workspace=tokens * backward,
        loss_workspace=tokens * loss + _logits_chunk(config, network, dtype, on_gpu, chunk_rows),
        # one for the stream that warms up, one for that of the capture
        library=CUBLAS_WORKSPACE * (1 + training.compile_step) if on_gpu else 0,
    )


def logits_chunk_rows(
    config: Config, dtype: torch.dtype, device: torch.device, free: int
) -> int | None:
    """Return how many rows of logits to have at a time, None for the backend's choice.

    On a GPU one chunk is fastest (it saves 0.8 of 32.8 ms of a GPT-2 124M step on an H100). It is
    chosen if it takes at most LOGITS_SHARE of the `free` bytes that the step leaves otherwise.
    """
    if not _by_triton(config, device.type == "cuda"):
        return None
    rows = config.training.batch_size * config.sequence_length
    small, large = (predict(config, dtype, device, chunk).total for chunk in (None, rows))
    return rows if large - small <= LOGITS_SHARE * (free - small) else None


def parameter_groups(model: ModelConfig) -> dict[str, int]:
    """Return the number of parameters of each kind of layer, without padding."""
    groups: dict[str, int] = {}
    for parameter in _network(model).parameters():
        kind = _kind(parameter)
        groups[kind] = groups.get(kind, 0) + numel(parameter.shape)
    return groups


def _kind(parameter: Parameter) -> str:
    name = parameter.name.split(".")
    kind = name[2] if name[0] == "blocks" else name[0]
    if kind.startswith("norm"):
        return "block norms"
    return "MLP" if kind == "mlp" else kind.replace("_", " ")


def _network(model: ModelConfig, recompute: str = "none") -> Network:
    if model.vocab_size is None:
        raise ValueError("vocab_size: expected the tokenizer's count, got None")
    return build(model, recompute_gelu=recompute == "gelu")


def _by_triton(config: Config, on_gpu: bool) -> bool:
    return on_gpu and config.training.backend in ("auto", "triton")


def _partial_sums(network: Network, device: torch.device | str) -> int:
    """Two buffers of the widest block's vectors: see `parameters.Partials`."""
    from mantrans.kernels.triton import partial_rows

    rows = partial_rows(torch.device(device)) if torch.cuda.is_available() else _PARTIAL_ROWS
    vectors = [p for p in network.blocks[0].parameters() if p.group == "vectors"]
    widest = sum(p.stored_elements for p in (vectors or network.final_norm.parameters()))
    return 2 * rows * widest * 4


def _logits_chunk(
    config: Config, network: Network, dtype: torch.dtype, on_gpu: bool, chunk_rows: int | None
) -> int:
    """Return the bytes of logits in memory at once: see `linear_cross_entropy_*`."""
    padded = network.output.weight.stored_shape[0]
    narrow, wide = dtype.itemsize, wide_dtype(dtype).itemsize
    rows = config.training.batch_size * config.sequence_length
    if _by_triton(config, on_gpu):
        from mantrans.kernels.triton.cross_entropy import chunk_rows_within

        return (chunk_rows or min(rows, chunk_rows_within(rows, padded * narrow))) * padded * narrow
    from mantrans.kernels.native import CHUNK_ROWS, softmax_rows

    # The native backend keeps the chunk's logits and, in the wide dtype, a few rows' softmax.
    size = min(rows, chunk_rows or CHUNK_ROWS)
    return (size * narrow + min(size, softmax_rows(padded)) * wide) * padded


class StepMemory(NamedTuple):
    """A step's memory, and how it computes its logits to stay within it."""

    bytes: int
    chunk_rows: int | None  # rows of logits at a time; None for the backend's choice


def require_memory(
    config: Config, vocab_size: int, chunk_rows: int | Literal["auto"] | None = "auto"
) -> StepMemory:
    """The memory of a step; ConfigError if the device does not have it.

    Without this check the system grants the memory and kills the process when it is used. On a GPU
    the memory must be free now, with HEADROOM of it for what the allocator cannot fill.
    chunk_rows: rows of logits at a time, None for the backend's choice, "auto" to choose by memory.
    """
    device = resolve_device(config.training.device)
    model = config.model.model_copy(update={"vocab_size": vocab_size})
    config = config.model_copy(update={"model": model})
    dtype = resolve_dtype(model.dtype, device)
    if device.type == "cuda":
        ours = torch.cuda.memory_reserved(device)  # by the model, when a resumed run asks again
        present = int((torch.cuda.mem_get_info(device)[0] + ours) / (1 + HEADROOM))
        tokens = 0
    else:
        present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        tokens = config.training.sequences_per_step * (config.sequence_length + 1)
    if chunk_rows == "auto":
        chunk_rows = logits_chunk_rows(config, dtype, device, present)
    needed = predict(config, dtype, device, chunk_rows).total
    needed += 3 * 8 * tokens  # a step's tokens on a CPU: three copies
    if needed > present:
        raise ConfigError(
            f"model, training.batch_size: expected a step that fits into the "
            f"{present / 2**30:,.1f} GiB of {device}, got one of {needed / 2**30:,.1f} GiB"
        )
    return StepMemory(needed, chunk_rows)
