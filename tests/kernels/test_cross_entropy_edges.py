"""The loss, sums over large buffers, the gradient norm and updates where numbers are extreme.

All three backends, each against float64 or an exact value.
"""

from __future__ import annotations

import importlib
import itertools
import math

import pytest
import torch
from torch import Tensor

from mantrans.config import ModelConfig
from mantrans.kernels import native, reference, triton
from mantrans.kernels.triton import cross_entropy
from mantrans.kernels.triton import embedding as kernels
from mantrans.models.transformer import CustomTransformer
from mantrans.optim import OPTIMIZERS, Optimizer
from mantrans.parameters import Parameters
from tests.kernels.common import generator, normal

BACKENDS = {"reference": reference, "native": native, "triton": triton}
# The package shows the function of this name.
triton_norm = importlib.import_module("mantrans.kernels.triton.gradient_norms")

IGNORED = reference.IGNORE_INDEX
LOWEST = torch.finfo(torch.float32).min
INF, NAN = math.inf, math.nan

# float64 runs in reference and native only; Triton's kernels differ by dtype in what they load
WAYS = [
    pytest.param(
        ops,
        dtype,
        id=f"{name} {str(dtype).removeprefix('torch.')}",
        marks=[pytest.mark.slow] if (ops, dtype) == (triton, torch.bfloat16) else [],
    )
    for (name, ops), dtype in itertools.product(
        BACKENDS.items(), (torch.float32, torch.bfloat16, torch.float64)
    )
    if ops is not triton or dtype != torch.float64
]
each_way = pytest.mark.parametrize("ops, dtype", WAYS)
each_backend = pytest.mark.parametrize("ops", BACKENDS.values(), ids=BACKENDS.keys())
wide = reference.wide_dtype


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter runs one after the other."""
    monkeypatch.setattr(triton_norm, "PROGRAMS", 4)
    monkeypatch.setattr(triton_norm, "BLOCK", 2**14)


def one(dtype: torch.dtype) -> Tensor:
    return torch.ones((), dtype=wide(dtype))


def loss_of(ops, logits: Tensor, targets: Tensor, vocab_size: int | None = None):
    """(losses, dlogits) in float64. Forward and backward apart must agree with both in one, and the
    forward must leave the logits as they are."""
    V = vocab_size or logits.shape[1]
    together, apart, scale = logits.clone(), logits.clone(), one(logits.dtype)
    losses = ops.cross_entropy_forward_backward(together, targets, scale, V)
    again, normalizer = ops.cross_entropy_forward(apart, targets, V)
    assert torch.equal(apart.nan_to_num(7), logits.nan_to_num(7))
    assert normalizer.shape == (len(logits), 2) and normalizer.dtype == wide(logits.dtype)
    torch.testing.assert_close(again, losses, rtol=1e-6, atol=0, equal_nan=True)
    ops.cross_entropy_backward(apart, targets, normalizer, scale, V)
    tolerance = {torch.bfloat16: 2**-7, torch.float32: 2e-6, torch.float64: 1e-12}[logits.dtype]
    torch.testing.assert_close(apart, together, rtol=tolerance, atol=tolerance, equal_nan=True)
    return losses.double(), together.double()


def exact_loss(logits: Tensor, targets: Tensor):
    """(losses, dlogits) from sums of exponentials of differences, in float64."""
    z = logits.double()
    picked = z.gather(1, targets[:, None])
    others = torch.exp(z - picked).scatter(1, targets[:, None], 0)
    rest = others.sum(1, keepdim=True)
    dz = (others / (1 + rest)).scatter(1, targets[:, None], -rest / (1 + rest))
    return torch.log1p(rest)[:, 0], dz


# ------------------------------------------------------------------------------- the loss alone


@each_way
@pytest.mark.parametrize("v", [1e4, 1e8, -3e38])
@pytest.mark.parametrize("V", [2, 700])
def test_cross_entropy_equal_logits(ops, dtype, v, V):
    """V equal logits have the loss log V, wherever they lie."""
    targets = torch.tensor([0, V - 1])
    losses, dz = loss_of(ops, torch.full((2, V), v).to(dtype), targets)
    torch.testing.assert_close(losses, torch.full((2,), math.log(V)).double(), rtol=3e-7, atol=0)
    assert dz.sum(1).abs().max() < (1e-6 if dtype != torch.bfloat16 else 2**-7)


@each_way
@pytest.mark.parametrize("shift", [256.0, -(2.0**15)])
def test_cross_entropy_shifted_logits(ops, dtype, shift):
    """Whole numbers that stay exact when they are shifted: the same losses and gradients."""
    if dtype == torch.bfloat16 and abs(shift) > 256:
        pytest.skip("bfloat16 has no neighbors of 32768 that are 1 apart")
    z = (2 * normal(generator(1), 2, 300)).round()
    targets = torch.tensor([7, 299])
    shifted = (z + shift).to(dtype)
    want_losses, want_dz = exact_loss(shifted, targets)
    losses, dz = loss_of(ops, shifted, targets)
    torch.testing.assert_close(losses, want_losses, rtol=5e-7, atol=0)
    tolerance = 2**-8 if dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(dz, want_dz, rtol=tolerance, atol=1e-9)


@each_way
@pytest.mark.parametrize("gap", [0.0, 15.0, 85.0])
@pytest.mark.parametrize("V", [2, 1025])
def test_cross_entropy_small_losses(ops, dtype, gap, V):
    """The target leads by `gap`: the loss is log1p((V - 1) exp(-gap)), 3.06e-7 for [50, 35]."""
    for place in (0, V - 1):
        logits = torch.full((1, V), 50 - gap).to(dtype)
        logits[0, place] = 50
        losses, dz = loss_of(ops, logits, torch.tensor([place]))
        want_loss, want_dz = exact_loss(logits, torch.tensor([place]))
        torch.testing.assert_close(losses, want_loss, rtol=2e-5, atol=0)
        tolerance = 2**-8 if dtype == torch.bfloat16 else 2e-5
        torch.testing.assert_close(dz, want_dz, rtol=tolerance, atol=0)
        assert dz.sum().abs() <= 2**-7 * dz.abs().max()


@each_way
def test_cross_entropy_gradient_sum(ops, dtype):
    """In float32 to a few roundings of the largest of them, however far apart the logits are."""
    for std, size in ((3.0, 70), (30.0, 1500), (1e6, 9)):
        logits = (std * normal(generator(size), 2, size)).to(dtype)
        targets = torch.tensor([size - 1, int(logits[1].argmax())])
        _, dz = loss_of(ops, logits, targets)
        limit = {torch.bfloat16: 2**-6, torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
        assert (dz.sum(1).abs() <= limit * dz.abs().amax(1)).all(), (std, size)


@each_way
@pytest.mark.parametrize("low", [-2e38, -3.3e38, -INF])
@pytest.mark.parametrize("V, Vp", [(3, 3), (520, 640)])
def test_cross_entropy_lowest_logits(ops, dtype, low, V, Vp):
    """All as low as they can be, or all but one; the padding is higher, and counts for nothing."""
    targets = torch.tensor([0, V - 1, V - 1])
    logits = torch.full((3, Vp), 3e38).to(dtype)
    logits[:, :V] = low
    logits[1, V - 1] = -1e30  # the only one that counts
    logits[2, 0] = 2.0
    logits[2, V - 1] = 1.0
    losses, dz = loss_of(ops, logits, targets, V)
    if low == -INF:
        assert losses[0].isnan()  # 0/0, as in PyTorch
        dz = dz[1:]
    else:
        torch.testing.assert_close(losses[0], torch.tensor(math.log(V)).double(), rtol=3e-7, atol=0)
        want = torch.full((V,), 1 / V).double()
        want[0] -= 1
        torch.testing.assert_close(dz[0, :V], want, rtol=4e-3, atol=0)
    assert losses[1] == 0
    torch.testing.assert_close(losses[2], torch.tensor(math.log1p(math.e)).double())
    assert dz.isfinite().all() and not dz[:, V:].any()


@each_way
def test_cross_entropy_infinite_logits(ops, dtype):
    """The losses are PyTorch's."""
    rows = [
        ([INF, 0.0, 1.0], 0), ([INF, 0.0, 1.0], 1), ([INF, INF, 1.0], 0), ([0.0, -INF, 1.0], 1),
        ([-INF, -INF, -INF], 0), ([NAN, 0.0, 1.0], 1), ([0.0, 1.0, NAN], 2), ([-INF, 5.0, -INF], 1),
        ([-3.3e38, -INF, -3.3e38], 0), ([3e38, -3e38, 0.0], 0),
    ]  # fmt: skip
    logits = torch.tensor([row for row, _ in rows]).to(dtype)
    targets = torch.tensor([target for _, target in rows])
    losses, dz = loss_of(ops, logits, targets)
    narrow = logits.to(wide(dtype))
    want = torch.nn.functional.cross_entropy(narrow, targets, reduction="none").double()
    torch.testing.assert_close(losses, want, rtol=1e-6, atol=0, equal_nan=True)
    assert dz[want.isnan()].isnan().any(1).all()  # never a silent 0
    assert dz[want == INF].isfinite().all() and dz[7:].isfinite().all()


