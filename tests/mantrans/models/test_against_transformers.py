"""The whole model beside transformers' GPT-2: logits, loss, every gradient, twenty AdamW steps.

Tolerances on the relative RMS error: float64 1e-10 and float32 1e-5. Both sides form the same sums
in other orders; an error of one rounding (1.1e-16, 6e-8) grows through the depth of the network,
about a hundred dependent operations and sums of a thousand terms. The key part of the attention
bias has no gradient, because softmax does not feel what is added to all scores of a row: there both
sides hold rounding noise, which is compared absolutely with the query bias's gradient.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mantrans.wrapper import CustomTransformerWrapper, shift
from tests.support.compare import assert_close
from tests.support.huggingface import gpt2, oriented, their_name

pytest.importorskip("transformers", reason="transformers is the oracle here")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
B, T, V = 3, 31, 211


def build(dtype: torch.dtype, backend: str, tied: bool = True, **options):
    """Our model with weights large enough that every path matters, and theirs with the same."""
    torch.manual_seed(0)
    ours = CustomTransformerWrapper(
        vocab_size=V, d_model=48, n_blocks=3, n_heads=4, d_ffn=80, max_seq_len=40,
        dtype=dtype, device="cpu", backend=backend, tie_embeddings=tied, **options,
    )  # fmt: skip
    for name, parameter in list(ours.model.named_parameters()):
        base = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        ours.model.parameters.write(name, base + 0.1 * torch.randn(parameter.shape))
    return ours, gpt2(ours.config, dtype, ours.model.named_parameters())


def batch(ignored: bool = False) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    if ignored:
        labels[0, :9] = labels[2, 5:] = -100
    return ids, labels


def their_loss(model: torch.nn.Module, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and loss; their own loss rounds the logits to float32, so it is formed here."""
    logits = model(ids).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), shift(labels).flatten())
    return logits, loss


def assert_same_gradients(ours: CustomTransformerWrapper, theirs: torch.nn.Module, tol: float):
    parameters = dict(theirs.named_parameters())
    for name, gradient in ours.model.named_gradients():
        expected = oriented(name, parameters[their_name(name)].grad)
        if name.endswith("qkv.bias"):
            (q, k, v), (q2, k2, v2) = gradient.chunk(3), expected.chunk(3)
            assert (k - k2).norm() <= tol * q2.norm(), name
            gradient, expected = torch.cat([q, v]), torch.cat([q2, v2])
        assert_close(gradient, expected, tol, name)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("ignored", [False, True], ids=["all labels", "some ignored"])
def test_gpt2_loss_and_gradients(dtype, backend, micro_batches, ignored) -> None:
    ours, theirs = build(dtype, backend)
    ids, labels = batch(ignored)
    logits, loss = their_loss(theirs, ids, labels)
    loss.backward()

    outputs = ours.forward(ids, labels)
    assert_close(outputs["logits"], logits.detach(), TOLERANCE[dtype], "logits")
    assert_close(outputs["loss"], loss.detach(), TOLERANCE[dtype], "loss")
    ours.model.zero_gradients()
    accumulated = ours.accumulate_gradients(ids, shift(labels), micro_batches)
    assert_close(accumulated, loss.detach(), TOLERANCE[dtype], "loss over micro-batches")
    assert_same_gradients(ours, theirs, TOLERANCE[dtype])


@pytest.mark.parametrize("recompute", ["gelu", "block"])
def test_recompute_gradients(recompute: str) -> None:
    """Recomputed activations give the same gradients."""
    ours, theirs = build(torch.float64, "native", recompute=recompute)
    their_loss(theirs, *batch())[1].backward()
    ours.model.zero_gradients()
    ours.accumulate_gradients(batch()[0], shift(batch()[1]))
    assert_same_gradients(ours, theirs, 1e-10)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_backward_any_gradient(backend: str) -> None:
    """`forward` and `backward` of the bare model, with any dlogits."""
    ours, theirs = build(torch.float64, backend)
    ids, _ = batch()
    dlogits = torch.randn(B, T, V, dtype=torch.float64)
    theirs(ids).logits.backward(dlogits)
    ours.model.forward(ids)
    ours.model.backward(dlogits)
    assert_same_gradients(ours, theirs, 1e-10)
    with pytest.raises(RuntimeError, match="call forward first"):
        ours.model.backward(dlogits)


def test_output_untied() -> None:
    ours, theirs = build(torch.float64, "native", tied=False)
    their_loss(theirs, *batch())[1].backward()
    ours.model.zero_gradients()
    ours.accumulate_gradients(batch()[0], shift(batch()[1]))
    gradients = dict(ours.model.named_gradients())
    assert_close(gradients["output.weight"], theirs.lm_head.weight.grad, 1e-10)
    embedding = theirs.transformer.wte.weight.grad
    assert_close(gradients["token_embedding.weight"], embedding, 1e-10)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_adamw_twenty_steps(backend: str) -> None:
    """Float64; the keys' bias is left out on both sides: AdamW turns its rounding noise into steps
    of full size, in whichever direction the noise points."""
    options = {"beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1}
    ours, theirs = build(torch.float64, backend, optimizer="adamw", optimizer_options={**options})
    decayed = [p for p in theirs.parameters() if p.dim() > 1]
    plain = [p for p in theirs.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=3e-3, betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    C = ours.config.d_model
    ids, labels = batch()
    for _ in range(20):
        optimizer.zero_grad()
        their_loss(theirs, ids, labels)[1].backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        before = [
            block.attn.c_attn.bias[C : 2 * C].detach().clone() for block in theirs.transformer.h
        ]
        optimizer.step()
        with torch.no_grad():
            for block, bias in zip(theirs.transformer.h, before, strict=True):
                block.attn.c_attn.bias[C : 2 * C] = bias
        ours.train_step(ids, labels, learning_rate=3e-3, max_grad_norm=1.0)
        for i, bias in enumerate(before):
            weights = dict(ours.model.named_parameters())
            weights[f"blocks.{i}.attention.qkv.bias"][C : 2 * C] = bias
    parameters = dict(theirs.named_parameters())
    for name, value in ours.model.named_parameters():
        # a rounding in a gradient passes through g/√(g²): small gradients amplify it
        assert_close(value, oriented(name, parameters[their_name(name)]).detach(), 1e-8, name)
