"""One training step of a float64 copy of the model, with the reference's operations, recorded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mantrans.recording import Call, recording
from mantrans.wrapper import CustomTransformerWrapper, mean_scale, shift


class Variant(NamedTuple):
    """What another update would have done."""

    name: str
    loss: float  # of the same tokens, after it
    length: float  # L2 norm of the change of all weights


@dataclass(frozen=True)
class Step:
    """What a step computed. Flat buffers are (P,) float64, as in `mantrans.parameters`."""

    wrapper: CustomTransformerWrapper  # after the update
    tokens: Tensor  # (1,T)
    targets: Tensor  # (T,)  the last is -100
    losses: Tensor  # (T,)
    loss: float
    learning_rate: float
    calls: list[Call]
    before: Tensor  # weights before the update
    after: Tensor
    grad_norm: float
    applied: bool
    variants: list[Variant]


def float64_copy(
    state: dict[str, Any], optimizer_options: dict[str, Any] | None = None
) -> CustomTransformerWrapper:
    """The model of a `state_dict`, of any dtype and device, that computes in float64 on the CPU."""
    return CustomTransformerWrapper.from_state_dict(
        state,
        dtype=torch.float64,
        device="cpu",
        backend="reference",
        optimizer_options=optimizer_options,
    )


def run(wrapper: CustomTransformerWrapper, tokens: Tensor, learning_rate: float) -> Step:
    """Forward, backward and update of one row of tokens (1, T), each predicting the next.

    wrapper: a float64 copy, whose weights and moments change.
    """
    model, optimizer = wrapper.model, wrapper.trainable()
    p = model.parameters
    targets = shift(tokens).flatten()
    state = [p.weights, p.updates, *optimizer.state().values()]
    kept = [x.clone() for x in state]
    rate = torch.tensor(learning_rate, dtype=torch.float64)
    with recording(wrapper) as calls:
        model.zero_gradients()
        # the loss on its own, not fused with the projection, so that the logits are seen
        logits = model.forward(tokens).reshape(len(targets), -1).contiguous()
        losses, normalizer = model.ops.cross_entropy_forward(logits, targets, model.vocab_size)
        scale = mean_scale(targets, losses.dtype)
        dlogits = model.ops.cross_entropy_backward(
            logits.clone(), targets, normalizer, scale, model.vocab_size
        )
        model.backward(dlogits.view(*tokens.shape, -1))
        loss = losses.sum() * scale
        outcome = optimizer.step(loss, rate, has_targets=scale > 0)
    after = [x.clone() for x in state]
    variants = []
    for name, factor, limit in (
        ("this step", 1, optimizer.max_grad_norm),
        ("without clipping", 1, None),
        ("twice the learning rate", 2, optimizer.max_grad_norm),
    ):
        restore(state, kept)
        optimizer.step(loss, rate * factor, max_grad_norm=limit, has_targets=scale > 0)
        new = model.losses(tokens, targets.view(tokens.shape)).sum() * scale
        variants.append(Variant(name, new.item(), (p.weights - kept[0]).norm().item()))
    restore(state, after)
    return Step(
        wrapper, tokens, targets, losses, loss.item(), learning_rate, calls, kept[0], after[0],
        outcome.grad_norm.item(), bool(outcome.applied), variants,
    )  # fmt: skip


def restore(tensors: list[Tensor], values: list[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
