"""The memory that `mantrans.training.memory` predicts is what a captured step takes, within 10%."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from mantrans.config import Config, ModelConfig
from mantrans.training.batches import HostTokens
from mantrans.training.building import build_wrapper
from mantrans.training.memory import predict
from mantrans.training.step import TrainStep
from mantrans.wrapper import CustomTransformerWrapper
from tests.gpu.small_runs import loader

pytestmark = pytest.mark.gpu

CONFIGS = Path(__file__).parents[2] / "configs"
VOCABULARY = {
    "tinystories_custom_tokenizer": 4096, "gpt2-124m": 50_257, "smollm2-135m": 49_152,
}  # fmt: skip


@pytest.mark.parametrize("recompute", ["none", "gelu", "block"])
@pytest.mark.parametrize("name", VOCABULARY)
def test_peak_captured_step(device: torch.device, name: str, recompute: str) -> None:
    config = Config.load(
        CONFIGS / f"{name}.yaml",
        [
            f"model.vocab_size={VOCABULARY[name]}", "model.dtype=bfloat16",
            "training.device=cuda", f"training.recompute={recompute}",
            "training.gradient_accumulation_steps=2",
        ],
    )  # fmt: skip
    predicted = predict(config, torch.bfloat16, device)

    gc.collect()
    torch.cuda.empty_cache()
    # workspaces of earlier tests would otherwise be found, and not be counted
    torch._C._cuda_clearCublasWorkspaces()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    a = torch.ones(64, 64, dtype=torch.bfloat16, device=device)
    torch.mm(a, a)  # the main stream's workspace, as the self-check and validation leave it
    wrapper = build_wrapper(config, VOCABULARY[name])
    sequences = config.training.sequences_per_step
    batches = loader(sequences, config.sequence_length, VOCABULARY[name])
    step = TrainStep(
        wrapper.model, wrapper.optimizer, HostTokens(batches, device), micro_batches=2,
        capture=True,
    )  # fmt: skip
    for i in range(3):
        step.run(i, 1e-4)
    assert all(record.applied for record in step.read())
    require_near(torch.cuda.max_memory_allocated() - before, predicted.step)
    # a batch of validation, beside the graph's pool
    tokens = torch.zeros(config.evaluation_batch, config.sequence_length, dtype=torch.int64)
    wrapper.model.losses(tokens.to(device), tokens.to(device))
    require_near(torch.cuda.max_memory_allocated() - before, predicted.total)


def require_near(peak: int, predicted: int) -> None:
    assert abs(peak / predicted - 1) <= 0.1, f"{peak / 2**20:.0f} of {predicted / 2**20:.0f} MiB"


@pytest.mark.parametrize("recompute", ["none", "gelu", "block"])
def test_peak_eager_step(device: torch.device, recompute: str) -> None:
    shape = ModelConfig(d_model=768, n_blocks=4, n_heads=12, max_seq_len=1024, vocab_size=50257)
    training = {"max_steps": 1, "batch_size": 8, "recompute": recompute}
    training["compile_step"] = False
    config = Config.from_dict({"model": shape.model_dump(), "training": training})
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = CustomTransformerWrapper(
        **shape.model_dump(exclude={"dtype"}),
        dtype=torch.bfloat16, device="cuda", optimizer="adamw", recompute=recompute,
    )  # fmt: skip
    tokens = torch.randint(50257, (8, 1024), device="cuda")
    for _ in range(2):
        model.train_step(tokens, tokens)
    peak = torch.cuda.max_memory_allocated() - before
    assert predict(config, torch.bfloat16, "cuda").total == pytest.approx(peak, rel=0.1)
