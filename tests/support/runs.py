"""A small run, what it leaves behind, and ways to break it: shared by the tests of this folder."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mantrans.checkpoint import state_file
from mantrans.config import Config
from mantrans.training.trainer import Trainer

NAME = "small"
# Frozen text and a tokenizer of single bytes: small, and the same whatever the project ships.
GOLDEN = Path(__file__).parents[1] / "golden"
LLAMA: dict[str, Any] = {"norm": "rms_norm", "position": "rope", "mlp": "swiglu", "bias": False}
# Fields of `model` for `small`.
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {**LLAMA, "n_kv_heads": 1, "rope_scaling_factor": 8.0, "rope_original_length": 16},
    "qwen2": {**LLAMA, "qkv_bias": True, "attention_window": 5, "tie_embeddings": False},
    "qwen3": {**LLAMA, "qk_norm": True, "head_dim": 12, "n_kv_heads": 1},
}


def small(folder: Path, tokens: Path, **training: Any) -> Config:
    """A moment of training. `model=` and `data=` change those sections, the others training's."""
    sections = {
        "model": {
            "d_model": 16, "n_blocks": 1, "n_heads": 2, "d_ffn": 32, "max_seq_len": 16,
            "dtype": "float32", **training.pop("model", {}),
        },
        "data": {
            "dataset": "local", "path": str(GOLDEN / "stories.txt"), "cache_dir": str(tokens),
            "tokenizer": str(GOLDEN / "tokenizer"), "validation_fraction": 0.1,
            **training.pop("data", {}),
        },
        "training": {
            "experiment_name": NAME, "device": "cpu", "batch_size": 4, "max_steps": 12,
            "learning_rate": 5e-3, "warmup_steps": 2, "log_every": 5, "eval_every": 6,
            "eval_batches": 2, "save_every": 4, "output_dir": str(folder / "runs"),
            "checkpoint_dir": str(folder / "checkpoints"), **training,
        },
        "evaluation": {"max_generation_length": 48},
    }  # fmt: skip
    return Config.from_dict(sections)


def checkpoints(folder: Path) -> Path:
    return folder / "checkpoints" / NAME


def metrics_file(folder: Path) -> Path:
    return folder / "runs" / NAME / "metrics.jsonl"


def outcome(folder: Path) -> dict[str, Any]:
    """All that a finished run leaves which does not depend on the clock: weights, moments and
    counters, last and best; the metrics' bytes; the report, with the last validation and the
    samples."""
    names = ("latest.pt", "best.pt")
    states = {name: state_file.load(checkpoints(folder) / name) for name in names}
    for state in states.values():
        state.pop("config")  # holds the paths
    report = json.loads((folder / "runs" / NAME / "report.json").read_text())
    return {**states, "metrics": metrics_file(folder).read_bytes(), "report": report}


def stop_after(trainer: Trainer, step: int) -> None:
    """As if SIGTERM came during step number `step`."""
    advance = trainer._advance

    def and_stop() -> None:
        advance()
        if trainer.progress.step == step:
            trainer.signals.first = signal.SIGTERM

    trainer._advance = and_stop  # type: ignore[method-assign]


def poison(trainer: Trainer, steps: range, where: str, value: float) -> None:
    """In these steps (from 0) make the loss, one weight or one gradient `value`.

    The weight gets its own value back after the step: the fault is of the moment, as that of a
    memory cell or of a bad batch is.
    """
    model = trainer.wrapper.model
    forward_backward, run = model.forward_backward, trainer.train_step.run
    weights, gradients = model.parameters.weights, model.parameters.gradients

    def poisoned(*arguments: Any, **options: Any) -> torch.Tensor:
        loss = forward_backward(*arguments, **options)
        if trainer.progress.step in steps and where == "loss":
            loss = loss * value
        if trainer.progress.step in steps and where == "gradients":
            gradients[3] = value
        return loss

    def run_poisoned(step: int, rate: float) -> None:
        kept = weights[5].clone()
        if step in steps and where == "weights":
            weights[5] = value
        run(step, rate)
        if step in steps and where == "weights":
            weights[5] = kept

    model.forward_backward = poisoned  # type: ignore[method-assign]
    trainer.train_step.run = run_poisoned  # type: ignore[method-assign]


def finish(
    config: Config, prepare: Callable[[Trainer], None] | None = None, **keywords: Any
) -> Any:
    """A trainer for `config`, prepared and run; returns it."""
    trainer = Trainer(config, quiet=True, **keywords)
    if prepare is not None:
        prepare(trainer)
    trainer.run()
    return trainer
