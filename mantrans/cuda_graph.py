"""Many launches as one: what a function launches on a GPU is captured once and then replayed."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

WARM_UP_RUNS = 3
STREAMS = 2  # of all graphs together: one for all warm-ups, one of PyTorch's for all captures


def cuda_graph(function: Callable[[], None]) -> Callable[[], None]:
    """Run `function` a few times, capture what it launches, and return a function that replays it.

    The first runs compile kernels and let libraries choose their algorithms. They use a side
    stream, as PyTorch's notes on CUDA graphs require. The graph's memory is its own until the
    returned function is forgotten.
    """
    side = _warm_up_stream(torch.cuda.current_device())
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_RUNS):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


@functools.cache
def _warm_up_stream(device: int) -> torch.cuda.Stream:
    """Always the same: cuBLAS keeps a workspace for every stream that has multiplied matrices."""
    return torch.cuda.Stream(device)
