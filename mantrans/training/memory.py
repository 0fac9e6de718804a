"""Predicts a training step's peak memory from the configuration, tensor by tensor.

Counted are the tensors that are alive at the peak:

    weights, masters, gradients, moments    the flat buffers of `parameters.py`, padding included;
                                            with the weights, RoPE's angles; with the gradients,
                                            rows of partial sums on a GPU; Muon has one moment of
                                            matrices in blocks
    levels, exchange                        the tree over micro-batches (`gradient_sum`); what a
                                            rank receives of a bucket
    activations                             what the layers keep (`kept`), or with recompute: block
                                            only each block's input; what the final norm and the
                                            output keep; each token's id, target, document start
    during a block's backward               its temporary tensors (`workspace`), and with recompute:
                                            block also its recomputed activations
    while the loss is computed              its gradient, and the logits of one chunk
    library                                 cuBLAS's workspace on a GPU, 32 MiB a stream; on a CPU
                                            the copies that PyTorch's kernels make, and its
                                            libraries (`_on_cpu`, measured)

    during an update                        what Muon makes of a batch of blocks (`optim.muon`);
                                            activations are free by then

The peak is the sum of these, with only the larger of "during a block's backward" and "while the
loss is computed", or what an update takes, if that is more than all activations. Several ranks
divide some of it (`training.shard`): then it is the peak of the rank that has the most. It does not
include NCCL's buffers, CUDA's context and the fragmentation of PyTorch's allocator: compare it with
`torch.cuda.max_memory_allocated()`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from mantrans.config import Config, ModelConfig, TrainingConfig
from mantrans.distributed.shard import PIECES, owned_pieces
from mantrans.errors import ConfigError
from mantrans.kernels.native import QUERY_BLOCK
from mantrans.kernels.reference import wide_dtype
from mantrans.models import build
from mantrans.models.network import Network
from mantrans.optim import muon
from mantrans.parameters import GROUPS, Parameter, layout, numel, two_blocks
from mantrans.runtime import available_memory, resolve_device, resolve_dtype
from mantrans.training.gradient_sum import tree_depth
from mantrans.training.share import micro_batches

CUBLAS_WORKSPACE = 32 << 20
CPU_LIBRARIES = 96 << 20
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
    levels: int
    exchange: int
    moments: int
    activations: int
    backward_workspace: int
    loss_workspace: int
    update_workspace: int
    library: int

    @property
    def state(self) -> int:
        """Bytes that stay between steps."""
        buffers = self.gradients + self.levels + self.exchange
        return self.weights + self.masters + buffers + self.moments

    @property
    def total(self) -> int:
        """Bytes at the peak; only the larger of backward and loss counts, or the update."""
        passes = self.activations + max(self.backward_workspace, self.loss_workspace)
        return self.state + max(passes, self.update_workspace) + self.library


def predict(
    config: Config,
    dtype: torch.dtype,
    device: torch.device | str,
    chunk_rows: int | None = None,
    ranks: int = 1,
) -> MemoryPrediction:
    """Return the peak of one rank's step of `config`; config.model.vocab_size must be set.

    Args:
        config: the run; batch size, sequence length, recompute mode and optimizer come from it.
        dtype: of weights and activations, "auto" resolved.
        device: the run's device.
        chunk_rows: rows of logits at a time; None for the backend's choice.
        ranks: processes of the run.

    Raises:
        ValueError: the vocabulary's size is not known.
        ConfigError: the ranks cannot have equal shares of the step.
    """
    parts, size = micro_batches(config.training, ranks)
    training = config.training.model_copy(update={"batch_size": size})
    config = config.model_copy(update={"training": training})
    network = _network(config.model, training.recompute)
    narrow, wide = dtype.itemsize, wide_dtype(dtype).itemsize
    on_gpu = torch.device(device).type == "cuda"
    state = _state(network, training, ranks)
    constants = 0 if network.angles is None else network.angles.elements() * wide
    partials = _partial_sums(network, device) if _by_triton(config, on_gpu) else 0
    tokens = size * config.sequence_length
    block = network.blocks[0].kept().bytes(narrow, wide)
    C = config.model.d_model * narrow
    kept = C if training.recompute == "block" else block
    final = network.final_norm.kept().bytes(narrow, wide) + C + _TOKEN_BYTES
    backward = network.blocks[0].workspace() * narrow + block - kept
    loss = network.output.workspace().bytes(narrow, wide)
    has_master = narrow < wide and not training.stochastic_rounding
    return MemoryPrediction(
        weights=state.weights * narrow + constants,
        masters=state.owned * wide if has_master else 0,
        gradients=state.gradients * wide + partials,
        levels=state.summed * wide * (tree_depth(parts) if training.gradient_sum == "tree" else 0),
        exchange=state.received * wide,
        moments=(state.owned + state.squared) * wide if training.optimizer != "sgd" else 0,
        activations=tokens * (len(network.blocks) * kept + final),
        backward_workspace=tokens * backward,
        loss_workspace=tokens * loss + _logits_chunk(config, network, dtype, on_gpu, chunk_rows),
        update_workspace=_update_workspace(network, training, dtype, torch.device(device)),
        # one for the stream that warms up, one for that of the capture
        library=CUBLAS_WORKSPACE * (1 + training.compile_step)
        if on_gpu
        else _on_cpu(config, dtype),
    )


class _State(NamedTuple):
    """Elements of a rank's flat buffers."""

    weights: int
    owned: int  # of masters, and of the first moment
    squared: int  # of the second moment
    gradients: int
    summed: int  # of a level of the tree
    received: int


