"""A recorded step is the step itself, and nothing of it is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mantrans.recording import Call, named_layers, recording
from mantrans.wrapper import CustomTransformerWrapper
from tests.support import families

T = 7


def model(case: str) -> CustomTransformerWrapper:
    options = {"dtype": torch.float64, "backend": "reference", "optimizer": "adamw"}
    if case == "gpt2":
        return CustomTransformerWrapper(97, 48, 2, 4, max_seq_len=T, device="cpu", **options)
    return families.ours(case, **options)


def step(wrapper: CustomTransformerWrapper) -> Tensor:
    """Forward, backward and update; the new weights."""
    tokens = torch.randint(97, (1, T), generator=torch.Generator().manual_seed(2))
    logits = wrapper.model.forward(tokens)
    wrapper.model.backward(logits.tanh())
    rate = torch.tensor(1e-3, dtype=torch.float64)
    wrapper.trainable().step(logits.sum(), rate)
    return wrapper.model.parameters.weights.clone()


@pytest.mark.parametrize("case", ["gpt2", "llama", "qwen3"])
class TestRecording:
    def test_record_same_bits(self, case: str) -> None:
        """A recorded step has the same bits."""
        plain, recorded = model(case), model(case)
        expected = step(plain)
        ops = recorded.model.ops
        with recording(recorded) as calls:
            assert torch.equal(step(recorded), expected)
        count = len(calls)
        assert all(layer.ops is ops for _, layer in named_layers(recorded.model.network))
        step(recorded)
        assert len(calls) == count, "nothing is recorded afterwards"

    def test_record_parameters_and_gradients(self, case: str) -> None:
        """Every parameter and gradient passes by."""
        wrapper = model(case)
        with recording(wrapper) as calls:
            step(wrapper)
        names = wrapper.model.parameters.by_name.keys()
        assert {n for c in calls for n in c.parameters.values()} >= names
        assert {n for c in calls for n in c.gradients.values()} == names

    def test_record_backward_order(self, case: str) -> None:
        """The backward mirrors the forward."""
        wrapper = model(case)
        with recording(wrapper) as calls:
            step(wrapper)
        forward, backward = (
            [(c.layer, c.operation.removeprefix("add_").removesuffix(way)) for c in calls
             if c.operation.endswith(way)]
            for way in ("_forward", "_backward")
        )  # fmt: skip
        assert backward == forward[::-1]
        update = [c.operation for c in calls if c.layer == "update"]
        assert list(dict.fromkeys(update)) == ["gradient_norms", "adamw_update"]

    def test_record_names(self, case: str) -> None:
        """Local variables have the names of the source."""
        wrapper = model(case)
        with recording(wrapper) as calls:
            step(wrapper)
        call = one(calls, "blocks.1.attention", "attention_backward")
        p, dp, delta, ds = (call.values[n] for n in ("p", "dp", "delta", "ds"))
        assert p.shape == (1, 4, T, T)
        assert torch.equal(ds, p * (dp - delta))
        for each in calls:  # not those of functions that it calls
            assert each.values.keys() <= set(each.function.__code__.co_varnames)
        file, line = call.caller
        assert file.endswith("layers/attention.py")
        assert "attention_backward(" in Path(file).read_text().splitlines()[line - 1]


def one(calls: list[Call], layer: str, operation: str) -> Call:
    (call,) = (c for c in calls if (c.layer, c.operation) == (layer, operation))
    return call


def test_record_error_inside() -> None:
    """An error inside ends the recording."""
    wrapper = model("gpt2")
    ops = wrapper.model.ops
    with pytest.raises(ZeroDivisionError), recording(wrapper):
        raise ZeroDivisionError
    assert wrapper.model.ops is ops and wrapper.trainable().ops is ops
