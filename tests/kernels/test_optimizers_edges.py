"""Updates by extreme gradients, clipped or refused, and their count, in all three backends."""

from __future__ import annotations

import math

import pytest
import torch

from mantrans.config import ModelConfig
from mantrans.kernels import reference
from mantrans.models.transformer import CustomTransformer
from mantrans.optim import OPTIMIZERS, Optimizer
from mantrans.parameters import Parameters
from tests.kernels.common import each_ops, generator, normal, relative

INF, NAN = math.inf, math.nan
pytestmark = pytest.mark.usefixtures("few_programs")


def small_parameters(ops, dtype: torch.dtype) -> Parameters:
    config = {"vocab_size": 16, "d_model": 8, "n_blocks": 1, "n_heads": 1, "max_seq_len": 4}
    model = CustomTransformer(
        ModelConfig.complete(config, "test"), ops, dtype=dtype, device=torch.device("cpu"), seed=0
    )
    return model.parameters


def take(optimizer: Optimizer, rate: float = 1e-2):
    parameters = optimizer.parameters
    numbers = [torch.tensor(x, dtype=parameters.wide) for x in (1.0, rate)]
    return optimizer.step(*numbers)


@each_ops
@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_update_refused(ops, name, bad):
    """Whatever its gradients hold: weights and moments keep their bits, and so the next step's."""
    states = []
    for poisoned in (True, False):
        parameters = small_parameters(ops, torch.float32)
        optimizer = OPTIMIZERS[name](ops, parameters)
        if poisoned:
            parameters.gradients.fill_(bad)
            assert not take(optimizer).applied
        parameters.gradients.copy_(normal(generator(8), len(parameters.gradients)))
        assert take(optimizer).applied
        states.append([parameters.weights, parameters.updates, *optimizer.state().values()])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@each_ops
@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 6.8e19), (torch.bfloat16, 1e38)])
def test_update_clipped_long_gradient(ops, name, dtype, size):
    """The step is that of the same direction with norm 1, and the gradients are only read."""
    direction = None
    changes = []
    for length in (1.0, size):
        parameters = small_parameters(ops, dtype)
        if direction is None:
            direction = normal(generator(9), len(parameters.gradients)).clamp(-3, 3)
            direction /= direction.double().norm().float()
        gradients = direction * (length * 1.0)
        assert gradients.isfinite().all()
        parameters.gradients.copy_(gradients)
        before = (parameters.weights if parameters.master is None else parameters.master).clone()
        outcome = take(OPTIMIZERS[name](ops, parameters, weight_decay=0.0, **small_epsilon(name)))
        assert torch.equal(parameters.gradients, gradients)
        assert outcome.applied and relative(outcome.grad_norm, length) < 1e-6
        after = parameters.weights if parameters.master is None else parameters.master
        changes.append((after - before).double())
    torch.testing.assert_close(*changes, rtol=0, atol=2e-3 * float(changes[0].abs().max()))


def small_epsilon(name: str) -> dict[str, float]:
    return {} if name == "sgd" else {"epsilon": 1e-12}


@each_ops
def test_update_clipped_norm_beyond_float32(ops):
    """Every gradient is finite, their norm is above 3.4e38: no nan_gradient, but a step."""
    parameters = small_parameters(ops, torch.float32)
    parameters.gradients.fill_(3e38)
    before = parameters.weights.clone()
    outcome = take(OPTIMIZERS["sgd"](ops, parameters, weight_decay=0.0))
    exact = 3e38 * math.sqrt(len(parameters.gradients))
    assert exact > 3.4e38 and outcome.applied and relative(outcome.grad_norm, exact) < 1e-6
    step = torch.full_like(before, -1e-2 / math.sqrt(len(before)))
    torch.testing.assert_close(parameters.weights - before, step, rtol=1e-3, atol=1e-8)


@each_ops
@pytest.mark.parametrize("count", [2**24 - 1, 2**31])
def test_update_count_beyond_float32(ops, count):
    """With a count that stops, stochastic rounding would repeat its noise."""
    parameters = small_parameters(ops, torch.float32)
    parameters.updates.fill_(count)
    optimizer = OPTIMIZERS["sgd"](ops, parameters)
    for passed in (1, 2, 3):
        take(optimizer)
        assert int(parameters.updates) == count + passed
    x = normal(generator(10), 2000)
    draws = [reference.round_stochastically(x, parameters.updates + i) for i in (0, 1)]
    assert (draws[0] != draws[1]).any()