def _state(network: Network, training: TrainingConfig, ranks: int) -> _State:
    """See `Parameters` and `Exchange`."""
    found = layout(network.parameters())
    largest = max(bucket.stop - bucket.start for bucket in found.buckets.values())
    received = largest // 2 if ranks > 1 and ranks & (ranks - 1) == 0 else 0
    every = owned = found.elements
    squared = every
    if training.optimizer == "muon":
        squared -= sum(b.stop - b.start for n, b in found.buckets.items() if n not in GROUPS)
    if training.shard == "none" or ranks == 1:
        return _State(every, every, squared, every, every, received)
    pieces = [owned_pieces(rank, ranks) for rank in range(ranks)]
    most = max(p.stop - p.start for p in pieces)
    owned, squared = every // PIECES * most, squared // PIECES * most
    if training.shard == "optimizer":
        return _State(every, owned, squared, every, every, received)
    in_work = max(place.stop for place in two_blocks(found.buckets).values())
    return _State(every, owned, squared, in_work + owned, owned, received)


def _update_workspace(
    network: Network, training: TrainingConfig, dtype: torch.dtype, device: torch.device
) -> int:
    if training.optimizer != "muon":
        return 0
    parameters = list(network.parameters())
    size = muon.product_dtype(wide_dtype(dtype), device).itemsize
    copies = 0 if device.type == "cuda" else 2  # measured: up to 1.7
    return muon.workspace(parameters, layout(parameters).buckets, copies) * size


def _on_cpu(config: Config, dtype: torch.dtype) -> int:
    """Bytes that a step takes on a CPU beside what the layers count.

    Measured in float32 and bfloat16: copies of width C in the wide dtype, three for each token, and
    six where bfloat16 is converted; with bfloat16 also four blocks of attention scores; and once
    what the libraries of matrix products keep.
    """
    B, T, C = config.training.batch_size, config.sequence_length, config.model.d_model
    narrow, wide = dtype.itemsize, wide_dtype(dtype).itemsize
    copies = (6 if narrow < wide else 3) * B * T * C * wide
    scores = 4 * B * config.model.n_heads * min(T, QUERY_BLOCK) * T * narrow
    windowed = (config.model.attention_window or T) < T
    mask = B * T * T * narrow if windowed or not config.data.attend_across_documents else 0
    return CPU_LIBRARIES + copies + mask + (scores if narrow < wide else 0)


def predict_evaluation(
    config: Config, dtype: torch.dtype, device: torch.device, windows: int, prompts: int
) -> int:
    """Return the bytes of validation's and the samples' largest batch, beside the model's.

    windows: of the validation data, which bound a batch. prompts: that are continued at once.
    """
    model, T = config.model, config.sequence_length
    narrow, wide = dtype.itemsize, wide_dtype(dtype).itemsize
    network = _network(model)
    rows = min(config.evaluation_batch, windows)
    block = network.blocks[0].kept().bytes(narrow, wide) + network.blocks[0].workspace() * narrow
    batch = config.training.model_copy(update={"batch_size": rows})
    logits = _logits_chunk(
        config.model_copy(update={"training": batch}), network, dtype, device.type == "cuda", None
    )
    validation = rows * T * (block + 5 * 8) + logits
    length = min(config.evaluation.max_generation_length, model.max_seq_len)
    cached = 2 * len(network.blocks) * model.key_value_heads * model.head_width * narrow
    padded = network.output.weight.stored_shape[0]
    samples = min(prompts, config.evaluation_batch) * (
        length * (cached + block) + 4 * padded * wide
    )
    return max(validation, samples)


