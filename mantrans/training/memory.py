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
    library                                 on a GPU the workspaces of cuBLAS (`blas`), one for each
                                            stream that multiplies matrices: the main one, and those
                                            of graphs; on a CPU the copies that PyTorch's kernels
                                            make, and its libraries (`_on_cpu`, measured)

    during an update                        what Muon makes of a batch of blocks (`optim.muon`);
                                            activations are free by then

A step's peak is the sum of these, with only the larger of "during a block's backward" and "while
the loss is computed", or what an update takes, if that is more than all activations. A captured
step keeps all of it between steps, in the graph's own pool; so the run's peak has more on top, the
largest of

    validation                              a batch
    save_check                              whether weights are finite, and the same on all ranks
    recheck                                 a step outside the graph (`training.recheck_every`)

Samples are drawn at the end, when the graph is gone, and so have all that it had. Where nothing is
captured, validation too comes instead of activations. Several ranks divide some of it
(`training.shard`): then it is the peak of the rank that has the most. It does not include NCCL's
buffers, CUDA's context and the fragmentation of PyTorch's allocator: compare `step` with
`torch.cuda.max_memory_allocated()`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from mantrans import cuda_graph, finite
from mantrans.config import Config, ModelConfig, TrainingConfig
from mantrans.distributed.shard import PIECES, owned_pieces
from mantrans.kernels.native import QUERY_BLOCK
from mantrans.kernels.reference import wide_dtype
from mantrans.models import build
from mantrans.models.network import Network
from mantrans.optim import muon
from mantrans.parameters import GROUPS, Parameter, layout, numel, two_blocks
from mantrans.training import agreement
from mantrans.training.blas import stream_workspace
from mantrans.training.gradient_sum import tree_depth
from mantrans.training.share import micro_batches

CPU_LIBRARIES = 96 << 20
# The share of the memory that a step leaves free which logits may take, to have them in one chunk.
LOGITS_SHARE = 0.25
_PARTIAL_ROWS = 4 * 132  # of an H100; used without a GPU
_TOKEN_BYTES = 8 + 8 + 4  # id, target, document start


@dataclass(frozen=True)
class MemoryPrediction:
    """Bytes at the peak of a run, by purpose: see above."""

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
    validation: int = 0
    save_check: int = 0
    recheck: int = 0
    samples: int = 0

    @property
    def state(self) -> int:
        """Bytes that stay between steps."""
        buffers = self.gradients + self.levels + self.exchange
        return self.weights + self.masters + buffers + self.moments

    @property
    def step(self) -> int:
        """Bytes at the peak of a step, which is in its passes or in its update."""
        return self.state + max(self.passes, self.update_workspace) + self.library

    @property
    def passes(self) -> int:
        """Bytes of forward and backward; only the larger of the two workspaces counts."""
        return self.activations + max(self.backward_workspace, self.loss_workspace)

    @property
    def beside(self) -> int:
        """Bytes that are needed while a captured step keeps its own."""
        return max(self.validation, self.save_check, self.recheck)

    @property
    def trained(self) -> int:
        """Bytes at the peak until the last step."""
        return self.step + self.beside

    @property
    def total(self) -> int:
        """Bytes at the peak of the run."""
        return max(self.trained, self.state + self.library + self.samples)

    def by_kind(self) -> dict[str, int]:
        """Their sum is the total."""
        kinds = {
            "weights": self.weights,
            "masters": self.masters,
            "moments": self.moments,
            "gradients": self.gradients + self.levels + self.exchange,
            "activations": self.activations,
        }
        return {**kinds, "workspaces": self.total - sum(kinds.values())}


