"""What ranks compare."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from mantrans.config import Config, ModelConfig
from mantrans.distributed.world import World
from mantrans.errors import RanksError
from mantrans.training.agreement import agree, checksums, of_config, require_same_weights
from mantrans.wrapper import CustomTransformerWrapper

SMALL = {"vocab_size": 50, "d_model": 16, "n_blocks": 2, "n_heads": 2, "max_seq_len": 8}


class Told(World):
    """A world whose ranks say what a test wants; this one is the first."""

    def __init__(self, *others: Any) -> None:
        super().__init__(size=1 + len(others))
        self.others = others

    def texts(self, key: str, text: str) -> list[str]:
        return [text, *(other(text) for other in self.others)]


def model(dtype: str) -> CustomTransformerWrapper:
    return CustomTransformerWrapper.from_config(ModelConfig(**SMALL, dtype=dtype), device="cpu")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_checksums_every_bit(dtype: str) -> None:
    """A flipped bit, and two values that change places, change that parameter's number alone."""
    parameters = model(dtype).model.parameters
    before = checksums(parameters)
    bits = parameters.weights.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[
        parameters.weights.element_size()
    ])  # fmt: skip
    name = "blocks.1.mlp.up.weight"
    offset = parameters.offset(name)
    for bit in range(8 * parameters.weights.element_size() - 1):
        bits[offset + bit] ^= 1 << bit
        changed = checksums(parameters)
        bits[offset + bit] ^= 1 << bit
        assert [key for key in before if changed[key] != before[key]] == [name]
    bits[offset : offset + 2] = bits[offset : offset + 2].flip(0)
    assert checksums(parameters)[name] != before[name]


def test_weights_minority_named() -> None:
    """Of three ranks the one that differs, be it the first."""
    parameters = model("float32").model.parameters

    def other(text: str) -> str:
        sums = json.loads(text)
        return json.dumps(sums | {"blocks.0.norm_1.weight": 0})

    ending = "first in blocks.0.norm_1.weight: a processor or its memory computes wrongly"
    for others, who in (
        ((str, other), "rank 2 has other weights than rank 0"),
        ((other, other), "rank 0 has other weights than rank 1"),
        ((other,), "rank 1 has other weights than rank 0"),
    ):
        with pytest.raises(RanksError, match=rf"^step 7: {who}, {ending}"):
            require_same_weights(Told(*others), parameters, 7)
    require_same_weights(Told(str), parameters, 7)


def test_agree_places_left_out() -> None:
    """Folders and devices may be each machine's own."""
    one, other = (
        of_config(Config.from_dict({"training": {"max_steps": 1, "output_dir": folder}}))
        for folder in ("a", "b")
    )
    assert one == other and "training.learning_rate" in one
    with pytest.raises(RanksError, match=r"^rank 1: name: expected null, as rank 0 has, got 1$"):
        agree(Told(lambda text: '{"name": 1}'), "facts", {"name": None})
