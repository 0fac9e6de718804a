"""The processes of a run, called ranks as in PyTorch: one, or those that torchrun started.

A `World` is one process: it has no process group, and nothing is sent. `Ranks` are several. The
trainer calls the same methods on both.

Tensors travel over PyTorch's process group (NCCL between GPUs, gloo between CPUs), texts and flags
over the store through which torchrun's processes meet.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mantrans.distributed import meeting
from mantrans.distributed.watcher import Show, Watcher, fail
from mantrans.errors import ConfigError, MantransError, single_line

# The process group's own limit. Ours are shorter, and know who is waiting for whom: `watcher`.
NO_LIMIT = timedelta(days=30)
_POLL_SECONDS = 0.01
Made = TypeVar("Made")


class World:
    """One process.

    rank: 0 .. size - 1; size: how many there are; local_rank, local_size: on this machine.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, local_rank: int = 0, local_size: int = 1
    ) -> None:
        self.rank, self.size = rank, size
        self.local_rank, self.local_size = local_rank, local_size
        self._last_saved = "no checkpoint is saved"

    @staticmethod
    def single() -> World:
        return World()

    @staticmethod
    def from_environment() -> World:
        """The ranks that torchrun's variables describe; one process without them.

        Waits until all ranks have come: see `meeting.meet`.
        """
        if os.environ.get("WORLD_SIZE", "1").strip() in ("", "1"):
            return World()
        return Ranks()

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes the run's files and the console."""
        return self.rank == 0

    @property
    def is_power_of_two(self) -> bool:
        return self.size & (self.size - 1) == 0

    def connect(self, device: torch.device) -> None:
        """Create the process group for tensors on `device`, before the first of them is sent."""

    def close(self) -> None:
        """The last call: this rank is done."""

    def fail(self, reason: str, status: int, show: Show = "rank and reason") -> None:
        """End this rank because of its error, and all others: see `watcher.fail`."""

    def watch(self, *, timeout: float | None = None, last_saved: str | None = None) -> None:
        """Set how long a silent rank is waited for; what is said about the last checkpoint."""
        self._last_saved = last_saved or self._last_saved

    def before_leaving(self, act: Callable[[], None]) -> None:
        """What this rank does if another one's failure ends it, in short: a lock is given back."""

    @property
    def last_saved(self) -> str:
        """How messages about the end of a run end: "the last checkpoint is …"."""
        return self._last_saved

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Limit the time that the main thread may take without an exchange."""
        yield

    def sum(self, x: Tensor) -> Tensor:
        """The sum of the ranks' small tensors, with the same bits on every rank.

        By recursive doubling, so that a power of two of ranks adds as a binary tree does.
        """
        return x

    def swap(self, outgoing: Tensor, incoming: Tensor, partner: int) -> None:
        """Send `outgoing` to the rank `partner`, and fill `incoming` with what it sends."""
        raise AssertionError("one process has no partner")

    def all_reduce(self, x: Tensor) -> None:
        """Replace `x` by the sum over all ranks, in PyTorch's order."""

    def broadcast(self, x: Tensor, source: int) -> None:
        """Replace `x` by that of the rank `source`."""

    def send(self, x: Tensor, to: int) -> None:
        """Send `x` to the rank `to`, which calls `receive`."""
        raise AssertionError("one process has no partner")

    def receive(self, x: Tensor, source: int) -> None:
        """Fill `x` with what the rank `source` sends."""
        raise AssertionError("one process has no partner")

    def any(self, flag: bool) -> bool:
        """Whether a rank said True. On the host: no GPU is asked."""
        return flag

    def texts(self, key: str, text: str) -> list[str]:
        """Each rank's text about `key`, in the order of ranks."""
        return [text]

    def from_first(self, key: str, make: Callable[[], str]) -> str:
        """What rank 0 makes, on every rank; the others wait, however long it takes."""
        return make()

    def local_first(self, key: str, make: Callable[[], Made]) -> Made:
        """`make()` on every rank, but on each machine first on its local rank 0 alone."""
        return make()


