"""Llama's and Qwen's models on a GPU: gradients beside transformers', the captured step, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mantrans.wrapper import shift
from tests.gpu.small_runs import END_OF_TEXT, build, everything, train
from tests.gpu.test_gpu_model import FACTOR, FLOOR
from tests.mantrans.models.test_families import their_loss
from tests.support import families
from tests.support.compare import assert_same_bits, relative_error

pytestmark = pytest.mark.gpu

LLAMA: dict[str, Any] = {"norm": "rms_norm", "position": "rope", "mlp": "swiglu", "bias": False}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, "n_kv_heads": 2},
    "qwen2": {**LLAMA, "n_kv_heads": 1, "qkv_bias": True, "attention_window": 50},
    "qwen3": {**LLAMA, "n_kv_heads": 2, "qk_norm": True, "head_dim": 128},
}
WIDE: dict[str, Any] = {"d_model": 256, "d_ffn": 384, "n_heads": 4, "max_seq_len": 256}
CASES: dict[str, dict[str, Any]] = {
    "llama, scaled, tied": {"head_dim": 64},
    "qwen2, window": {"attention_window": 37},
    "qwen3": {"head_dim": 128},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_model_loss_and_gradients(device: torch.device, case: str, dtype: torch.dtype) -> None:
    """Both sides against transformers in float64: ours errs no more than FACTOR times theirs."""
    pytest.importorskip("transformers", reason="transformers is the oracle here")
    shape = {**WIDE, **CASES[case], "n_kv_heads": 2}
    ours = families.ours(case, dtype, "triton", device=device, **shape)
    ids = torch.randint(0, families.V, (3, 200), device=device)
    labels = ids.clone()
    labels[0, :9] = -100
    found = {}
    for name, kind, exact in (("exact", torch.float64, True), ("rival", dtype, False)):
        model = families.theirs(ours, exact=exact, dtype=kind)
        loss = their_loss(model, ids, labels)[1]
        loss.backward()
        found[name] = loss.detach(), families.gradients(ours, model)
    (exact_loss, exact), (rival_loss, rival) = found["exact"], found["rival"]
    loss = ours.accumulate_gradients(ids, shift(labels), micro_batches=3, overwrite=True)
    allowed = FACTOR * relative_error(rival_loss, exact_loss) + FLOOR[dtype]
    assert relative_error(loss, exact_loss) <= allowed
    for name, gradient in ours.model.named_gradients():
        error, theirs = (relative_error(g, exact[name]) for g in (gradient, rival[name]))
        assert error <= FACTOR * theirs + FLOOR[dtype], f"{name}: {error:.2e}, theirs {theirs:.2e}"


@pytest.mark.parametrize("end_of_text", [None, END_OF_TEXT])
@pytest.mark.parametrize("name", MODELS)
def test_captured_step_equals_eager(
    device: torch.device, name: str, end_of_text: int | None
) -> None:
    """With documents and windows made inside the graph; and recomputing changes no bit."""
    outcomes = []
    for capture, recompute in ((False, "none"), (True, "none"), (True, "block"), (True, "gelu")):
        wrapper, step = build(
            device, model={**MODELS[name], "recompute": recompute}, micro_batches=2,
            end_of_text=end_of_text, capture=capture,
        )  # fmt: skip
        outcomes.append({"records": train(step), **everything(wrapper)})
    assert all(record.applied for record in outcomes[0]["records"])
    for other in outcomes[1:]:
        assert_same_bits(other, outcomes[0])


@pytest.mark.parametrize("name", MODELS)
def test_generate_with_cache(device: torch.device, name: str) -> None:
    """Prompts of different lengths, in float32, where both choose the same tokens."""
    rows = []
    for backend in ("triton", "reference"):
        model = families.ours(
            {"llama": "llama", "qwen2": "qwen2, window", "qwen3": "qwen3"}[name],
            torch.float32, backend, device=device,
        )  # fmt: skip
        rows.append(model.generate([[5, 7, 9], [3] * 11, [1]], max_length=38, temperature=0))
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(*rows, strict=True))
