"""Refuses a run that its device has no memory for, with both numbers, before anything is allocated.

Without this the system grants the memory and kills the process when it is used, or a GPU runs out
of it hours later.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from mantrans.config import Config
from mantrans.errors import ConfigError
from mantrans.runtime import available_memory, resolve_device, resolve_dtype
from mantrans.training import memory

# The share of a GPU's memory that the allocator's blocks and libraries take beside a step: 2% were
# missing at 252 sequences of GPT-2 124M on an H100.
HEADROOM = 0.02


class StepMemory(NamedTuple):
    """A step's memory, and how it computes its logits to stay within it."""

    bytes: int
    chunk_rows: int | None  # rows of logits at a time; None for the backend's choice
    free: int  # bytes, before anything was allocated


def require_memory(
    config: Config,
    vocab_size: int,
    chunk_rows: int | Literal["auto"] | None = "auto",
    processes: int = 1,
    ranks: int = 1,
) -> StepMemory:
    """The memory of a step; ConfigError if the device does not have it free now.

    On a GPU HEADROOM of it is left for what the allocator cannot fill.
    chunk_rows: rows of logits at a time, None for the backend's choice, "auto" to choose by memory.
    processes: that share a CPU's memory, and share the step's tokens; 0: another one has asked.
    ranks: processes of the run, which divide the step and perhaps its state.
    """
    config, dtype, device = _resolved(config, vocab_size)
    present = free_memory(device)
    # a step's tokens on a CPU: the loader's, the source's, inputs and targets
    tokens = config.training.sequences_per_step * (config.sequence_length + 1)
    tokens *= 5 * 8 if device.type == "cpu" else 0
    if chunk_rows == "auto":
        chunk_rows = memory.logits_chunk_rows(config, dtype, device, present, ranks)
    # what validation takes is asked when its data is known
    run = memory.predict(config, dtype, device, chunk_rows, ranks, windows=0)
    step = run.step
    together = step + tokens if device.type == "cuda" else step * processes + tokens
    if together > present and (processes or device.type == "cuda"):
        of = f" on {processes} processes" if together > step + tokens else ""
        raise ConfigError(
            f"model, training.batch_size: expected a step{of} that fits into the "
            f"{_gib(present)} free of {device}, got one of {_gib(together)}"
        )
    _require_beside(run, present, device)
    return StepMemory(run.trained + tokens, chunk_rows, present)


def require_evaluation_memory(
    config: Config,
    vocab_size: int,
    windows: int,
    ranks: int = 1,
    chunk_rows: int | None = None,
) -> memory.MemoryPrediction:
    """The memory of the run; ConfigError if validating and sampling take more than there is.

    windows: in the validation data. What a step takes beside the model is free by then, unless it
    is captured and it is validated between steps. chunk_rows: see `require_memory`.
    """
    config, dtype, device = _resolved(config, vocab_size)
    if config.training.eval_batches is not None:
        windows = min(windows, config.training.eval_batches * config.evaluation_batch)
    run = memory.predict(config, dtype, device, chunk_rows, ranks, windows)
    present = free_memory(device)
    _require_beside(run, present, device)
    needed = run.state + _largest_batch(config, dtype, device, windows)
    if needed > present:
        raise ConfigError(
            "evaluation.batch_size, evaluation.max_generation_length: expected batches that fit "
            f"into the {_gib(present)} free of {device}, got {_gib(needed)}"
        )
    return run


def _require_beside(run: memory.MemoryPrediction, present: int, device: torch.device) -> None:
    """Name the field that the largest part depends on, of what a captured step leaves no room."""
    if not run.beside or run.trained <= present:
        return
    field = {
        run.validation: "evaluation.batch_size: expected validation",
        run.recheck: "training.recheck_every: expected null, or a second computation",
    }.get(run.beside, "training.batch_size: expected the check of a save")
    raise ConfigError(
        f"{field} that fits beside the captured step into the {_gib(present)} free of {device}, "
        f"got {_gib(run.beside)} beside {_gib(run.step)}"
    )


def _largest_batch(config: Config, dtype: torch.dtype, device: torch.device, windows: int) -> int:
    """Bytes beside the model's of the last validation and the samples, when no graph is left."""
    batch = memory.predict_evaluation(config, dtype, device, windows, None)
    return batch + (memory.gpu_libraries(device, True) if device.type == "cuda" else 0)


def shown(predicted: memory.MemoryPrediction, free: int) -> str:
    """By kind, in one line, and what was free of the device before: bytes."""
    parts = [f"{kind} {_size(count)}" for kind, count in predicted.by_kind().items() if count]
    return f"{', '.join(parts)}; {_size(predicted.total)} of {_size(free)} free"


def _size(count: int) -> str:
    """At most four digits and a unit."""
    return f"{count / 2**20:.1f} MiB" if count < 2**30 else _gib(count)


def _resolved(config: Config, vocab_size: int) -> tuple[Config, torch.dtype, torch.device]:
    device = resolve_device(config.training.device)
    model = config.model.model_copy(update={"vocab_size": vocab_size})
    dtype = resolve_dtype(model.dtype, device)
    return config.model_copy(update={"model": model}), dtype, device


def free_memory(device: torch.device) -> int:
    """Bytes free for a run; what this process already holds on a GPU counts as free."""
    if device.type != "cuda":
        return available_memory()
    ours = torch.cuda.memory_reserved(device)
    return int((torch.cuda.mem_get_info(device)[0] + ours) / (1 + HEADROOM))


def _gib(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB"
