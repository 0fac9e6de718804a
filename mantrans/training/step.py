"""The training step: forward and backward of all micro-batches, clip, check, update.

Everything that changes from step to step (tokens, learning rate, counters) is a tensor with a fixed
address, written before the step runs. On a GPU the step is captured once as a CUDA graph and then
replayed: the host launches one graph and waits for nothing. Eager or captured, the same function
runs and gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mantrans.cuda_graph import WARM_UP_RUNS, cuda_graph
from mantrans.distributed.world import World
from mantrans.kernels.reference import document_starts
from mantrans.models.transformer import CustomTransformer
from mantrans.optim import Optimizer
from mantrans.optim.guards import Guard, Switch
from mantrans.training import recheck
from mantrans.training.batches import MicroBatch, TokenSource
from mantrans.training.gradient_sum import GradientSum
from mantrans.wrapper import count_targets, scale_of


class StepRecord(NamedTuple):
    """The result of a step, which the host reads some time after it ran."""

    loss: float
    grad_norm: float
    applied: bool

    @property
    def trouble(self) -> str | None:
        """What is not finite, if anything."""
        if not math.isfinite(self.loss):
            return f"nan_detected (loss {self.loss})"
        if not math.isfinite(self.grad_norm):
            return f"nan_gradient (gradient norm {self.grad_norm})"
        return None


class TrainStep:
    """One optimization step over `micro_batches` equal parts of the source's sequences.

    micro_batches: of this rank; the gradient is the sum over those of all ranks (`GradientSum`,
        whose method `gradient_sum` is).
    end_of_text: its token, to keep attention inside documents; None to let it cross them.
    capture: replay the step as a CUDA graph; False runs the same function directly.
    after_capture: called once the graph has its memory.
    recheck_every: after this many steps one's loss and gradient norm are computed a second time,
        not by the graph; None for never.
    history: the number of steps whose results stay on the device until `read` fetches them.
    """

    def __init__(
        self,
        model: CustomTransformer,
        optimizer: Optimizer,
        source: TokenSource,
        *,
        micro_batches: int = 1,
        world: World | None = None,
        gradient_sum: str = "tree",
        end_of_text: int | None = None,
        guards: Sequence[Guard] = (),
        capture: bool = False,
        after_capture: Callable[[], None] = lambda: None,
        recheck_every: int | None = None,
        history: int = 1024,
    ) -> None:
        self.model, self.optimizer, self.source = model, optimizer, source
        self.micro_batches, self.end_of_text = micro_batches, end_of_text
        self.world = world or World.single()
        self.gradient_sum = GradientSum(model, micro_batches, self.world, gradient_sum)
        gradients = model.parameters.gradients
        self.switch = Switch(gradients.device)
        self.guards = [self.switch, *guards]
        self.learning_rate = gradients.new_zeros(())
        shape = (max(history, WARM_UP_RUNS), 3)
        self.history = torch.zeros(shape, dtype=torch.float64, device=gradients.device)
        self.place = torch.zeros(1, dtype=torch.int64, device=gradients.device)
        self.unread = 0
        self.capture, self.after_capture = capture, after_capture
        self.recheck_every = recheck_every
        self.replay: Callable[[], None] | None = None

    def run(self, step: int, learning_rate: float) -> None:
        """Run step number `step`. `read` returns its result later.

        MantransError if the step was computed twice, with results of which one is wrong.
        """
        if self.unread == len(self.history):
            raise RuntimeError(f"{self.unread} steps were not read; call read() more often")
        self.source.load(step)
        self.learning_rate.fill_(learning_rate)
        if self.capture and self.replay is None:
            self._capture()
            self.after_capture()
        is_due = self.recheck_every is not None and (step + 1) % self.recheck_every == 0
        first = self.compute() if is_due else None
        (self.replay or self._step)()
        self.unread += 1
        if first is not None:
            own = self.gradient_sum.own_loss[None]
            second = torch.cat([own, self.history[self.unread - 1, :2]])
            recheck.require_same(first, second, step + 1, self.world)

    def compute(self) -> Tensor:
        """`recheck.NAMES` of the loaded sequences, (3,) float64. Changes no weights."""
        loss = self.gradient_sum.run(self.batch())
        return torch.stack([self.gradient_sum.own_loss, loss, self.optimizer.gradient_norm()])

    def release(self) -> None:
        """Give the captured step's memory back; a further step is captured again."""
        self.replay = None

    def read(self) -> list[StepRecord]:
        """The results of the steps since the last call. This waits for the device."""
        rows = self.history[: self.unread].tolist()
        self.place.zero_()
        self.unread = 0
        return [StepRecord(loss, norm, bool(applied)) for loss, norm, applied in rows]

    def batch(self) -> Iterator[MicroBatch]:
        """This rank's micro-batches of the source's current sequences. Every rank calls it."""
        rows = self.source.rows()
        inputs, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        scale = scale_of(self.world.sum(count_targets(targets)), self.learning_rate.dtype)
        parts = (inputs.chunk(self.micro_batches), targets.chunk(self.micro_batches))
        for x, y in zip(*parts, strict=True):
            start = None if self.end_of_text is None else document_starts(x, self.end_of_text)
            yield MicroBatch(x, y, scale, start)

    def _step(self) -> None:
        parts = list(self.batch())
        loss = self.gradient_sum.run(iter(parts))
        outcome = self.optimizer.step(
            loss, self.learning_rate, self.guards, has_targets=parts[0].scale > 0
        )
        self.gradient_sum.gather_weights()
        record = torch.stack([loss, outcome.grad_norm, outcome.applied.to(loss.dtype)])
        self.history.index_copy_(0, self.place, record[None])
        self.place += 1

    def _capture(self) -> None:
        """Capture the step with the switch off, so that the warm-up runs change no weights."""
        memory = [tensor for guard in self.guards for tensor in guard.state().values()]
        before = [tensor.clone() for tensor in memory]
        self.switch.on.fill_(False)
        self.replay = cuda_graph(self._step)
        for tensor, value in zip(memory, before, strict=True):
            tensor.copy_(value)
        self.place.zero_()
        self.switch.on.fill_(True)
