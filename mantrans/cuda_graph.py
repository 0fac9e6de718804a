"""Many launches as one: what a function launches on a GPU is captured once and then replayed."""

from __future__ import annotations

from collections.abc import Callable

import torch

WARM_UP_RUNS = 3


def cuda_graph(function: Callable[[], None]) -> Callable[[], None]:
    """Run `function` a few times, capture what it launches, and return a function that replays it.

    The first runs compile kernels and let libraries choose their algorithms. They use a side
    stream, as PyTorch's notes on CUDA graphs require.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_RUNS):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay
