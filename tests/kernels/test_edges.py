"""Edges that held when they were tried and are to hold, in every backend."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mantrans import CustomTransformerWrapper
from mantrans.kernels import reference, triton
from mantrans.wrapper import shift
from tests.kernels.common import MODULES, each_ops
from tests.support.compare import assert_close

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def each_case(*fast_in_triton: torch.dtype) -> pytest.MarkDecorator:
    """Every backend in every dtype that it has; Triton's others are slow."""
    return pytest.mark.parametrize(
        ("backend", "dtype"),
        [
            pytest.param(backend, dtype, id=f"{backend}-{str(dtype)[6:]}", marks=marks)
            for backend in MODULES
            for dtype in TOLERANCE
            if (backend, dtype) != ("triton", torch.float64)
            for slow in [backend == "triton" and dtype not in fast_in_triton]
            for marks in [[pytest.mark.slow] if slow else []]
        ],
    )


def model(backend: str, dtype: torch.dtype, **options: Any) -> CustomTransformerWrapper:
    """V = 128 needs no padded rows, so that nothing copies a gradient of the logits by accident."""
    shape = {"vocab_size": 128, "d_model": 32, "n_blocks": 1, "n_heads": 2, "max_seq_len": 8}
    return CustomTransformerWrapper(
        **shape, dtype=dtype, device="cpu", backend=backend, initializer_range=0.2, **options
    )


def batch(B: int, T: int) -> Tensor:
    return torch.randint(0, 128, (B, T), generator=torch.Generator().manual_seed(0))


@each_case(torch.float32)
def test_micro_batches_unequal_targets(backend: str, dtype: torch.dtype) -> None:
    """Targets 7, 0 and 2 of three micro-batches: the gradient is that of the whole batch."""
    ids = batch(3, 8)
    labels = ids.clone()
    labels[1] = labels[2, :6] = -100
    results = []
    for parts in (1, 3):
        ours = model(backend, dtype)
        ours.model.parameters.gradients.fill_(math.nan)  # which must be overwritten
        loss = ours.accumulate_gradients(ids, shift(labels), parts, overwrite=True)
        gradients = {name: g.clone() for name, g in ours.model.named_gradients()}
        results.append((loss, gradients))
    (loss, whole), (sum_of_parts, parts) = results
    assert_close(sum_of_parts, loss, TOLERANCE[dtype], "loss")
    size = max(g.norm() for g in whole.values())
    for name, gradient in parts.items():
        error = (gradient - whole[name]).norm()  # the keys' bias has no gradient of its own
        assert error <= TOLERANCE[dtype] * max(whole[name].norm(), 0.01 * size), name


@each_case()
def test_micro_batches_no_target(backend: str, dtype: torch.dtype) -> None:
    """Loss and gradient are exactly 0, and the weights stay as they are."""
    ours = model(backend, dtype)
    before = ours.model.parameters.weights.clone()
    result = ours.train_step(batch(3, 8), torch.full((3, 8), -100), micro_batches=3)
    assert result == {"loss": 0.0, "status": "ok", "grad_norm": 0.0}
    assert torch.equal(ours.model.parameters.weights, before)


def views_of(x: Tensor) -> dict[str, Tensor]:
    """The same values in other memory layouts."""
    sliced = torch.zeros(*(2 * n + 1 for n in x.shape), dtype=x.dtype)
    where = tuple(slice(1, None, 2) for _ in x.shape)
    sliced[where] = x
    transposed = x.transpose(0, 1).contiguous().transpose(0, 1)
    return {"sliced": sliced[where], "transposed": transposed}


def test_model_sliced_tokens_triton() -> None:
    """Of the next test's doors one, for it is slow there."""
    ours, ids = model("triton", torch.float32), batch(2, 8)
    expected = ours.forward(ids)["logits"]
    for layout, view in views_of(ids).items():
        assert torch.equal(ours.forward(view)["logits"], expected), layout


@each_case()
def test_model_sliced_and_transposed_inputs(backend: str, dtype: torch.dtype) -> None:
    """At every door of the model: the same bits as from contiguous tensors."""
    ids = batch(3, 8)
    labels = ids.clone()
    labels[0, 3:] = -100
    dlogits = torch.randn(3, 8, 128, generator=torch.Generator().manual_seed(1)).to(dtype)

    def outcome(ids: Tensor, labels: Tensor, dlogits: Tensor) -> list[Tensor]:
        ours = model(backend, dtype, optimizer="adamw")
        result = [*ours.forward(ids, labels).values(), ours.model.forward(ids)]
        ours.model.backward(dlogits)
        result.append(ours.model.parameters.gradients.clone())
        ours.train_step(ids, labels, micro_batches=2)
        return [*result, ours.model.losses(ids, shift(labels)), ours.generate(ids, max_length=10)]

    expected = outcome(ids, labels, dlogits)
    for layout in ("sliced", "transposed"):
        views = [views_of(x)[layout] for x in (ids, labels, dlogits)]
        assert not any(x.is_contiguous() for x in views)
        for one, other in zip(outcome(*views), expected, strict=True):
            assert torch.equal(one, other), layout


