"""The native backend gives the same bits with any number of threads, as far as it is its own doing.

Products are PyTorch's: docs/scaling.md names the shapes at which they differ. Widths and counts are
odd on purpose, so that no thread's share is made of whole vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mantrans.kernels import native
from mantrans.kernels import operations as described
from mantrans.kernels.operations import Draw, Operation, Shapes
from mantrans.kernels.reference import sum_in_parts
from mantrans.wrapper import CustomTransformerWrapper

ROWS = Shapes(N=1021, C=101, F=101, V=77, Vp=128)
# the last block of queries with documents would be a single row
HEADS = Shapes(B=2, T=257, H=3, H_kv=3, D=16, C=48, V=60, Vp=64)
FAST = [
    (described.LayerNorm(), ROWS),
    (described.BiasGelu(), ROWS),
    (described.SwiGLU(), ROWS),
    (described.DocumentAttention(), HEADS),
    (described.Orthogonalize(), Shapes(B=3, F=101, C=203)),
]
REST = [
    (described.Embedding(), HEADS),
    (described.Linear(), Shapes(N=1100, C=64, F=192)),
    (described.AddLayerNorm(), ROWS),
    (described.RmsNorm(), ROWS),
    (described.AddRmsNorm(), ROWS),
    (described.Rotary(), HEADS),
    (described.NormRotary(), HEADS),
    (described.Attention(), HEADS),
    (described.WindowAttention(), HEADS),
    (described.CrossEntropy(), ROWS),
    (described.LinearCrossEntropy(), Shapes(N=1100, C=64, V=500, Vp=512)),
    (described.Sgd(), Shapes(P=300_001)),
    (described.AdamW(), Shapes(P=300_001)),
    (described.NesterovMomentum(), Shapes(P=300_001)),
]
OPERATIONS = [
    pytest.param(operation, shapes, id=operation.name, marks=marks)
    for cases, marks in ((FAST, ()), (REST, pytest.mark.slow))
    for operation, shapes in cases
]
THREADS = (2, 3)
LLAMA: dict[str, Any] = {"norm": "rms_norm", "mlp": "swiglu", "position": "rope", "bias": False}
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def results(operation: Operation, shapes: Shapes, dtype: torch.dtype, threads: int) -> list[Tensor]:
    """All that forward and backward give, on the same inputs."""
    torch.set_num_threads(threads)
    i = operation.inputs(shapes, Draw(dtype, torch.device("cpu")))
    found = operation.forward(native, i)
    if len(operation.calls) > 1:
        found |= operation.backward(native, i, found)
    return [x for x in found.values() if isinstance(x, Tensor)]


@each_dtype
@pytest.mark.parametrize(("operation", "shapes"), OPERATIONS)
def test_native_with_more_threads(operation: Operation, shapes: Shapes, dtype: torch.dtype) -> None:
    one = results(operation, shapes, dtype, 1)
    for threads in THREADS:
        for a, b in zip(one, results(operation, shapes, dtype, threads), strict=True):
            assert torch.equal(a, b), f"{threads} threads"


@each_dtype
def test_sum_in_parts_with_more_threads(dtype: torch.dtype) -> None:
    x = torch.randn(70_001, generator=torch.Generator().manual_seed(0)).to(dtype)
    torch.set_num_threads(1)
    one = sum_in_parts(x)
    for threads in THREADS:
        torch.set_num_threads(threads)
        assert torch.equal(sum_in_parts(x), one)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        pytest.param(shape, dtype, id=f"{name}-{dtype}", marks=() if fast else pytest.mark.slow)
        for name, shape in {"gpt2": {}, "llama": LLAMA, "qwen3": LLAMA | {"qk_norm": True}}.items()
        for dtype in (torch.float32, torch.bfloat16, torch.float64)
        for fast in [name == "gpt2" and dtype == torch.float32]
    ],
)
def test_step_with_more_threads(shape: dict[str, Any], dtype: torch.dtype) -> None:
    ids = torch.randint(0, 96, (4, 131), generator=torch.Generator().manual_seed(0))
    weights = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        model = CustomTransformerWrapper(
            vocab_size=96, d_model=64, n_blocks=1, n_heads=2, max_seq_len=131, dtype=dtype,
            backend="native", device="cpu", optimizer="adamw", seed=1, **shape,
        )  # fmt: skip
        model.train_step(ids, ids, learning_rate=1e-2, max_grad_norm=1.0)
        weights.append(model.model.parameters.best_weights())
    assert torch.equal(*weights)
