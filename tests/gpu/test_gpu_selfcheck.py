"""The self-check as a GPU run meets it: it passes, it is quick, and it stops a wrong kernel."""

from __future__ import annotations

import time
import types
from typing import Any

import pytest
import torch

from mantrans.kernels import selfcheck
from mantrans.kernels.selfcheck import KernelCheckError

pytestmark = pytest.mark.gpu

GPT2 = {"d_model": 768, "n_heads": 12, "d_ffn": 3072, "vocab_size": 50_257}
MEDIUM = {"d_model": 2048, "n_heads": 16, "d_ffn": 8192, "vocab_size": 50_257}
TINY = {"d_model": 256, "n_heads": 4, "d_ffn": 512, "vocab_size": 4096}
RUNS = [(GPT2, 1024), (MEDIUM, 2048), (TINY, 256)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("run", "T"), RUNS)
def test_selfcheck_shipped_shapes(
    run: dict[str, int],
    T: int,
    dtype: torch.dtype,
    triton: types.ModuleType,
    device: torch.device,
) -> None:
    """Shipped shapes pass in under five seconds."""

    def check() -> None:
        selfcheck.check(triton, **run, sequence_length=T, dtype=dtype, device=device)

    check()  # compiles what the training would compile anyway
    torch.cuda.synchronize()
    start = time.process_time()
    check()
    torch.cuda.synchronize()
    assert time.process_time() - start < 5


def test_selfcheck_wrong_kernel(triton: types.ModuleType, device: torch.device) -> None:
    """A wrong kernel stops the run."""

    def backward(*arguments: Any) -> torch.Tensor:
        dqkv = triton.attention_backward(*arguments)
        dqkv[:, 64:128] = 0  # a block of rows that no program was given
        return dqkv

    wrong = types.SimpleNamespace(**{**vars(triton), "attention_backward": backward})
    with pytest.raises(KernelCheckError, match="attention_backward is wrong on cuda"):
        selfcheck.check(wrong, **TINY, sequence_length=256, dtype=torch.bfloat16, device=device)