def test_cross_entropy_triton_lowest_blocks(monkeypatch):
    """Rows of several blocks, of which some hold nothing but the lowest."""
    monkeypatch.setattr(cross_entropy, "MAX_WARPS", 2)
    for low in (-INF, -3e38):
        logits = torch.full((2, 2200), low)
        logits[0, 2199] = logits[1, 700] = LOWEST / 2
        targets = torch.tensor([2199, 2199])
        losses, _ = loss_of(triton, logits, targets)
        assert losses[0] == 0 and losses[1] > 1e38


# ------------------------------------------------------------------- what is ignored is nothing

BAD = [NAN, INF, 3e38]


@each_way
@pytest.mark.parametrize("bad", BAD)
def test_cross_entropy_ignored_anything(ops, dtype, bad):
    """Ignored logits may hold anything."""
    logits = normal(generator(3), 4, 130).to(dtype)
    targets = torch.tensor([3, IGNORED, 100, IGNORED])
    want_losses, want = loss_of(ops, logits, targets, 128)
    logits[targets == IGNORED] = bad
    logits[:, 128:] = bad
    losses, dz = loss_of(ops, logits, targets, 128)
    assert torch.equal(losses, want_losses) and torch.equal(dz, want)
    assert not losses[targets == IGNORED].any() and not dz[targets == IGNORED].any()


