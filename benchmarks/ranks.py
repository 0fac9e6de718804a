"""Steps of several processes on this machine: ours, for each way to divide state, beside PyTorch's
`DistributedDataParallel` (DDP) on the same GPT.

A case is a number of ranks and a global step of MICRO_BATCHES micro-batches, which the ranks share.
In each of its processes all candidates are built, and take turns: machine noise hits all alike. A
step's time is the slowest rank's. Bytes are counted by the kernel, on the loopback interface, which
other programs use too: `unshare --net` gives a command one of its own.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks import baselines, harness, machine
from benchmarks.harness import Quantiles, Recorder
from mantrans.config import TrainingConfig
from mantrans.distributed.world import World
from mantrans.training.share import share_of
from mantrans.training.step import TrainStep

SHARDS = ("none", "optimizer", "gradients")
DDP = "DistributedDataParallel"
MODEL, B, T, MICRO_BATCHES = "seed-sized", 2, 256, 4
WARM_UP, COUNTED, MIN_ROUNDS = 3, 2, 7
# The same model in another order of sums; DDP's is the mean over ranks of means.
LOSS_TOLERANCE = 2e-2


def main(arguments: Namespace) -> int:
    """`python -m benchmarks ranks`. Returns 1 if a rank failed."""
    if machine.on_gpu():
        print("not measured: gloo between CPUs alone was tried")
        return 0
    recorder = Recorder(arguments.output, "ranks", arguments.quick)
    todo = [ranks for ranks in (1, 2, 4) if arguments.only in f"ranks={ranks}"]
    end = time.monotonic() + arguments.seconds
    for ranks, share in harness.within(todo, end, str):
        port = _free_port()
        context = multiprocessing.get_context("spawn")
        results = context.SimpleQueue()
        processes = multiprocessing.spawn(
            _rank, (ranks, port, arguments.quick, share / 2, results), ranks, join=False
        )
        found = results.get()
        while not processes.join():
            pass
        _record(recorder, ranks, found)
    return 0


def _record(recorder: Recorder, ranks: int, found: dict[str, dict[str, Any]]) -> None:
    shape = {"ranks": ranks, "B": B, "T": T, "micro-batches": MICRO_BATCHES}
    where = (f"training step {MODEL} of {ranks} ranks", "step", shape, found["all"]["dtype"])
    note = f"one thread a rank; {os.cpu_count()} cores, load {os.getloadavg()[0]:.0f}"
    for name, measured in found.items():
        if name == "all":
            continue
        times, sent = Quantiles.of(measured["seconds"]).milliseconds(), measured["sent"] / 2**20
        recorder.add(where, name, "time", "ms", times, note=note)
        recorder.add(where, name, "sent", "MiB", Quantiles.of([sent]), note="each rank, a step")
        print(
            f"{ranks} ranks, {name}: {times.p50:.1f} ms ({times.p20:.1f} to {times.p80:.1f}, "
            f"{times.rounds} rounds), {sent:.1f} MiB sent by each rank",
            flush=True,
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ------------------------------------------------------------------------------------- in a rank


def _rank(rank: int, ranks: int, port: int, quick: bool, seconds: float, results: Any) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip
    torch.set_num_threads(1)  # the same for every number of ranks
    world = World.from_environment()
    world.connect(machine.device())
    found = _measure(world, quick, seconds)
    if world.is_first:
        results.put(found)
    world.close()


def _measure(world: World, quick: bool, seconds: float) -> dict[str, dict[str, Any]]:
    """Seconds of each step and bytes sent, by candidate."""
    dtype = "bfloat16" if machine.has_native_bfloat16() else "float32"
    trainers = {f"mantrans, shard {shard}": _Ours(world, shard, dtype) for shard in SHARDS}
    trainers[DDP] = _ddp(world, dtype)
    if world.size == 1:  # nothing is divided
        trainers = {name: trainers[name] for name in (f"mantrans, shard {SHARDS[0]}", DDP)}
    for i in range(WARM_UP):
        for trainer in trainers.values():
            trainer.step(i)
    losses = {name: _mean(world, trainer.losses()[-1]) for name, trainer in trainers.items()}
    first, *others = losses.values()
    assert all(abs(other / first - 1) < LOSS_TOLERANCE for other in others), losses
    found = {
        name: {"seconds": [], "sent": _sent(world, trainer.step)}
        for name, trainer in trainers.items()
    }
    names, end, turn = list(trainers), time.monotonic() + seconds, 0
    least = 2 if quick else MIN_ROUNDS
    while world.any(turn < least or (not quick and time.monotonic() < end)):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            world.any(False)  # all begin together
            begin = time.perf_counter()
            trainers[name].step(WARM_UP + COUNTED + turn)
            found[name]["seconds"].append(_slowest(world, time.perf_counter() - begin))
        turn += 1
    return {**found, "all": {"dtype": dtype}}


def _sent(world: World, step: Callable[[int], None]) -> float:
    """Bytes that a rank sends in a step, headers included: all of loopback's, by rank."""
    world.any(False)
    before = _loopback()
    for i in range(COUNTED):
        step(WARM_UP + i)
    world.any(False)
    return (_loopback() - before) / COUNTED / world.size