class Ranks(World):
    """Several processes, each of which calls the same methods in the same order."""

    def __init__(self) -> None:
        super().__init__(*meeting.place())
        self._calls: dict[str, int] = {}
        self._server = meeting.open_store(begins_it=self.is_first)
        word = meeting.meet(self._server, self.rank, self.size)
        self.store = dist.PrefixStore(word, self._server)
        own = dist.PrefixStore(word, meeting.open_store())
        self.watcher = Watcher(self.rank, self.size, self.local_rank, own)
        self.watcher.start()

    def connect(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        try:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                store=dist.PrefixStore("group", self.store),
                rank=self.rank,
                world_size=self.size,
                timeout=NO_LIMIT,
                device_id=device if on_gpu else None,
            )
        except RuntimeError as error:
            raise MantransError(
                "GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME: expected a network between all ranks, got "
                f"{single_line(str(error))}"
            ) from None

    def fail(self, reason: str, status: int, show: Show = "rank and reason") -> NoReturn:
        self.watcher.main_thread_fails = True
        fail(self.rank, self.store, reason, status, show)

    def watch(self, *, timeout: float | None = None, last_saved: str | None = None) -> None:
        self.watcher.timeout = timeout or self.watcher.timeout
        self.watcher.last_saved = last_saved or self.watcher.last_saved

    def before_leaving(self, act: Callable[[], None]) -> None:
        self.watcher.last_act = act

    @property
    def last_saved(self) -> str:
        return self.watcher.last_saved

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        self.watcher.step.begin(name)
        yield
        self.watcher.step.end()

    def close(self) -> None:
        self.texts("done", "")
        self.watcher.stop()
        if dist.is_initialized():
            dist.destroy_process_group()
        # whose process has the store leaves last
        if self.is_first:
            self._wait_for([f"left/{rank}" for rank in range(1, self.size)])
        else:
            self.store.set(f"left/{self.rank}", "")

    def sum(self, x: Tensor) -> Tensor:
        if not self.is_power_of_two:
            x = x.clone()
            self.all_reduce(x)
            return x
        level = 1
        while level < self.size:
            theirs = torch.empty_like(x)
            self.swap(x.contiguous(), theirs, self.rank ^ level)
            x = x + theirs
            level *= 2
        return x

    def swap(self, outgoing: Tensor, incoming: Tensor, partner: int) -> None:
        with self._exchange():
            both = [
                dist.P2POp(dist.isend, outgoing, partner),
                dist.P2POp(dist.irecv, incoming, partner),
            ]
            for work in dist.batch_isend_irecv(both):
                work.wait()

    def all_reduce(self, x: Tensor) -> None:
        with self._exchange():
            dist.all_reduce(x)

    def broadcast(self, x: Tensor, source: int) -> None:
        with self._exchange():
            dist.broadcast(x, source)

    def send(self, x: Tensor, to: int) -> None:
        with self._exchange():
            dist.send(x, to)

    def receive(self, x: Tensor, source: int) -> None:
        with self._exchange():
            dist.recv(x, source)

    def any(self, flag: bool) -> bool:
        flags = torch.tensor([flag], dtype=torch.uint8)
        with self._exchange():
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def texts(self, key: str, text: str) -> list[str]:
        before = f"{key}/{self._calls.get(key, 0)}"
        call = self._call(key)
        self.store.set(f"{call}/{self.rank}", text)
        keys = [f"{call}/{rank}" for rank in range(self.size)]
        self._wait_for(keys)
        self.store.delete_key(f"{before}/{self.rank}")  # all have read it: they are here
        return [value.decode() for value in self.store.multi_get(keys)]

    def from_first(self, key: str, make: Callable[[], str]) -> str:
        call = self._call(key)
        if self.is_first:
            text = make()
            self.store.set(call, text)
            return text
        self._wait_for([call])
        return self.store.get(call).decode()

    def local_first(self, key: str, make: Callable[[], Made]) -> Made:
        call = f"{self._call(key)}/{self.rank - self.local_rank}"
        if self.local_rank:
            self._wait_for([call])
            return make()
        made = make()
        self.store.set(call, "")
        return made

    def _call(self, key: str) -> str:
        """A name for this call: the same on every rank, and used once."""
        self._calls[key] = self._calls.get(key, 0) + 1
        return f"{key}/{self._calls[key]}"

    def _wait_for(self, keys: list[str]) -> None:
        """Until all are in the store. In short looks, between which Python hears signals."""
        pause = _POLL_SECONDS / 8
        while not self.store.check(keys):
            time.sleep(pause)
            pause = min(2 * pause, 8 * _POLL_SECONDS)

    @contextlib.contextmanager
    def _exchange(self) -> Iterator[None]:
        """Nothing is known here about an exchange that fails: the watcher ends the process."""
        self.watcher.step.move(waits=True)
        try:
            yield
        except RuntimeError as broken:
            self.watcher.exchange_failed(single_line(str(broken)))
        self.watcher.step.move()


def device_of(world: World, device: str) -> str:
    """The device of this rank, given `training.device`: of several GPUs the one of its local rank.

    Raises ConfigError: more ranks on this machine than GPUs, or one GPU named for several ranks.
    """
    if world.size == 1 or device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return device
    if ":" in device:
        raise ConfigError(
            f"training.device: expected auto, cuda or cpu, since {world.size} processes train, "
            f"got {device}"
        )
    count = torch.cuda.device_count()
    if world.local_size > count:
        raise ConfigError(
            f"--nproc-per-node: expected at most {count}, the GPUs of this machine, got "
            f"{world.local_size}"
        )
    return f"cuda:{world.local_rank}"
