"""The streams of captured graphs, with stand-ins for a GPU's."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mantrans.cuda_graph import STREAMS, WARM_UP_RUNS, cuda_graph

DEVICE = 10**6  # that no other test has


@pytest.fixture
def running_on(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The streams that are used now, the last of them by what runs."""
    now: list[Any] = ["main"]

    @contextlib.contextmanager
    def on(stream: Any) -> Any:
        now.append(stream)
        yield
        now.pop()

    def stream(device: int = DEVICE) -> SimpleNamespace:
        return SimpleNamespace(wait_stream=lambda other: None)

    for name, stand_in in {
        "Stream": stream,
        "stream": on,
        "graph": lambda graph: on("capture"),
        "current_stream": stream,
        "current_device": lambda: DEVICE,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return now


def test_graphs_share_streams(running_on: list[Any]) -> None:
    """However many graphs: each stream that multiplied matrices keeps a workspace of cuBLAS."""
    seen: list[Any] = []
    for _ in range(5):
        cuda_graph(lambda: seen.append(running_on[-1]))
    assert len(seen) == 5 * (WARM_UP_RUNS + 1) and "main" not in seen
    assert len({id(stream) for stream in seen}) == STREAMS
