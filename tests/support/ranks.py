"""Ranks for tests: real processes, started from the fork server in a tenth of a second each.

The test's process holds the store, as torchrun's agent does.

    def f(world, x): return world.sum(torch.ones(2)) * x     # at the top of a module
    in_ranks(4, f, 3.0)                                       # what each rank returned
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.support.processes import Child, Ended, Processes, start_fork_server

LIMIT_SECONDS = 60.0


class Store:
    """The store of one set of ranks, and the variables that torchrun would set for them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def environment(self, rank: int) -> dict[str, str]:
        return {
            "RANK": str(rank), "WORLD_SIZE": str(self.size), "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(self.size), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
            "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip


class Ranks:
    """The processes of one run of the command line, in the order of ranks."""

    def __init__(self, children: list[Child], store: Store) -> None:
        self.children, self.store = children, store

    def __getitem__(self, rank: int) -> Child:
        return self.children[rank]

    def seconds_until_gone(self, but: Sequence[int] = (), limit: float = 60.0) -> float:
        """Wait until all have ended, `but` these, and say how long it took."""
        begun = time.monotonic()
        waiting = [c for r, c in enumerate(self.children) if r not in but]
        while any(child.process.exitcode is None for child in waiting):
            assert time.monotonic() < begun + limit, self.said()
            time.sleep(0.01)
        return time.monotonic() - begun

    def wait(self, cpu_seconds: float = 60.0) -> list[Ended]:
        """Wait until all have ended; what is left after `timeout` seconds is killed."""
        return [child.wait(cpu_seconds) for child in self.children]

    def said(self) -> str:
        """What all of them have printed, rank after rank."""
        return "".join(child.said() for child in self.children)


def start_ranks(
    processes: Processes,
    size: int,
    *arguments: str,
    cwd: Path,
    environment: dict[str, str] | None = None,
    others: dict[int, Sequence[str]] | None = None,
    store: Store | None = None,
    **keywords: Any,
) -> Ranks:
    """`train` with these arguments on `size` ranks; keywords: of `Processes.start`.

    others: more arguments of single ranks.
    """
    store = store or Store(size)
    children = []
    for rank in range(size):
        given = {**store.environment(rank), **(environment or {})}
        own = (others or {}).get(rank, ())
        children.append(processes.start(*arguments, *own, cwd=cwd, environment=given, **keywords))
    return Ranks(children, store)


def in_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(world, *arguments)` in `size` processes, one thread each; what each returned.

    The function is at the top of its module; tensors are returned as NumPy arrays or lists. With
    one rank it gets the world of a single process. The first failure of a rank is raised here.
    """
    start_fork_server()
    context, store = multiprocessing.get_context("forkserver"), Store(size)
    pairs = [context.Pipe(duplex=False) for _ in range(size)]
    ranks = [
        context.Process(target=_rank, args=(store.environment(r), function, arguments, sending))
        for r, (_, sending) in enumerate(pairs)
    ]
    for rank, (_, sending) in zip(ranks, pairs, strict=True):
        rank.start()
        sending.close()
    try:
        return _results([receiving for receiving, _ in pairs])
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def _results(connections: list[Connection]) -> list[Any]:
    """What comes first is read first: a failure is not waited for behind another rank."""
    results: dict[int, Any] = {}
    while len(results) < len(connections):
        waiting = {c: r for r, c in enumerate(connections) if r not in results}
        ready = wait(list(waiting), LIMIT_SECONDS)
        assert ready, f"no result within {LIMIT_SECONDS:.0f} s from ranks {list(waiting.values())}"
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = waiting[connection]
            try:
                succeeded, value = connection.recv()
            except EOFError:
                raise AssertionError(f"rank {rank} died") from None
            assert succeeded, f"rank {rank}: {value}"
            results[rank] = value
    return [results[rank] for rank in range(len(connections))]


def _rank(
    environment: dict[str, str],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    sending: Connection,
) -> None:
    """In the child."""
    from mantrans.distributed.world import World

    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        world = World.from_environment()
        world.connect(torch.device("cpu"))
        sending.send((True, function(world, *arguments)))
        world.close()
    except BaseException:
        sending.send((False, traceback.format_exc()))
    os._exit(0)
