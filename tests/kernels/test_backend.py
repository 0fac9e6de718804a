"""Which operations a model computes with, and what a GPU's products are told before the first."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mantrans.kernels import native, reference
from mantrans.kernels.backend import choose

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SWITCHES = (
    "allow_tf32",
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_reduced_precision_reduction",
)


@pytest.fixture
def switched_on() -> Iterator[None]:
    """As some images and programs leave them; put back afterwards."""
    matmul = torch.backends.cuda.matmul
    before = {name: getattr(matmul, name) for name in SWITCHES}
    for name in SWITCHES:
        setattr(matmul, name, True)
    yield
    for name, value in before.items():
        setattr(matmul, name, value)


def switches() -> list[bool]:
    return [getattr(torch.backends.cuda.matmul, name) for name in SWITCHES]


@pytest.mark.parametrize("name", ["auto", "native", "reference", "triton"])
def test_configure_gpu_products(name: str, switched_on: None) -> None:
    """Settings of PyTorch, which it keeps without a GPU too."""
    assert all(switches())
    ops = choose(name, CUDA)
    assert ops.__name__ == f"mantrans.kernels.{'triton' if name == 'auto' else name}"
    assert not any(switches())


def test_configure_cpu(switched_on: None) -> None:
    """On a CPU no setting is touched."""
    assert choose("auto", CPU) is native and choose("reference", CPU) is reference
    assert all(switches())


def test_backend_unknown() -> None:
    """It is named."""
    with pytest.raises(ValueError, match=r"expected auto, reference, native, triton, got 'cuda'"):
        choose("cuda", CPU)