def _loopback() -> int:
    """Bytes that the loopback interface has sent."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[8])
    return 0


def _slowest(world: World, seconds: float) -> float:
    return _reduced(world, seconds, dist.ReduceOp.MAX)


def _mean(world: World, loss: float) -> float:
    """Ours is the loss of the whole step on every rank, DDP's that of the rank's share."""
    return _reduced(world, loss, dist.ReduceOp.SUM) / world.size


def _reduced(world: World, number: float, how: Any) -> float:
    x = torch.tensor([number], dtype=torch.float64)
    if world.size > 1:
        dist.all_reduce(x, how)
    return float(x)


class _Rows(baselines.Batches):
    """The rank's rows of the global batches."""

    def __init__(self, rows: list[int]) -> None:
        super().__init__(B * MICRO_BATCHES, T)
        self.all = self.all[:, rows].contiguous()
        self.current = self.all[0].clone()


def _shared(world: World, shard: str) -> tuple[_Rows, int]:
    settings = TrainingConfig(
        max_steps=1, batch_size=B, gradient_accumulation_steps=MICRO_BATCHES, shard=shard
    )
    share = share_of(settings, world)
    return _Rows(share.rows), share.micro_batches


class _Ours:
    """Our step, for one way to divide state."""

    def __init__(self, world: World, shard: str, dtype: str) -> None:
        rows, micro_batches = _shared(world, shard)
        config = baselines.model_config(MODEL, T)
        wrapper = baselines.new_model(config, dtype, "native", world=world, shard=shard)
        self.train_step = TrainStep(
            wrapper.model, wrapper.trainable(), rows, micro_batches=micro_batches, world=world,
            history=baselines.HISTORY,
        )  # fmt: skip

    def step(self, i: int) -> None:
        self.train_step.run(i, baselines.LEARNING_RATE)

    def losses(self) -> list[float]:
        return [record.loss for record in self.train_step.read()]


class _DataParallel(baselines.AutogradTrainer):
    """A module under DDP, which sums gradients in the last micro-batch's backward."""

    def step(self, i: int) -> None:
        self.batches.load(i)
        rows, low = self.batches.rows(), self.dtype == "bfloat16"
        inputs, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        total = torch.zeros(())
        parts = list(zip(*(z.chunk(self.micro_batches) for z in (inputs, targets)), strict=True))
        for number, (x, y) in enumerate(parts, start=1):
            with self._sum_later(number < len(parts)):
                with torch.autocast("cpu", torch.bfloat16, enabled=low):
                    loss = self.loss(x, y) / self.micro_batches
                loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.parameters, baselines.MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        self._losses = [*self._losses[-baselines.HISTORY :], total]

    def _sum_later(self, later: bool) -> contextlib.AbstractContextManager[object]:
        module: Any = self.loss
        return (
            module.no_sync() if later and hasattr(module, "no_sync") else contextlib.nullcontext()
        )


def _ddp(world: World, dtype: str) -> _DataParallel:
    rows, micro_batches = _shared(world, "none")
    config = baselines.model_config(MODEL, T)
    source = baselines.new_model(config, dtype, "native", optimizer="sgd").model.parameters
    start: list[tuple[str, Tensor]] = list(source.named(source.best_weights()))
    trainer = _DataParallel(baselines.GPT, config, start, rows, micro_batches, dtype)
    if world.size > 1:
        trainer.loss = DistributedDataParallel(trainer.loss, gradient_as_bucket_view=True)
    return trainer
