"""How the processes that torchrun started find each other: through its store, at MASTER_ADDR."""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from mantrans.errors import MantransError, RanksError

JOIN_SECONDS = 300.0  # for all ranks to come
_POLL_SECONDS = 0.01


def place() -> tuple[int, int, int, int]:
    """Rank, size, local rank and local size, as torchrun's variables say.

    Raises MantransError: one is missing or not a number.
    """
    rank, size = _number("RANK"), _number("WORLD_SIZE")
    if rank >= size:
        raise MantransError(f"RANK: expected less than WORLD_SIZE ({size}), got {rank}")
    return rank, size, _number("LOCAL_RANK", str(rank)), _number("LOCAL_WORLD_SIZE", str(size))


def open_store(*, begins_it: bool = False) -> dist.TCPStore:
    """A connection to the store at MASTER_ADDR:MASTER_PORT. begins_it: unless torchrun's own
    process has it, it is in this one.

    Raises MantransError if nobody answers.
    """
    host, port = _variable("MASTER_ADDR"), _number("MASTER_PORT")
    torchrun_has_it = os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "").strip() == "True"
    try:
        return dist.TCPStore(
            host, port, is_master=begins_it and not torchrun_has_it, wait_for_workers=False,
            timeout=timedelta(seconds=JOIN_SECONDS),
        )  # fmt: skip
    except RuntimeError as error:  # of the socket
        raise MantransError(
            f"MASTER_ADDR, MASTER_PORT: expected the store of rank 0 at {host}:{port}, got "
            f"{str(error).splitlines()[0]}"
        ) from None


def meet(store: dist.Store, rank: int, size: int) -> str:
    """Wait for all ranks; returns a word that only these processes know.

    torchrun's store outlives a restart, with the keys of the processes before. So each process
    calls with a word of its own, and rank 0 answers to that word.

    Raises RanksError on rank 0 if ranks are missing after JOIN_SECONDS, on others if rank 0 is.
    """
    deadline = time.monotonic() + JOIN_SECONDS
    if rank == 0:
        return _call_together(store, size, deadline)
    own = uuid.uuid4().hex
    store.set(f"hello/{rank}", own)
    while not store.check([f"welcome/{own}"]):
        if time.monotonic() > deadline:
            raise _missing(rank, size, [0])
        time.sleep(_POLL_SECONDS)
    word = store.get(f"welcome/{own}").decode()
    store.set(f"{word}/here/{rank}", "")
    while not store.check([f"{word}/complete"]):
        time.sleep(_POLL_SECONDS)
    if store.get(f"{word}/complete") != b"yes":
        raise SystemExit(2)  # rank 0 says why
    return word


def _call_together(store: dist.Store, size: int, deadline: float) -> str:
    """Rank 0's part of `meet`."""
    word, missing, answered = uuid.uuid4().hex, list(range(1, size)), set()
    while missing:
        for rank in missing:
            if store.check([f"hello/{rank}"]):
                theirs = store.get(f"hello/{rank}").decode()
                if theirs not in answered:
                    store.set(f"welcome/{theirs}", word)
                    answered.add(theirs)
        missing = [rank for rank in missing if not store.check([f"{word}/here/{rank}"])]
        if missing and time.monotonic() > deadline:
            store.set(f"{word}/complete", "no")
            raise _missing(0, size, missing)
        time.sleep(_POLL_SECONDS)
    store.set(f"{word}/complete", "yes")
    return word


def _missing(rank: int, size: int, missing: list[int]) -> RanksError:
    who = "ranks" if len(missing) > 1 else "rank"
    return RanksError(
        f"rank {rank}: expected {size} processes within {JOIN_SECONDS:g} s, got none of {who} "
        f"{', '.join(map(str, missing))}"
    )


def _variable(name: str) -> str:
    value = os.environ.get(name, "").strip()
    if not value:
        _refuse(name, "nothing")
    return value


def _number(name: str, default: str | None = None) -> int:
    value = os.environ.get(name, "").strip() or default or _variable(name)
    if not value.isascii() or not value.isdigit() or len(value) > 9:
        _refuse(name, repr(value)[:40])
    return int(value)


def _refuse(name: str, got: str) -> NoReturn:
    expected = "a number" if name != "MASTER_ADDR" else "a machine"
    raise MantransError(f"{name}: expected {expected}, as torchrun sets it, got {got}")
