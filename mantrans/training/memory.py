"""Predicts a training step's peak memory from the configuration, tensor by tensor.

Counted are the tensors that are alive at the peak, in bytes, with s bytes per element of the
model's dtype and w per element of the wide one (float32, or float64 for a float64 model):

    weights, masters, gradients, moments    the flat buffers of `parameters.py`, padding included
    kept by one block, per token            norm 1: C; attention: input C, QKV 3C, output C;
                                            norm 2: C; MLP: input C, product F, GELU's output F
                                            (all times s); two means, two roots, H sums (times w).
                                            gelu: without GELU's output. block: the first C only
    kept besides, per token                 final norm: input C and output C (s), mean, root (w);
                                            token and target ids, 8 each; document start, 4
    while a block goes backward, per token  the MLP's gradients 2F and 2C, or attention's 8C (s);
                                            for recompute: what the block did not keep
    while the loss is computed              its gradient C per token (s) and the logits of one chunk
    library                                 cuBLAS's workspace on a GPU, 32 MiB a stream

The peak is the buffers and all that is kept, the library's workspace, and the larger of the two
lines before it. CUDA's own context and the fragmentation of PyTorch's allocator are not in it; the
counter to compare it with is `torch.cuda.max_memory_allocated()`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mantrans.config import Config, ModelConfig
from mantrans.models.transformer import parameter_specs
from mantrans.parameters import ALIGNMENT, numel

CUBLAS_WORKSPACE = 32 << 20
_BYTES = {torch.float32: 4, torch.bfloat16: 2, torch.float64: 8}


@dataclass(frozen=True)
class MemoryPrediction:
    """Bytes at the peak of a training step, by what they are for."""

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
        """Bytes at the peak: of the two workspaces only the larger is alive then."""
        return (
            self.weights
            + self.masters
            + self.gradients
            + self.moments
            + self.activations
            + max(self.backward_workspace, self.loss_workspace)
            + self.library
        )


def predict(config: Config, dtype: torch.dtype, device: torch.device | str) -> MemoryPrediction:
    """Return the peak of one micro-batch of `config`; config.model.vocab_size must be set.

    Args:
        config: the run; batch size, sequence length, recompute mode and optimizer come from it.
        dtype: of weights and activations, "auto" resolved.
        device: where it runs.

    Raises:
        ValueError: the vocabulary's size is not known.
    """
    model, training = config.model, config.training
    narrow, wide = _BYTES[dtype], 8 if dtype == torch.float64 else 4
    stored = stored_elements(model)
    has_master = narrow < wide and not training.stochastic_rounding
    tokens = training.batch_size * config.sequence_length
    block_full = _kept_by_block(model, "none", narrow, wide)
    block_kept = _kept_by_block(model, training.recompute, narrow, wide)
    width, inner = model.d_model, model.feed_forward_width
    final = 2 * width * narrow + 2 * wide + 8 + 8 + 4
    backward = max(2 * inner + 2 * width, 8 * width) * narrow + (block_full - block_kept)
    loss = width * narrow + wide
    on_gpu = torch.device(device).type == "cuda"
    return MemoryPrediction(
        weights=stored * narrow,
        masters=stored * wide if has_master else 0,
        gradients=stored * wide,
        moments=2 * stored * wide if training.optimizer == "adamw" else 0,
        activations=tokens * (model.n_blocks * block_kept + final),
        backward_workspace=tokens * backward,
        loss_workspace=tokens * loss + _logits_chunk(config, narrow, wide, on_gpu),
        # one for the stream that warms up, one for that of the capture
        library=CUBLAS_WORKSPACE * (1 + training.compile_step) if on_gpu else 0,
    )


def parameter_groups(model: ModelConfig) -> dict[str, int]:
    """Return the parameters of each group, padding not counted; they sum to the model's count."""
    groups: dict[str, int] = {}
    for spec in _specs(model):
        name = spec.name.split(".")
        group = name[2] if name[0] == "blocks" else name[0]
        group = {"norm_1": "block norms", "norm_2": "block norms", "mlp": "MLP"}.get(group, group)
        groups[group.replace("_", " ")] = groups.get(group.replace("_", " "), 0) + numel(spec.shape)
    return groups


def stored_elements(model: ModelConfig) -> int:
    """Return the elements of one flat buffer: padded tables, each parameter on its own line."""
    return sum(-(-numel(spec.stored_shape) // ALIGNMENT) * ALIGNMENT for spec in _specs(model))


def _specs(model: ModelConfig) -> list:
    if model.vocab_size is None:
        raise ValueError("vocab_size: found None; accepted: the tokenizer's count")
    return parameter_specs(model)


def _kept_by_block(model: ModelConfig, recompute: str, narrow: int, wide: int) -> int:
    """Return the bytes one block keeps of one token for its backward."""
    width, inner = model.d_model, model.feed_forward_width
    if recompute == "block":
        return width * narrow
    inner_kept = 1 if recompute == "gelu" else 2
    return (8 * width + inner_kept * inner) * narrow + (4 + model.n_heads) * wide


def _logits_chunk(config: Config, narrow: int, wide: int, on_gpu: bool) -> int:
    """Return the bytes of logits that are alive at once: see `linear_cross_entropy_*`."""
    assert config.model.vocab_size is not None
    padded = -(-config.model.vocab_size // 128) * 128
    rows = config.training.batch_size * config.sequence_length
    if on_gpu and config.training.backend in ("auto", "triton"):
        from mantrans.kernels.triton.cross_entropy import row_chunks

        chunk = next(iter(row_chunks(rows, padded * narrow)))
        return (chunk.stop - chunk.start) * padded * narrow
    from mantrans.kernels.native import CHUNK_ROWS, softmax_rows

    # The native backend keeps the chunk's logits and, in the wide dtype, a few rows' softmax.
    softmax = min(rows, CHUNK_ROWS, softmax_rows(padded))
    return (min(rows, CHUNK_ROWS) * narrow + softmax * wide) * padded
