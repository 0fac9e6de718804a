"""Finds where numbers break: the first layer whose output is not finite, or the first gradient."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from mantrans.models.transformer import CustomTransformer
from mantrans.wrapper import mean_scale


def first_non_finite(model: CustomTransformer, rows: Tensor) -> str:
    """Runs rows (B, T+1) through the model, one operation after the other, and says what broke.

    Weights are looked at first, then activations in the order of the forward, then gradients in the
    order of the backward. The model's gradients are overwritten.
    """
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            return f"the weights {name} are not finite"
    inputs, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    for name, activation in activations(model, inputs):
        if not activation.isfinite().all():
            return f"the first output that is not finite is that of {name}"
    model.zero_gradients()
    scale = mean_scale(targets, model.parameters.gradients.dtype)
    loss = model.forward_backward(inputs, targets, scale)
    if not loss.isfinite():
        return "all outputs are finite, but the loss is not"
    for name, gradient in reversed(list(model.named_gradients())):
        if not gradient.isfinite().all():
            return f"the first gradient that is not finite is that of {name}"
    return "run alone, the batch is finite from end to end"


def activations(model: CustomTransformer, tokens: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(layer's name, its output) for every layer, in the order of the forward."""
    ops = model.ops
    x = ops.embedding_forward(tokens, model.token_table.value, model.position_table.value)
    yield "the embedding", x
    branch = None
    for i, block in enumerate(model.blocks):
        x, branch, saved = block.forward(x, branch, None)
        yield f"blocks.{i}.norm_1", saved.attention.x
        yield f"blocks.{i}.attention.qkv", saved.attention.qkv
        yield f"blocks.{i}.attention", saved.attention.out
        yield f"blocks.{i}.norm_2", saved.mlp.x
        yield f"blocks.{i}.mlp.up", saved.mlp.h
        yield f"blocks.{i}.mlp.down", branch
    y, _ = model.final_norm.forward(x, branch)
    yield "final_norm", y
    yield "the output projection", ops.linear_forward(y, model.output.value)
