"""Llama's and Qwen's models on the Triton kernels, interpreted: against transformers, and in steps.

The kernels are proven one by one in tests/kernels; here they are handed to one another.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mantrans.kernels.reference import document_starts
from mantrans.wrapper import CustomTransformerWrapper, shift
from tests.mantrans.models.test_families import assert_same_gradients, their_loss
from tests.support import families
from tests.support.compare import assert_close, relative_error
from tests.support.families import V

SMALL: dict[str, Any] = {"n_blocks": 1, "d_model": 24, "d_ffn": 20}
CASES = {
    "llama, scaled, tied": {"n_heads": 2},
    "qwen2, window": {"n_heads": 2, "n_kv_heads": 1, "attention_window": 5},
    "qwen3": {"n_heads": 2, "n_kv_heads": 1},
}
LONG = [c if c == "qwen3" else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
B, T = 2, 11


def model(case: str, backend: str, dtype: torch.dtype, **more: Any) -> CustomTransformerWrapper:
    return families.ours(case, dtype, backend, **SMALL, **CASES[case], **more)


def ids(step: int = 0) -> torch.Tensor:
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(1 + step))


@pytest.mark.parametrize("case", LONG)
def test_triton_loss_and_gradients(case: str) -> None:
    pytest.importorskip("transformers", reason="transformers is the oracle here")
    ours = model(case, "triton", torch.float32)
    theirs = families.theirs(ours)
    labels = ids().clone()
    labels[0, 4:7] = -100
    logits, loss = their_loss(theirs, ids(), labels)
    loss.backward()
    outputs = ours.forward(ids(), labels)
    assert_close(outputs["logits"], logits.detach(), 1e-5, "logits")
    assert_close(outputs["loss"], loss.detach(), 1e-5, "loss")
    ours.model.zero_gradients()
    ours.accumulate_gradients(ids(), shift(labels), 2)
    assert_same_gradients(ours, theirs, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.bfloat16, 5e-4), (torch.float32, 5e-7)], ids=str
)
@pytest.mark.parametrize("case", CASES)
def test_triton_steps_with_documents(case: str, dtype, bound: float) -> None:
    """Four AdamW steps in which documents, and the window, end inside the sequences."""
    losses = []
    for backend in ("triton", "reference"):
        trained = model(case, backend, dtype, optimizer="adamw", recompute="block")
        found = []
        for step in range(4):
            tokens = ids(step)
            tokens[0, 4] = 0
            scale = torch.tensor(1 / (B * T))
            loss = trained.model.forward_backward(
                tokens, shift(tokens), scale, document_starts(tokens, 0), accumulate=False
            )
            trained.trainable().step(loss, torch.tensor(1e-2))
            found.append(loss.item())
        losses.append(torch.tensor(found, dtype=torch.float64))
    assert relative_error(*losses) <= bound and losses[0][-1] < losses[0][0]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_triton_generate_with_cache(case: str) -> None:
    prompts = [ids()[0, :3], ids()[1, :6]]
    texts = [
        model(case, backend, torch.float32).generate(prompts, max_length=12, temperature=0)
        for backend in ("triton", "reference")
    ]
    assert all(map(torch.equal, *texts)) and all(len(row) == 12 for row in texts[0])
