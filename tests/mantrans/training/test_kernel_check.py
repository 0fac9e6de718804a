"""A run checks the kernels that it uses, and no others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mantrans.config import Config
from mantrans.errors import MantransError
from mantrans.kernels import native
from mantrans.kernels.operations import Draw
from mantrans.kernels.selfcheck import run_shapes
from mantrans.training import kernel_check
from mantrans.training.batches import TokenSource
from mantrans.training.building import build_wrapper
from mantrans.training.step import TrainStep

CONFIGS = Path(__file__).parents[3] / "configs"
SMALL = ["model.d_model=32", "model.n_blocks=1", "model.n_heads=2", "model.d_ffn=48",
         "model.max_seq_len=24", "data.max_length=24", "model.vocab_size=61",
         "model.dtype=float32", "training.device=cpu", "training.backend=native",
         "training.batch_size=2", "training.gradient_accumulation_steps=2"]  # fmt: skip


class Called:
    """A backend that notes which of its functions are called."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        value = getattr(native, name)
        if not callable(value):
            return value

        def call(*arguments: Any, **options: Any) -> Any:
            self.names.add(name)
            return value(*arguments, **options)

        return call


class Tokens:
    """Random tokens."""

    def load(self, step: int) -> None: ...

    def rows(self) -> torch.Tensor:
        return torch.arange(4 * 25).view(4, 25) % 61


def called_by_the_run(config: Config) -> set[str]:
    """A step, a batch of validation, a prompt and a token."""
    wrapper = build_wrapper(config, 61)
    model, ops = wrapper.model, Called()
    for owner in (model, wrapper.trainable(), *_owners(model)):
        owner.ops = ops
    source: TokenSource = Tokens()
    end = None if config.data.attend_across_documents else 0
    TrainStep(model, wrapper.trainable(), source, micro_batches=2, end_of_text=end).run(0, 1e-3)
    tokens = source.rows()[:, :24]
    model.losses(tokens, tokens)
    lengths = torch.full((4,), 7)
    cache = model.new_cache(4, 12)
    model.prefill(tokens[:, :7], lengths, cache)
    model.decode(tokens[:, 7], lengths + 1, cache)
    return ops.names


def _owners(model: Any) -> list[Any]:
    """Every layer that calls operations."""
    found, todo = [], [model.embedding, *model.blocks, model.final_norm, model.output]
    while todo:
        layer = todo.pop()
        found += [layer] if hasattr(layer, "ops") else []
        todo += [part for part in vars(layer).values() if hasattr(part, "__dict__")
                 and type(part).__module__.startswith("mantrans.layers")]  # fmt: skip
    return found


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("quickstart", []),
        ("quickstart", ["data.attend_across_documents=true"]),
        ("quickstart-llama", ["model.n_kv_heads=1"]),
        ("quickstart-llama", ["model.n_kv_heads=2", "model.qk_norm=true",
                              "model.attention_window=8"]),
    ],
)  # fmt: skip
def test_programs_of_run(name: str, changes: list[str]) -> None:
    config = Config.load(CONFIGS / f"{name}.yaml", [*SMALL, *changes])
    ops, model = Called(), config.model
    shapes = run_shapes(32, 2, 48, 61, 24, model.n_kv_heads)
    for draw, program in kernel_check.programs_of(config):
        program(ops, draw(shapes, Draw(torch.float32, torch.device("cpu"))))
    run = called_by_the_run(config)
    asked = {name for name in run if name != "partial_rows"}
    assert len(asked) > 12 and asked <= ops.names
    others = {"rms_norm_forward", "layer_norm_forward", "swiglu_forward", "bias_gelu_forward"}
    assert others & ops.names == others & run


def test_check_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config.load(CONFIGS / "quickstart.yaml", SMALL)
    model = build_wrapper(config, 61).model
    kernel_check.check(config, model, quiet=True)

    def failing(error: Exception) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            raise error

        return call

    for error, line in (
        (torch.OutOfMemoryError("CUDA out of memory"), "cpu: out of memory while kernels are comp"),
        (RuntimeError("out of resource: shared memory"), "bias_gelu_forward does not run: out of"),
    ):
        monkeypatch.setattr(native, "bias_gelu_forward", failing(error))
        with pytest.raises(MantransError) as caught:
            kernel_check.check(config, model, quiet=True)
        assert str(caught.value).startswith(line) and "\n" not in str(caught.value)
