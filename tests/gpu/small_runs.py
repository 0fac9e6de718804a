"""A small model, a stream of random tokens and a training step over them, for the tests here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mantrans import CustomTransformerWrapper
from mantrans.data.loader import BatchLoader
from mantrans.training.batches import TokenSource
from mantrans.training.step import StepRecord, TrainStep

V, B, T, END_OF_TEXT = 1000, 8, 199, 0


class Stream(SimpleNamespace):
    """What a loader and a token source read of a `TokenStream`."""

    def __len__(self) -> int:
        return len(self.tokens)


def loader(sequences: int = B, length: int = T, vocabulary: int = V) -> BatchLoader:
    """Batches of random tokens; one in fifty ends its text."""
    random = np.random.default_rng(0)
    tokens = random.integers(1, vocabulary, 8 * sequences * (length + 1)).astype(np.uint16)
    tokens[random.random(len(tokens)) < 0.02] = END_OF_TEXT
    return BatchLoader(Stream(tokens=tokens, path="random"), sequences, length, seed=3)  # type: ignore[arg-type]


class PlainTokens:
    """The least that a token source can be: each batch is copied, and waited for."""

    def __init__(self, loader: BatchLoader, device: torch.device) -> None:
        self.loader = loader
        self.tokens = loader.batch(0).to(device)

    def load(self, step: int) -> None:
        self.tokens.copy_(self.loader.batch(step))
        torch.cuda.synchronize()

    def rows(self) -> Tensor:
        return self.tokens


def build(
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    source: type[TokenSource] | Any = PlainTokens,
    model: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[CustomTransformerWrapper, TrainStep]:
    """A model of two blocks and its training step; `options` are TrainStep's."""
    shape: dict[str, Any] = {
        "vocab_size": V, "d_model": 256, "n_blocks": 2, "n_heads": 4, "max_seq_len": T,
        "optimizer": "adamw", **(model or {}),
    }  # fmt: skip
    wrapper = CustomTransformerWrapper(dtype=dtype, device=device, backend="triton", **shape)
    tokens = source(loader(), device)
    return wrapper, TrainStep(wrapper.model, wrapper.optimizer, tokens, history=64, **options)


def train(step: TrainStep, numbers: range = range(6)) -> list[StepRecord]:
    """Run the steps without ever asking how they went; then ask."""
    for i in numbers:
        step.run(i, 1e-2 / (i + 1))
    return step.read()


def everything(wrapper: CustomTransformerWrapper) -> dict[str, Tensor]:
    """Copies of all that a step may change."""
    p, optimizer = wrapper.model.parameters, wrapper.optimizer
    found = {"weights": p.weights, "updates": p.updates, **optimizer.state()}
    if p.master is not None:
        found["master"] = p.master
    return {name: x.clone() for name, x in found.items()}