def predict(
    config: Config,
    dtype: torch.dtype,
    device: torch.device | str,
    chunk_rows: int | None = None,
    ranks: int = 1,
    windows: int | None = None,
) -> MemoryPrediction:
    """Return the peak of one rank's run of `config`; config.model.vocab_size must be set.

    Args:
        config: the run; batch size, sequence length, recompute mode and optimizer come from it.
        dtype: of weights and activations, "auto" resolved.
        device: the run's device.
        chunk_rows: rows of logits at a time; None for the backend's choice.
        ranks: processes of the run.
        windows: of the validation data, which bound a batch; None for enough to fill one.

    Raises:
        ValueError: the vocabulary's size is not known.
        ConfigError: the ranks cannot have equal shares of the step.
    """
    parts, size = micro_batches(config.training, ranks)
    whole = config
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
    predicted = MemoryPrediction(
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
        library=gpu_libraries(device, training.compile_step) if on_gpu else _on_cpu(config, dtype),
    )
    if not (on_gpu and training.compile_step):
        return predicted
    return replace(
        predicted,
        validation=predict_validation(whole, dtype, device, windows),
        save_check=max(finite.WORKSPACE, agreement.WORKSPACE if ranks > 1 else 0),
        recheck=predicted.passes if training.recheck_every else 0,
        samples=predict_samples(whole, dtype),
    )


def gpu_libraries(device: torch.device | str, captured: bool) -> int:
    """Bytes of cuBLAS and cuBLASLt. The streams of copies and of the ranks' exchange multiply no
    matrices. captured: whether there are graphs."""
    return sum(stream_workspace(device)) * (1 + cuda_graph.STREAMS * captured)


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


def predict_validation(
    config: Config, dtype: torch.dtype, device: torch.device | str, windows: int | None
) -> int:
    """Return the bytes of a batch of validation, beside the model's. windows: see `predict`.

    The logits follow when the blocks' tensors are gone; the CPU's own copies are taken as both.
    """
    network, narrow = _network(config.model), dtype.itemsize
    rows = config.evaluation_batch if windows is None else min(config.evaluation_batch, windows)
    batch = config.training.model_copy(update={"batch_size": rows})
    sized = config.model_copy(update={"training": batch})
    on_gpu = torch.device(device).type == "cuda"
    tokens, C = rows * config.sequence_length, config.model.d_model * narrow
    logits = tokens * C + _logits_chunk(sized, network, dtype, on_gpu, None)
    if not _by_triton(config, on_gpu):
        return tokens * (_block_bytes(network, dtype) + 5 * 8) + logits
    kept = network.blocks[0].kept().bytes(narrow, wide_dtype(dtype).itemsize)
    return tokens * 5 * 8 + max(tokens * (kept + 3 * C), logits)  # input, branch and output


def predict_samples(config: Config, dtype: torch.dtype, prompts: int | None = None) -> int:
    """Return the bytes of a batch of samples, beside the model's. prompts: continued at once;
    None for those of the last report."""
    if prompts is None:
        prompts = len(config.evaluation.generation_prompts)
        if config.evaluation.evaluate_coherence:
            prompts = max(prompts, config.evaluation.coherence_samples)
    model, network = config.model, _network(config.model)
    narrow, wide = dtype.itemsize, wide_dtype(dtype).itemsize
    length = min(config.evaluation.max_generation_length, model.max_seq_len)
    cached = 2 * len(network.blocks) * model.key_value_heads * model.head_width * narrow
    padded = network.output.weight.stored_shape[0]
    drawn = padded * (4 * wide + (9 * 8 if config.evaluation.top_p is not None else 0))
    rows = min(prompts, config.evaluation_batch)
    return rows * (length * (cached + _block_bytes(network, dtype)) + drawn)


def predict_evaluation(
    config: Config, dtype: torch.dtype, device: torch.device, windows: int, prompts: int | None
) -> int:
    """Return the larger of the two."""
    validation = predict_validation(config, dtype, device, windows)
    return max(validation, predict_samples(config, dtype, prompts))


def _block_bytes(network: Network, dtype: torch.dtype) -> int:
    """Of a token, while a block's forward runs and nothing is kept after it."""
    narrow, wide = dtype.itemsize, wide_dtype(dtype).itemsize
    block = network.blocks[0]
    return block.kept().bytes(narrow, wide) + block.workspace() * narrow


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