def logits_chunk_rows(
    config: Config, dtype: torch.dtype, device: torch.device, free: int, ranks: int = 1
) -> int | None:
    """Return how many rows of logits to have at a time, None for the backend's choice.

    On a GPU one chunk is fastest (it saves 0.8 of 32.8 ms of a GPT-2 124M step on an H100). It is
    chosen if it takes at most LOGITS_SHARE of the `free` bytes that the step leaves otherwise.
    """
    if not _by_triton(config, device.type == "cuda"):
        return None
    rows = micro_batches(config.training, ranks)[1] * config.sequence_length
    small, large = (predict(config, dtype, device, chunk, ranks).total for chunk in (None, rows))
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
    return build(model, recompute_activation=recompute == "gelu")


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
    config: Config,
    vocab_size: int,
    chunk_rows: int | Literal["auto"] | None = "auto",
    processes: int = 1,
    ranks: int = 1,
) -> StepMemory:
    """The memory of a step; ConfigError if the device does not have it free now.

    Without this check the system grants the memory and kills the process when it is used. On a GPU
    HEADROOM of it is left for what the allocator cannot fill.
    chunk_rows: rows of logits at a time, None for the backend's choice, "auto" to choose by memory.
    processes: that share a CPU's memory, and share the step's tokens; 0: another one has asked.
    ranks: processes of the run, which divide the step and perhaps its state.
    """
    config, dtype, device = _resolved(config, vocab_size)
    present = _present(device)
    # a step's tokens on a CPU: the loader's, the source's, inputs and targets
    tokens = config.training.sequences_per_step * (config.sequence_length + 1)
    tokens *= 5 * 8 if device.type == "cpu" else 0
    if chunk_rows == "auto":
        chunk_rows = logits_chunk_rows(config, dtype, device, present, ranks)
    step = predict(config, dtype, device, chunk_rows, ranks).total
    together = step + tokens if device.type == "cuda" else step * processes + tokens
    if together > present and (processes or device.type == "cuda"):
        of = f" on {processes} processes" if together > step + tokens else ""
        raise ConfigError(
            f"model, training.batch_size: expected a step{of} that fits into the "
            f"{_gib(present)} free of {device}, got one of {_gib(together)}"
        )
    needed = step + tokens
    return StepMemory(needed, chunk_rows)


def require_evaluation_memory(
    config: Config, vocab_size: int, windows: int, ranks: int = 1
) -> None:
    """ConfigError if validating and sampling take more memory than there is.

    windows: in the validation data. What a step takes beside the model is free by then.
    """
    config, dtype, device = _resolved(config, vocab_size)
    prompts = len(config.evaluation.generation_prompts)
    if config.training.eval_batches is not None:
        windows = min(windows, config.training.eval_batches * config.evaluation_batch)
    kept = predict(config, dtype, device, ranks=ranks).state
    needed = kept + predict_evaluation(config, dtype, device, windows, prompts)
    present = _present(device)
    if needed > present:
        raise ConfigError(
            "evaluation.batch_size, evaluation.max_generation_length: expected batches that fit "
            f"into the {_gib(present)} free of {device}, got {_gib(needed)}"
        )


def _resolved(config: Config, vocab_size: int) -> tuple[Config, torch.dtype, torch.device]:
    device = resolve_device(config.training.device)
    model = config.model.model_copy(update={"vocab_size": vocab_size})
    dtype = resolve_dtype(model.dtype, device)
    return config.model_copy(update={"model": model}), dtype, device


def _present(device: torch.device) -> int:
    """Bytes free for a run; what this process already holds on a GPU counts as free."""
    if device.type != "cuda":
        return available_memory()
    ours = torch.cuda.memory_reserved(device)
    return int((torch.cuda.mem_get_info(device)[0] + ours) / (1 + HEADROOM))


def _gib(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB"