@each_ops
def test_adamw_extreme_gradients(ops: Any) -> None:
    """0, 1e-25 and 1e19 of either sign, alone and in turn, beside the formulas in float64: a square
    of 1e-50 is 0 in float32, and one of 1e38 just fits."""
    sizes = [0.0, 1e-25, 1e-10, 1.0, 1e10, 1e19]
    columns = [[a, b] for a in sizes for b in sizes]
    first, second = (torch.tensor(column) for column in zip(*columns, strict=True))
    w = torch.linspace(-1, 1, len(columns))
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    wide = [x.double() for x in (w, m, v)]
    one, rate, yes = torch.tensor(1.0), torch.tensor(1e-2), torch.tensor(True)
    constants = (0.9, 0.95, 1e-8, 0.1)
    for step, gradient in enumerate((first, -second, first), start=1):
        number = torch.tensor(float(step))
        ops.adamw_update(w, None, gradient.clone(), m, v, number, rate, one, yes, *constants)
        weights, moments = wide[0], wide[1:]
        reference.adamw_update(
            weights, None, gradient.double(), *moments, number.double(), rate.double(),
            one.double(), yes, *constants,
        )  # fmt: skip
    assert all(x.isfinite().all() for x in (w, m, v))
    assert ((m - wide[1]).abs() <= 2e-6 * first.maximum(second)).all()
    assert ((v - wide[2]).abs() <= 2e-6 * wide[2] + 1e-44).all()
    # three steps of at most 1e-2 each way; where v lost the square of 1e-25, ε rules either way
    assert ((w - wide[0]).abs() <= 1e-6).all()


@each_ops
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_stochastic_rounding_drift(ops: Any, name: str) -> None:
    """Many steps far below a bfloat16's spacing move the mean by what they add up to.

    2,048 weights at 1 go up and as many down, by 2^-14 a step, where the spacing is 2^-7 or 2^-8. A
    step of the full spacing then has probability 2^-7 or 2^-6, and all the rest change nothing.
    """
    P, steps = 4096, 30 if ops is triton else 600
    w = torch.ones(P, dtype=torch.bfloat16)
    m, v = torch.zeros(P), torch.zeros(P)
    direction = torch.ones(P)
    direction[1::2] = -1.0
    rate, one, yes = torch.tensor(2.0**-14), torch.tensor(1.0), torch.tensor(True)
    for step in range(steps):
        seed = {"rounding_seed": torch.tensor(step), "offset": 0}
        if name == "sgd":
            ops.sgd_update(w, None, direction.clone(), rate, one, yes, 0.0, **seed)
        else:
            number = torch.tensor(step + 1.0)
            ops.adamw_update(
                w, None, direction.clone(), m, v, number, rate, one, yes, 0.9, 0.95, 1e-12, 0.0,
                **seed,
            )  # fmt: skip
    walked = 1 - w.double()
    for sign in (0, 1):
        expected = (1 - 2 * sign) * steps * 2.0**-14
        # a step up of 2^-7 has probability 2^-7, so its variance is 2^-14·2^-7; 5 deviations
        allowed = 5 * 2.0**-10.5 * math.sqrt(steps / (P / 2))
        assert abs(walked[sign::2].mean().item() - expected) <= allowed
    assert walked.std() > 0


@each_case(torch.float32)
def test_cross_entropy_one_finite_logit(backend: str, dtype: torch.dtype) -> None:
    """All logits -inf but one, the target in the last column: loss 0, gradient 0. With the target
    elsewhere the loss is infinite, and says so."""
    ops = MODULES[backend]
    for V, Vp in ((1, 1), (5, 8), (300, 384), (4096, 4096)):
        logits = torch.full((3, Vp), 7.0, dtype=dtype)  # also in the padding
        logits[:, : V - 1] = -math.inf
        logits[1, V - 1] = -1e30
        logits[2] = 0.0
        targets = torch.full((3,), V - 1)
        scale = torch.tensor(0.5, dtype=reference.wide_dtype(dtype))
        apart, together = logits.clone(), logits.clone()
        losses, normalizer = ops.cross_entropy_forward(apart, targets, V)
        apart = ops.cross_entropy_backward(apart, targets, normalizer, scale, V)
        both = ops.cross_entropy_forward_backward(together, targets, scale, V)
        for found, dlogits in ((losses, apart), (both, together)):
            assert found[:2].tolist() == [0.0, 0.0]
            assert_close(found[2], torch.tensor(math.log(V)), 1e-6)
            assert (dlogits[:2] == 0).all() and (dlogits[:, V:] == 0).all()
        if V > 1:
            losses = ops.cross_entropy_forward(logits.clone(), torch.zeros(3).long(), V)[0]
            assert losses[:2].tolist() == [math.inf, math.inf]


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_generate_ragged_past_window(backend: str) -> None:
    """Each row as if it were alone, though their windows slide at different steps."""
    ours = model(backend, torch.float64)
    prompts = [batch(1, n)[0] for n in (1, 7, 8, 9, 20, 33)]
    for cache in (True, False):
        options = {"max_length": 40, "temperature": 0, "use_cache": cache}
        together = ours.generate(prompts, **options)
        for prompt, row in zip(prompts, together, strict=True):
            assert torch.equal(ours.generate([prompt], **options)[0], row)
            assert len(row) == 40 and len(row[len(prompt) :].unique()) > 1
