"""One training step, ours and the rivals', behind one face: `step(i)`.

All have the same start weights, batches, AdamW settings, clipping and learning rate. `losses` holds
each step's mean loss until it is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks import machine
from benchmarks.models import Batches
from benchmarks.rivals import NamedTensors, RivalGPT, TransformersGPT2
from mantrans.config import ModelConfig
from mantrans.training.step import TrainStep
from mantrans.wrapper import CustomTransformerWrapper

LEARNING_RATE = 3e-4
BETAS, EPSILON, WEIGHT_DECAY, MAX_GRAD_NORM = (0.9, 0.95), 1e-8, 0.1, 1.0
HISTORY = 512


class Trainer(Protocol):
    """What is timed."""

    def step(self, i: int) -> None:
        """One optimization step on batch i."""
        ...

    def losses(self) -> list[float]:
        """The losses of the last steps; waits for the device."""
        ...

    def resident(self) -> Iterator[Tensor]:
        """What lives from before a step to after it."""
        ...


class OurTrainer:
    """mantrans: bfloat16 weights with float32 masters, or all float32.

    backend: as in `mantrans.kernels.backend`. capture: the step as one CUDA graph.
    """

    def __init__(
        self,
        config: ModelConfig,
        batches: Batches,
        micro_batches: int,
        dtype: str,
        backend: str = "auto",
        capture: bool = False,
    ) -> None:
        self.wrapper = new_model(config, dtype, backend)
        self.train_step = TrainStep(
            self.wrapper.model, self.wrapper.optimizer, batches, micro_batches=micro_batches,
            capture=capture, history=HISTORY,
        )  # fmt: skip

    def step(self, i: int) -> None:
        reduced_precision_reductions(False)
        if self.train_step.unread == HISTORY:
            self.train_step.read()
        self.train_step.run(i, LEARNING_RATE)

    def losses(self) -> list[float]:
        return [record.loss for record in self.train_step.read()]

    def resident(self) -> Iterator[Tensor]:
        p = self.wrapper.model.parameters
        yield from (p.weights, p.gradients, *self.wrapper.optimizer.state().values())
        if p.master is not None:
            yield p.master


def new_model(config: ModelConfig, dtype: str, backend: str = "auto") -> CustomTransformerWrapper:
    """Our model of this shape with AdamW; the same weights every time."""
    return _model(
        config, dtype, backend, optimizer="adamw",
        optimizer_options={
            "beta1": BETAS[0], "beta2": BETAS[1], "epsilon": EPSILON,
            "weight_decay": WEIGHT_DECAY, "max_grad_norm": MAX_GRAD_NORM,
        },
    )  # fmt: skip


def _model(
    config: ModelConfig, dtype: str, backend: str, **optimizer: Any
) -> CustomTransformerWrapper:
    assert config.vocab_size is not None
    return CustomTransformerWrapper(
        config.vocab_size, config.d_model, config.n_blocks, config.n_heads, config.d_ffn,
        config.max_seq_len, dtype=dtype, device=machine.device(), backend=backend, seed=1,
        **optimizer,
    )  # fmt: skip


def reduced_precision_reductions(allowed: bool) -> None:
    """Whether cuBLAS may add partial products in bfloat16. PyTorch lets it, and so do the rivals;
    we do not (`mantrans.kernels.backend`). The switch is one for the whole process."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = allowed


class RivalTrainer:
    """Autograd: float32 weights, bfloat16 autocast for dtype bfloat16, fused AdamW.

    make: RivalGPT or TransformersGPT2. mode: None for eager, else torch.compile's mode.
    """

    def __init__(
        self,
        make: Callable[[ModelConfig], nn.Module],
        config: ModelConfig,
        start: NamedTensors,
        batches: Batches,
        micro_batches: int,
        dtype: str,
        mode: str | None = None,
    ) -> None:
        module = make(config).to(machine.device())
        module.load(start)
        self.parameters = list(module.parameters())
        groups = [
            {"params": [p for p in self.parameters if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in self.parameters if p.dim() == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, fused=True
        )
        self.loss: Callable[[Tensor, Tensor], Tensor] = module
        if mode is not None:
            self.loss = torch.compile(module, mode=mode, dynamic=False)
        self.batches, self.micro_batches, self.dtype = batches, micro_batches, dtype
        # Gradients that a CUDA graph wrote are overwritten by its next replay: where one step
        # replays it several times, they are kept in memory of their own.
        self.keep_gradients = mode == "reduce-overhead" and micro_batches > 1
        if self.keep_gradients:
            for p in self.parameters:
                p.grad = torch.zeros_like(p)
        self._losses: list[Tensor] = []

    def step(self, i: int) -> None:
        reduced_precision_reductions(True)
        self.batches.load(i)
        rows = self.batches.rows()
        inputs, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        total = torch.zeros((), device=rows.device)
        device, low = rows.device.type, self.dtype == "bfloat16"
        for x, y in zip(
            inputs.chunk(self.micro_batches), targets.chunk(self.micro_batches), strict=True
        ):
            torch.compiler.cudagraph_mark_step_begin()
            with torch.autocast(device, torch.bfloat16, enabled=low):
                loss = self.loss(x, y) / self.micro_batches
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.keep_gradients)
        self._losses = [*self._losses[-HISTORY:], total]

    def losses(self) -> list[float]:
        taken, self._losses = self._losses, []
        return [x.item() for x in taken]

    def resident(self) -> Iterator[Tensor]:
        yield from self.parameters
        for state in self.optimizer.state.values():
            yield from (x for x in state.values() if isinstance(x, Tensor))


RIVALS: dict[str, tuple[Callable[[ModelConfig], nn.Module], str | None]] = {
    "PyTorch eager": (RivalGPT, None),
    "torch.compile": (RivalGPT, "default"),
    "torch.compile reduce-overhead": (RivalGPT, "reduce-overhead"),
    "transformers": (TransformersGPT2, None),
}
OURS = {
    "native": ("native", False),
    "triton": ("triton", False),
    "triton captured": ("triton", True),
}


def build(
    provider: str, config: ModelConfig, batches: Batches, micro_batches: int, dtype: str
) -> Trainer:
    """The trainer of a name in OURS or RIVALS, at the start weights."""
    if provider in OURS:
        backend, capture = OURS[provider]
        return OurTrainer(config, batches, micro_batches, dtype, backend, capture)
    make, mode = RIVALS[provider]
    source = _model(config, dtype, "native").model.parameters
    start = list(source.named(source.best_weights()))
    return RivalTrainer(make, config, start, batches, micro_batches, dtype, mode)
