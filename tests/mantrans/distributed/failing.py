"""Ranks without a model that fail in the way that the first argument names."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch

from mantrans import cli, terminal
from mantrans.distributed import meeting, watcher
from mantrans.distributed.world import World


def main() -> int:
    way = sys.argv[1]
    if way == "other machine" and os.environ["RANK"] == "1":
        watcher.here = lambda: f"another 1 {os.getpid()}"
    if way == "missing":  # the rank of the second argument
        meeting.JOIN_SECONDS = 1.5
        is_missing = os.environ["RANK"] == sys.argv[2]
        return 0 if is_missing else cli.main(["train", "--config", "none.yaml"])
    world = World.from_environment()
    world.watch(timeout=60.0 if way == "other machine" else 3.0, last_saved="nothing is saved")
    world.connect(torch.device("cpu"))
    world.any(False)
    if way == "slowly" and world.rank == 1:
        say = terminal.say
        terminal.say = lambda text: (time.sleep(1.5), say(text))[1]  # type: ignore[assignment]
        world.fail("its disk is full", 2)
    if way == "in common":
        world.fail("the same for all", 2)
    if way == "each its own":
        world.fail(f"reason {world.rank}", 2)
    if way == "about ranks":
        world.fail("rank 1 differs", 2, show="reason")
    if way == "other machine" and world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if way == "long wait":
        slow = world.from_first("slow", lambda: time.sleep(6) or "made")  # type: ignore[func-returns-value]
        assert slow == "made"
        world.close()
        return 0
    if way == "leaving":
        world.before_leaving(lambda: terminal.say(f"rank {world.rank} leaves"))
        if world.rank == 0:
            world.fail("wrong", 2)
    world.any(False)
    time.sleep(30)
    return 0
