"""The Triton kernels together: a model that trains on them goes where the reference goes.

The other files here prove one kernel each. This one proves that they fit together: layouts, saved
values and gradient buffers handed from one to the next, through three updates.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mantrans.kernels import native, reference, selfcheck, triton
from mantrans.wrapper import CustomTransformerWrapper
from tests.mantrans.training.test_step_refused import BAD_STEPS, bad_step, everything, unchanged

# Nothing is a power of two or a multiple of a block: D = 24, F = 80, V = 61 (stored as 128 rows).
SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "d_model": 48,
    "n_blocks": 2,
    "n_heads": 2,
    "d_ffn": 80,
    "max_seq_len": 40,
}
END_OF_TEXT = 7


def model(backend: str, dtype: torch.dtype, **options: Any) -> CustomTransformerWrapper:
    return CustomTransformerWrapper(
        **{**SHAPE, **options}, dtype=dtype, device="cpu", backend=backend, seed=3
    )


def batch(step: int, B: int = 2, T: int = 13) -> Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randint(SHAPE["vocab_size"], (B, T), generator=generator)


def train(
    backend: str, dtype: torch.dtype, optimizer: str, rate: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of three steps, the weights before them, and after."""
    wrapper = model(backend, dtype, optimizer=optimizer, n_blocks=1)
    weights = wrapper.model.parameters.best_weights()
    before = weights.clone()
    losses = []
    for step in range(3):
        tokens = batch(step)
        labels = tokens.masked_fill(tokens % 11 == 0, reference.IGNORE_INDEX)
        result = wrapper.train_step(tokens, labels, learning_rate=rate, max_grad_norm=0.5)
        assert result["status"] == "ok"
        losses.append(result["loss"])
    return torch.tensor(losses), before, wrapper.model.parameters.best_weights().clone()


# How far two runs may be apart, as a part of the way that the weights went in the steps, and as a
# part of the loss. float32: both compute with 24 bits, and differ in the order of sums. AdamW
# divides by the root of tiny squares, where a difference of sums becomes one of steps. bfloat16:
# activations are rounded to 8 bits after every operation, in the reference at the same places, so
# what is left are values that lie close to a rounding boundary.
BOUNDS = [
    pytest.param("sgd", torch.float32, 1e-1, 5e-6, 5e-7, marks=pytest.mark.slow),
    ("adamw", torch.float32, 1e-3, 2e-4, 5e-7),
    pytest.param("adamw", torch.bfloat16, 1e-3, 1e-1, 5e-4, marks=pytest.mark.slow),
    # the products of Newton–Schulz are bfloat16 here, float32 in the reference
    pytest.param("muon", torch.float32, 1e-3, 3e-2, 1e-4, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("optimizer", "dtype", "rate", "weight_bound", "loss_bound"), BOUNDS)
def test_triton_steps(
    optimizer: str, dtype: torch.dtype, rate: float, weight_bound: float, loss_bound: float
) -> None:
    """Three steps go where the reference goes."""
    losses, _, weights = train("triton", dtype, optimizer, rate)
    expected_losses, start, expected = train("reference", dtype, optimizer, rate)
    assert torch.isfinite(losses).all()
    assert (losses / expected_losses - 1).abs().max() <= loss_bound
    way = (expected - start).double().norm()
    assert way > 0
    assert (weights - expected).double().norm() <= weight_bound * way


@pytest.mark.parametrize("tied_with_bias", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_triton_gradients_documents(tied_with_bias: bool) -> None:
    """One backward with documents and ignored labels, against float64, parameter by parameter."""
    tokens = batch(0, T=33)
    tokens[:, [4, 5, 17]] = END_OF_TEXT
    targets = tokens.roll(-1, 1)
    targets[:, -1] = reference.IGNORE_INDEX
    starts = reference.document_starts(tokens, END_OF_TEXT)
    options = {"tie_embeddings": tied_with_bias, "bias": tied_with_bias}
    gradients = {}
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        wrapper = model(backend, dtype, **options)
        wrapper.model.zero_gradients()
        scale = torch.tensor(1 / 64, dtype=dtype)
        wrapper.model.forward_backward(tokens, targets, scale, starts)
        gradients[backend] = dict(wrapper.model.named_gradients())
    for name, exact in gradients["reference"].items():
        # float32 roundings of some twenty operations in a row
        assert selfcheck.relative_error(gradients["triton"][name], exact) < 1e-5, name


def test_triton_generate_with_cache() -> None:
    """Prefill and decoding choose the tokens that the reference chooses."""
    prompt = batch(1, T=5)
    texts = [
        model(backend, torch.float32).generate(prompt, max_length=16, top_k=1)
        for backend in ("triton", "reference")
    ]
    assert texts[0].shape == (2, 16)
    assert torch.equal(texts[0], texts[1])


def test_triton_selfcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check that precedes every GPU run, on the interpreter, at a shape it can bear."""
    monkeypatch.setattr(selfcheck, "MAX_ROWS", 18)
    run = {"d_model": 48, "n_heads": 2, "d_ffn": 80, "vocab_size": 61, "sequence_length": 21}
    device = torch.device("cpu")
    results = selfcheck.check(triton, **run, dtype=torch.bfloat16, device=device)
    shared = {name for name, x in vars(triton).items() if x is vars(reference).get(name)}
    checked = set(triton.__all__) - shared - {"partial_rows", "empty_statistics"}
    assert {result.operation for result in results} == checked


@pytest.mark.promise("NaN and infinity")
@pytest.mark.parametrize(
    ("optimizer", "stochastic"), [("adamw", False), ("sgd", True), ("muon", True)]
)
def test_triton_step_not_finite(optimizer: str, stochastic: bool) -> None:
    """The other backends, and more numbers: tests/mantrans/training/test_step_refused.py."""
    wrapper = CustomTransformerWrapper(
        5, 8, 1, 1, 8, 8, backend="triton", device="cpu", optimizer=optimizer,
        stochastic_rounding=stochastic,
    )  # fmt: skip
    for moments in wrapper.optimizer.state().values():
        moments.fill_(0.5)
    before = everything(wrapper)
    for name in ("rate nan", "largest gradient"):
        bad = BAD_STEPS[name]
        assert not bad_step(wrapper, bad).applied and unchanged(wrapper, before), name
    wrapper.model.parameters.gradients[5] = float("nan")
    wrapper.model.update_parameters(0.1)
    assert unchanged(wrapper, before)
    assert bad_step(wrapper, {}).applied and not unchanged(wrapper, before)


def test_backends_same_operations() -> None:
    """All backends offer the same operations."""
    assert set(triton.__all__) <= set(vars(reference)) & set(vars(native))
