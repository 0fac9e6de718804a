"""What a run on a GPU launches until its first step, as programs that need no GPU: the self-check,
the step, and the batch of validation that is tried once the step was captured (`rehearsal`).

Run on CPU tensors without values (`ShapesOnly`), they launch what the run will: `compiling` has
the kernels compiled by that, and the gate (tools/gate) looks at the launches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mantrans.config import Config
from mantrans.kernels import selfcheck
from mantrans.kernels.operations import Draw, Shapes
from mantrans.optim.guards import OutlierGuard
from mantrans.training.building import build_wrapper
from mantrans.training.kernel_check import programs_of
from mantrans.training.step import TrainStep

CPU = torch.device("cpu")


class Program(NamedTuple):
    """Something whose launches are of interest."""

    name: str
    run: Callable[[], object]


class Tokens:
    """A source of tokens without any; see `mantrans.training.batches.TokenSource`."""

    def __init__(self, sequences: int, length: int) -> None:
        self.tokens = torch.empty(sequences, length + 1, dtype=torch.int64)

    def load(self, step: int) -> None:
        pass

    def rows(self) -> Tensor:
        return self.tokens


def programs(
    config: Config,
    vocab_size: int,
    dtype: torch.dtype,
    *,
    checks: bool = True,
    chunk_rows: int | None = None,
) -> Iterator[Program]:
    """The self-check's programs, unless not `checks`, step and validation, in a run's order.

    vocab_size: the entries of the tokenizer. dtype: of the weights. chunk_rows: of the logits.
    """
    config, model = on_cpu(config, dtype), config.model
    if checks:
        shapes = selfcheck.run_shapes(
            model.d_model,
            model.n_heads,
            model.feed_forward_width,
            vocab_size,
            config.sequence_length,
            model.n_kv_heads,
            model.head_dim,
        )
        yield from of_selfcheck(shapes, dtype, programs_of(config))
    yield Program("step, validation", lambda: step_of(config, vocab_size, chunk_rows))


def on_cpu(config: Config, dtype: torch.dtype) -> Config:
    """The same run with the tensors of a GPU's kernels on the CPU."""
    model = {"dtype": str(dtype).removeprefix("torch.")}
    training = {"device": "cpu", "backend": "triton"}
    return config.model_copy(
        update={
            "model": config.model.model_copy(update=model),
            "training": config.training.model_copy(update=training),
        }
    )


def of_selfcheck(
    shapes: Shapes, dtype: torch.dtype, programs: Sequence[Any] = selfcheck.PROGRAMS
) -> Iterator[Program]:
    """The self-check's programs, or some of them."""
    for draw, program in programs:
        function = getattr(program, "func", program)  # of a functools.partial
        name = f"{function.__name__} {str(dtype).removeprefix('torch.')} {shapes}"
        yield Program(name, bound(program, draw, shapes, dtype))


def bound(
    program: selfcheck.Program, draw: Callable[..., Any], shapes: Shapes, dtype: torch.dtype
) -> Callable[[], object]:
    """One of the self-check's programs with its inputs."""
    from mantrans.kernels import triton as ops

    return lambda: program(ops, draw(shapes, Draw(dtype, CPU)))


def step_of(config: Config, vocab_size: int, chunk_rows: int | None = None) -> None:
    """A training step and a batch of validation. Micro-batches after the second would only repeat
    the second's launches."""
    training = config.training
    wrapper = build_wrapper(config, vocab_size)
    wrapper.model.output.chunk_rows = chunk_rows
    micro_batches = min(2, training.gradient_accumulation_steps)
    tokens = Tokens(micro_batches * training.batch_size, config.sequence_length)
    guards = []
    if training.outlier_z_score is not None:
        guards = [OutlierGuard(training.outlier_z_score, training.outlier_window, CPU)]
    step = TrainStep(
        wrapper.model,
        wrapper.trainable(),
        tokens,
        micro_batches=micro_batches,
        end_of_text=None if config.data.attend_across_documents else 0,
        guards=guards,
    )
    step.run(0, training.learning_rate)
    batch = torch.empty(config.evaluation_batch, config.sequence_length, dtype=torch.int64)
    wrapper.model.losses(batch, batch)