@each_way
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("chunk_rows", [None, 3])
def test_linear_cross_entropy_ignored_anything(ops, dtype, bad, chunk_rows):
    """Loss, dx and dweight are what they are with zeros in those rows, bit for bit; x stays."""
    source = generator(4)
    x, weight = normal(source, 5, 8).to(dtype), normal(source, 128, 8).to(dtype)
    targets = torch.randint(0, 100, (5,), generator=source)
    targets[::3] = IGNORED
    results = []
    for value in (0.0, bad):
        x[::3] = value
        before, dweight = x.clone(), torch.ones(128, 8, dtype=wide(dtype))
        loss, dx = ops.linear_cross_entropy_forward_backward(
            x, weight, targets, one(dtype), dweight, 100, True, chunk_rows
        )
        losses = ops.linear_cross_entropy_forward(x, weight, targets, 100)
        assert torch.equal(x.nan_to_num(), before.nan_to_num())
        assert not losses[::3].any() and not dx[::3].any()
        results.append((loss, dx, dweight, losses))
    for clean, dirty in zip(*results, strict=True):
        assert clean.isfinite().all() and torch.equal(clean, dirty)


@each_backend
def test_linear_cross_entropy_ignored_overflow(ops):
    x = torch.tensor([[1e25, 0.0], [1e-20, 0.0]])
    weight = torch.tensor([[1e20, 0.0], [0.0, 1.0], [0.0, 0.0]])
    dweight = torch.zeros(3, 2)
    targets = torch.tensor([IGNORED, 1])
    arguments = (x, weight, targets, torch.tensor(1.0), dweight, 3)
    loss, dx = ops.linear_cross_entropy_forward_backward(*arguments)
    assert loss.isfinite() and dx.isfinite().all() and dweight.isfinite().all()
    assert dx[0].tolist() == [0, 0] and dx[1, 0] > 0


