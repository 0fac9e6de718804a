"""Whether all numbers are finite: found wherever one is not, and in little memory."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.harness import peak_on_cpu
from mantrans import finite
from mantrans.distributed.world import World
from mantrans.finite import PIECE, all_finite
from mantrans.parameters import Parameter, Parameters
from mantrans.training import agreement, saving

SOURCES = Path(finite.__file__).parent
# The places of few numbers: 0-d, a row's, a page's.
FEW = {"finite.py", "optim/guards.py", "optim/optimizer.py", "models/sampling.py", "wrapper.py",
       "models/transformer.py", "explain/arrays.py", "evaluation/choices.py"}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("value", [math.nan, -math.inf], ids=str)
def test_all_finite_any_place(dtype: torch.dtype, value: float) -> None:
    x = torch.zeros(3 * PIECE + 6, dtype=dtype)
    x[7] = torch.finfo(dtype).max
    assert all_finite(x)
    for place in (0, PIECE - 1, PIECE, 3 * PIECE, len(x) - 1):
        x[place] = value
        assert not all_finite(x) and not all_finite(x.view(2, -1).T), place
        x[place] = 0
    assert all_finite(x[:0]) and all_finite(torch.tensor(1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_all_finite_memory(dtype: torch.dtype) -> None:
    """Whatever the size: with PyTorch's own it is 5 to 11 bytes an element."""
    x = torch.zeros(2, 4 * PIECE, dtype=dtype)
    for view in (x, x.flatten(), x.T[: 2 * PIECE]):
        assert peak_on_cpu([], lambda v=view: all_finite(v)) <= finite.WORKSPACE
    assert peak_on_cpu([], lambda: x.isfinite().all()) > 8 * PIECE * dtype.itemsize


def test_save_check_memory() -> None:
    """Of many weights, on one rank and on several."""
    weights = Parameters(
        [Parameter("output.weight", (8 * PIECE // 64, 64))], torch.float32, torch.device("cpu")
    )
    run = SimpleNamespace(world=World(), wrapper=SimpleNamespace(model=SimpleNamespace()))
    run.wrapper.model.parameters = weights
    assert peak_on_cpu([], lambda: saving.weights_are_finite(run)) <= finite.WORKSPACE
    assert peak_on_cpu([], lambda: agreement.checksums(weights)) <= agreement.WORKSPACE + 4096


def test_isfinite_of_few_numbers() -> None:
    """Nobody else asks PyTorch about a whole buffer."""
    asking = {
        str(path.relative_to(SOURCES))
        for path in SOURCES.rglob("*.py")
        if "kernels" not in path.parts
        and re.search(r"(?<!math)\.is(finite|nan|inf)\(", path.read_text())
    }
    assert asking == FEW
