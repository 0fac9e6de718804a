"""Autograd's gradients have the names and the values of what is written by hand."""

from __future__ import annotations

import pytest
import torch

from mantrans.kernels import reference
from mantrans.proof.exact import Exact, exact_copy
from mantrans.recording import recording
from mantrans.wrapper import shift
from mantrans_oracle import differentiate
from tests.mantrans.proof.test_check import batch, model
from tests.support.compare import assert_close

# Local variables of a backward: the gradient of which result of the forward they are.
INSIDE = {
    "layer_norm_backward": {"g": "x_hat"},
    "rms_norm_backward": {"g": "x_hat"},
    "attention_backward": {"dp": "p", "ds": "scores", "dv": "v", "dk": "k", "dq": "q"},
    "bias_gelu_backward": {"dh": "u"},
    "swiglu_backward": {"dgate": "gate", "dup": "up"},
}
# The gradient that a backward starts from, and the result whose gradient it is.
OUTSIDE = {
    "linear_backward": ("dy", "y"),
    "layer_norm_backward": ("dy", "y"),
    "rms_norm_backward": ("dy", "y"),
    "attention_backward": ("dout", "out"),
    "rotary_backward": ("dqkv", "rotated"),
    "norm_rotary_backward": ("dqkv", "rotated"),
    "bias_gelu_backward": ("dy", "a"),
    "swiglu_backward": ("dy", "a"),
    "embedding_backward": ("dx", "x"),
}


@pytest.mark.parametrize("case", ["gpt2", "qwen3", pytest.param("llama", marks=pytest.mark.slow)])
def test_autograd_results(case: str) -> None:
    """Every result of every operation, and what is inside the operations."""
    wrapper = model(case, "float64", backend="reference")
    ids, labels = batch()
    found = differentiate(exact_copy(wrapper.model), ids, shift(labels))
    with recording(wrapper) as calls:
        wrapper.accumulate_gradients(ids, shift(labels))
    seen = set()
    for call in calls:
        if call.layer == "output" or not call.operation.endswith("_backward"):
            continue
        gradient, result = OUTSIDE[call.operation]
        pairs = {gradient: result, **INSIDE.get(call.operation, {})}
        if call.operation.endswith("_norm_backward"):
            pairs["dx"] = "x"
        for ours, name in pairs.items():
            full = f"{call.layer}.{name}"
            if full not in found.results:
                assert full == "blocks.0.norm_1.x", "this is embedding.x"
                continue
            value = {**call.values, **call.inputs}[ours]
            assert_close(value.reshape(found.results[full].shape), found.results[full], 1e-12, full)
            seen.add(full)
    assert seen == found.results.keys() - {"logits"}


@pytest.mark.parametrize("case", ["gpt2", "qwen3, window, biases"])
def test_plain_forwards(case: str) -> None:
    """PyTorch's own functions compute what the reference does."""
    copy, (ids, labels) = exact_copy(model(case).model), batch()
    found = differentiate(copy, ids, shift(labels))
    own = Exact(copy, reference)
    assert abs(own.loss(ids, shift(labels)) - found.loss) < 1e-13
    results = own.results(ids, shift(labels))
    assert list(results) == [name for name in found.values if name in results]
    for name, x in results.items():
        assert_close(x, found.values[name], 1e-13, name)
    assert not any(x.requires_grad for x in [*found.weights.values(), *found.results.values()])
    assert not torch.is_grad_enabled() or found.loss.grad_fn is None