@each_backend
@pytest.mark.parametrize("bad", [NAN, INF])
def test_update_refused(ops, bad):
    """Whatever its gradients hold: weights and moments keep their bits, and so the next step's."""
    states = []
    for poisoned in (True, False):
        parameters = small_parameters(ops, torch.float32)
        optimizer = OPTIMIZERS["adamw"](ops, parameters)
        if poisoned:
            parameters.gradients.fill_(bad)
            assert not take(optimizer).applied
        parameters.gradients.copy_(normal(generator(8), len(parameters.gradients)))
        assert take(optimizer).applied
        states.append([parameters.weights, parameters.updates, *optimizer.state().values()])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


# -------------------------------------------------------------------------- sums of many numbers


def relative(actual: Tensor, exact: Tensor | float) -> float:
    exact = torch.as_tensor(exact, dtype=torch.float64)
    return float(((actual.double() - exact).abs() / exact.abs()).max())


# normal numbers average their rounding errors; equal ones are all rounded the same way
FILLINGS = {"normal": None, "a tenth": 0.1, "a third": 1 / 3}
each_filling = pytest.mark.parametrize("value", FILLINGS.values(), ids=FILLINGS.keys())


def filled(P: int, value: float | None) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(P) if value is None else torch.full((P,), value)


@each_backend
@each_filling
@pytest.mark.parametrize("P", [1, 256, 70_003, 2**22 + 5])
def test_gradient_norm_digits(ops, value, P):
    gradients = filled(P, value)
    exact = gradients.double().square().sum().sqrt()
    assert relative(ops.gradient_norms(gradients, 1)[0], exact) < 5e-7


@pytest.mark.slow
@each_backend
@each_filling
def test_gradient_norm_gpt2_size(ops, value):
    gradients = filled(124_000_000, value)
    exact = sum(part.double().square().sum() for part in gradients.split(2**22)).sqrt()
    assert relative(ops.gradient_norms(gradients, 1)[0], exact) < 5e-7


@each_backend
@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e-20, 1e12, 1e19, 1e38])
def test_gradient_norm_extreme(ops, size):
    """A square that float32 cannot hold is no reason for 0 or infinity."""
    gradients = size * normal(generator(5), 3000).clamp(-3, 3)
    gradients[1000:2000] *= 1e-3
    exact = gradients.double().square().sum().sqrt()
    assert exact > 0 and relative(ops.gradient_norms(gradients, 1)[0], exact) < 5e-7


@pytest.mark.parametrize("ops", [reference, native], ids=["reference", "native"])
@pytest.mark.parametrize("size", [1e-300, 1e-150, 1e200, 1e306])
def test_gradient_norm_extreme_float64(ops, size):
    gradients = size * normal(generator(5), 300).double()
    exact = size * (gradients / size).square().sum().sqrt()
    assert relative(ops.gradient_norms(gradients, 1)[0], exact) < 1e-13


