"""The loss where logits are extreme, in all three backends, against float64 or an exact value."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mantrans.kernels import reference, triton
from mantrans.kernels.triton import cross_entropy
from tests.kernels.common import BACKENDS, each_ops, generator, normal, relative

IGNORED = reference.IGNORE_INDEX
LOWEST = torch.finfo(torch.float32).min
INF, NAN = math.inf, math.nan
BAD = [NAN, INF, 3e38]
wide = reference.wide_dtype
# bfloat16 in Triton: slow, since its kernels differ by dtype in what they load and store alone
each_way = pytest.mark.parametrize(
    ("ops", "dtype"),
    [
        pytest.param(*way.values, id=way.id, marks=[pytest.mark.slow])
        if way.values == (triton, torch.bfloat16)
        else way
        for way in BACKENDS
    ],
)


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


@each_ops
def test_linear_cross_entropy_ignored_overflow(ops):
    x = torch.tensor([[1e25, 0.0], [1e-20, 0.0]])
    weight = torch.tensor([[1e20, 0.0], [0.0, 1.0], [0.0, 0.0]])
    dweight = torch.zeros(3, 2)
    targets = torch.tensor([IGNORED, 1])
    arguments = (x, weight, targets, torch.tensor(1.0), dweight, 3)
    loss, dx = ops.linear_cross_entropy_forward_backward(*arguments)
    assert loss.isfinite() and dx.isfinite().all() and dweight.isfinite().all()
    assert dx[0].tolist() == [0, 0] and dx[1, 0] > 0


@each_ops
def test_cross_entropy_many_rows(ops):
    """Equal rows: the sum of their losses is the loss of one, times their number."""
    N = 20_000 if ops is not triton else 20
    x, weight = torch.full((N, 4), 0.3), normal(generator(6), 4, 4)
    targets = torch.ones(N).long()
    scale, dweight = torch.tensor(1 / N), torch.zeros(4, 4)
    loss, _ = ops.linear_cross_entropy_forward_backward(x, weight, targets, scale, dweight, 4)
    exact, _ = exact_loss(x[:1].double() @ weight.double().T, targets[:1])
    assert loss.dtype == torch.float32 and relative(loss, exact[0]) < 5e-7