@each_backend
def test_gradient_norm_zero_or_not_finite(ops):
    assert ops.gradient_norms(torch.zeros(1000), 1)[0] == 0
    for bad, place in ((NAN, 0), (INF, 500), (-INF, 999)):
        gradients = torch.ones(1000)
        gradients[place] = bad
        assert not ops.gradient_norms(gradients, 1)[0].isfinite()


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [0.1, 0.7])
def test_embedding_backward_frequent_token(ops, dtype, value):
    """One token nearly everywhere, and one position table row for all sequences."""
    B, T = (512, 128) if ops is not triton else (16, 16)
    tokens = torch.full((B, T), 3)
    tokens[::5, 7] = 1
    dx = torch.full((B, T, 8), value).to(dtype)
    dtokens, dpositions = torch.zeros(6, 8), torch.zeros(T, 8)
    ops.embedding_backward(dx, tokens, dtokens, dpositions)
    exact = float(dx[0, 0, 0])
    counts = torch.bincount(tokens.flatten(), minlength=6)[:, None]
    occurs = counts[:, 0] > 0
    assert relative(dtokens[occurs], (counts * exact).expand(6, 8)[occurs]) < 5e-7
    assert not dtokens[~occurs].any()
    assert relative(dpositions, B * exact) < 5e-7


@pytest.mark.parametrize("ops", [reference, native], ids=["reference", "native"])
def test_embedding_backward_frequent_token_float64(ops):
    dtokens, dpositions = torch.zeros(3, 4).double(), torch.zeros(64, 4).double()
    tokens = torch.ones(256, 64).long()
    ops.embedding_backward(
        torch.full((256, 64, 4), 0.1, dtype=torch.float64), tokens, dtokens, dpositions
    )
    assert relative(dtokens[1], 256 * 64 * 0.1) < 1e-11


def test_embedding_backward_joined_pieces():
    """2^16 rows of one token: too many for the interpreter, but not their pieces of 32 rows."""
    n = 2**16
    chunks = n // kernels.CHUNK
    piece = torch.tensor(0.1) * kernels.CHUNK
    partials = piece.expand(chunks, 2, 4).contiguous()
    dtable = torch.zeros(2, 4)
    kernels.join_pieces_kernel[(1, 1)](
        torch.ones(n, dtype=torch.int32), dtable, partials, n, 2, 4,
        CHUNK=kernels.CHUNK, ROWS=kernels.ROWS_AT_ONCE, BLOCK_COLUMNS=4,
    )  # fmt: skip
    assert relative(dtable[1], float(piece) * chunks) < 3e-7


@each_backend
@pytest.mark.parametrize("value", [0.1, 0.7])
def test_bias_gradient_many_rows(ops, value):
    """The third run adds to what is there."""
    rows = 2**20 if ops is not triton else 2**10
    dy = torch.full((rows, 4), value)
    dbias = torch.zeros(4)
    for _ in range(3):
        ops.bias_gradient(dy, dbias)
    assert relative(dbias, 3 * rows * float(dy[0, 0])) < 1e-6


@each_backend
def test_partial_sums_many_rows(ops):
    """As many as an H100 has programs at a time. The interpreter adds one after the other where a
    GPU adds in a tree."""
    partials, total = torch.full((528, 5), 0.1), torch.ones(5)
    exact = 1 + 528 * float(partials[0, 0])
    ops.sum_partials(partials, total)
    assert relative(total, exact) < (2e-6 if ops is triton else 5e-7) and not partials.any()


@each_backend
def test_cross_entropy_many_rows(ops):
    """Equal rows: the sum of their losses is the loss of one, times their number."""
    N = 20_000 if ops is not triton else 20
    x, weight = torch.full((N, 4), 0.3), normal(generator(6), 4, 4)
    targets = torch.ones(N).long()
    scale, dweight = torch.tensor(1 / N), torch.zeros(4, 4)
    loss, _ = ops.linear_cross_entropy_forward_backward(x, weight, targets, scale, dweight, 4)
    exact, _ = exact_loss(x[:1].double() @ weight.double().T, targets[:1])
    assert loss.dtype == torch.float32 and relative(loss, exact[0]) < 5e-7


# ------------------------------------------------------------------------------------- updates


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


@each_backend
@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [6.8e19, 1e38])
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
    return {"epsilon": 1e-12} if name == "adamw" else {}


@each_backend
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


@each_backend
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
