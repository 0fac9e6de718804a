"""AdamW, SGD, Muon's momentum and the gradient norm over flat buffers: arithmetic, skipped steps,
rounding."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch

from mantrans.kernels import reference
from mantrans.kernels.triton import adamw, sgd, weights
from tests.kernels.common import SUM_TOLERANCE, generator, normal
from tests.support.compare import assert_close

# The package shows the functions of these names.
gradient_norms = importlib.import_module("mantrans.kernels.triton.gradient_norms")
momentum = importlib.import_module("mantrans.kernels.triton.nesterov_momentum")

BLOCK = weights.BLOCK
SEED = torch.tensor(123_456_789_012_345)  # beyond 32 bits: its lower half is what counts

# How weights can be kept: dtype, master, rounding seed.
WAYS = {
    "fp32": (torch.float32, False, None),
    "fp16 master": (torch.float16, True, None),
    "bf16 master": (torch.bfloat16, True, None),
    "bf16 nearest": (torch.bfloat16, False, None),
    "bf16 stochastic": (torch.bfloat16, False, SEED),
}
# (P, weight decay): one element; a block exactly; several blocks, the last one short; none.
SIZES = [(1, 0.1), (BLOCK, 0.1), (2 * BLOCK + 5, 0.3), (33, 0.0)]

each_way = pytest.mark.parametrize("dtype, has_master, seed", WAYS.values(), ids=WAYS.keys())
each_size = pytest.mark.parametrize("P, weight_decay", SIZES, ids=str)


def buffers(P, dtype, has_master):
    """weights, master, gradients, exp_avg, exp_avg_sq."""
    source = generator(P)
    master = normal(source, P)
    w = master.to(dtype)
    gradients, m = normal(source, P), normal(source, P)
    return [w, master if has_master else None, gradients, 0.1 * m, normal(source, P) ** 2]


def copies(tensors):
    return [None if tensor is None else tensor.clone() for tensor in tensors]


def scalars(finite=True, step=3.0, dtype=torch.float32):
    """step, learning_rate, clip, finite."""
    numbers = [torch.tensor(x, dtype=dtype) for x in (step, 1e-2, 0.7)]
    return [*numbers, torch.tensor(finite)]


def adamw_arguments(weight_decay, seed, offset=0, **options):
    return [*scalars(**options), 0.9, 0.999, 1e-8, weight_decay, seed, offset]


def sgd_arguments(weight_decay, seed, offset=0, **options):
    return [*scalars(**options)[1:], weight_decay, seed, offset]


def assert_same(actual, expected):
    """All buffers after an update. float32 to a rounding or two of each step of the formula.

    Low-precision weights follow their float32 value: they differ in the last digit, 2^-8 at most,
    and only where that value lies on a boundary, one in thousands.
    """
    for name, a, e in zip(("weights", "master", "g", "m", "v"), actual, expected, strict=False):
        if a is not None:
            tolerance = SUM_TOLERANCE if a.dtype == torch.float32 else 1e-4
            assert_close(a, e, tolerance, name)


@each_way
@each_size
def test_adamw_equals_reference(P, weight_decay, dtype, has_master, seed):
    actual = buffers(P, dtype, has_master)
    expected = copies(actual)
    adamw.adamw_update(*actual, *adamw_arguments(weight_decay, seed, offset=7))
    reference.adamw_update(*expected, *adamw_arguments(weight_decay, seed, offset=7))
    assert_same(actual, expected)


@each_way
@each_size
def test_sgd_equals_reference(P, weight_decay, dtype, has_master, seed):
    actual = buffers(P, dtype, has_master)[:3]
    expected = copies(actual)
    sgd.sgd_update(*actual, *sgd_arguments(weight_decay, seed, offset=7))
    reference.sgd_update(*expected, *sgd_arguments(weight_decay, seed, offset=7))
    assert_same(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sgd_narrow_gradients(dtype):
    """As Muon's steps are: the same as of their float32 values, to the last bit."""
    actual = buffers(BLOCK + 5, torch.bfloat16, True)[:3]
    actual[2] = actual[2].to(dtype)
    expected = copies(actual)
    expected[2] = expected[2].float()
    for w in (actual, expected):
        sgd.sgd_update(*w, *sgd_arguments(0.1, None))
    assert all(torch.equal(a, b) for a, b in zip(actual[:2], expected[:2], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("P", [P for P, _ in SIZES])
def test_nesterov_momentum_equals_reference(P, dtype):
    """`update` is written only."""
    found = []
    for ops in (momentum, reference):
        _, _, gradients, m, _ = buffers(P, torch.float32, False)
        update = torch.full((P,), float("nan"), dtype=dtype)
        ops.nesterov_momentum(m, gradients, *scalars()[2:], 0.95, update)
        found.append((m, update))
    assert_close(found[0][0], found[1][0], SUM_TOLERANCE, "m")
    assert_close(found[0][1], found[1][1], SUM_TOLERANCE if dtype == torch.float32 else 1e-4, "u")


@pytest.mark.parametrize("step", [1.0, 2.0, 1e3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adamw_bias_correction(step, dtype):
    """1 - 0.999 must keep its digits, and numbers may come in float64."""
    actual = buffers(64, torch.float32, False)
    expected = copies(actual)
    adamw.adamw_update(*actual, *adamw_arguments(0.0, None, step=step, dtype=dtype))
    reference.adamw_update(*expected, *adamw_arguments(0.0, None, step=step, dtype=dtype))
    assert_same(actual, expected)


def test_adamw_twenty_steps():
    """An oracle of somebody else's: torch.optim.AdamW in float64."""
    w, _, _, m, v = buffers(200, torch.float32, False)
    m.zero_()
    v.zero_()
    theirs = torch.nn.Parameter(w.double())
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    source = generator(20)
    for step in range(1, 21):
        gradients = normal(source, 200)
        theirs.grad = gradients.double()
        optimizer.step()
        numbers = [torch.tensor(x) for x in (float(step), 1e-2, 1.0, True)]
        adamw.adamw_update(w, None, gradients, m, v, *numbers, 0.9, 0.95, 1e-8, 0.1)
    assert_close(w, theirs, 1e-6)


def test_adamw_beta_zero():
    """beta 0 is allowed, though the logarithm that its powers are made from does not exist."""
    actual = buffers(64, torch.float32, False)
    expected = copies(actual)
    arguments = [*scalars(), 0.0, 0.0, 1e-8, 0.1]
    adamw.adamw_update(*actual, *arguments)
    reference.adamw_update(*expected, *arguments)
    assert_same(actual, expected)


@each_way
def test_update_not_finite(dtype, has_master, seed):
    """It changes no bit."""
    actual = buffers(BLOCK + 7, dtype, has_master)
    actual[2][::3] = float("nan")
    before = copies(actual)
    adamw.adamw_update(*actual, *adamw_arguments(0.1, seed, finite=False))
    sgd.sgd_update(*actual[:3], *sgd_arguments(0.1, seed, finite=False))
    clip, finite = scalars(finite=False)[2:]
    momentum.nesterov_momentum(
        actual[3], actual[2], clip, finite, 0.95, torch.empty(len(actual[2]))
    )
    for a, b in zip(actual, before, strict=True):
        if a is not None:
            bits = torch.int32 if a.dtype == torch.float32 else torch.int16
            assert torch.equal(a.view(bits), b.view(bits))


# ------------------------------------------------------------------------ stochastic rounding


def rounded(x, seed):
    """float32 x, rounded by an SGD step that adds it to bfloat16 weights of 0."""
    w = torch.zeros(len(x)).bfloat16()
    one = torch.tensor(1.0)
    sgd.sgd_update(w, None, -x, one, one, torch.tensor(True), 0.0, torch.tensor(seed))
    return w


def test_stochastic_rounding_bits():
    source = generator(9)
    exponents = torch.randint(-30, 30, (3 * BLOCK,), generator=source)
    x = normal(source, 3 * BLOCK) * 10.0**exponents
    for seed in (0, 1, 2**31, 2**62 + 12345, -1):
        expected = reference.round_stochastically(x, torch.tensor(seed))
        assert torch.equal(rounded(x, seed), expected)


def test_stochastic_rounding_seed():
    x = normal(generator(10), BLOCK)
    for a, b in itertools.combinations((rounded(x, seed) for seed in (0, 1, 2)), 2):
        # two independent draws agree on half of what lies anywhere between two bfloat16
        assert 0.2 < (a != b).float().mean() < 0.5


def test_stochastic_rounding_mean():
    """A quarter of the way from one bfloat16 to the next: up in a quarter of the cases."""
    n = 16 * BLOCK
    x = torch.full((n,), 1 + 2**-7 / 4)
    up = (rounded(x, 7).float() > 1).float().mean().item()
    # the standard deviation of such a share is √(¼ · ¾ / n) = 0.0034; five of them
    assert abs(up - 0.25) < 0.017


def test_stochastic_rounding_not_finite():
    """It passes unchanged."""
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, 1.0])
    w = rounded(x, 3)
    assert w[:2].tolist() == [float("inf"), float("-inf")]
    assert w[2].isnan()
    assert w[3:].tolist() == [0.0, 1.0]


# ------------------------------------------------------------------------------ gradient norm


# One element; a block and a bit; more blocks than the programs that are left to share them.
@pytest.mark.parametrize(
    "size, pieces, programs",
    [(1, 1, 1024), (gradient_norms.BLOCK + 3, 3, 1024), (30000, 2, 2)],
)
def test_gradient_norms(size, pieces, programs, monkeypatch):
    monkeypatch.setattr(gradient_norms, "PROGRAMS", programs)
    gradients = normal(generator(size), size * pieces)
    norms = gradient_norms.gradient_norms(gradients, pieces)
    assert norms.shape == (pieces,)
    assert_close(norms, reference.gradient_norms(gradients.double(), pieces), SUM_TOLERANCE)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_gradient_norms_not_finite(bad, monkeypatch):
    monkeypatch.setattr(gradient_norms, "BLOCKS", 1)
    gradients = torch.ones(15000)
    gradients[4321] = bad
    finite = gradient_norms.gradient_norms(gradients, 3).isfinite()
    assert finite.tolist() == [False, True, True]


# ------------------------------------------------------------------------------------ refusals


def refuses(message, change):
    """An AdamW step with one argument changed raises ValueError with this message."""
    names = ["weights", "master", "gradients", "exp_avg", "exp_avg_sq", "step", "learning_rate"]
    names += ["clip", "finite", "beta1", "beta2", "eps", "weight_decay"]
    names += ["rounding_seed", "offset"]
    values = buffers(8, torch.float16, True) + adamw_arguments(0.1, None)
    arguments = dict(zip(names, values, strict=True)) | change
    with pytest.raises(ValueError, match=message):
        adamw.adamw_update(**arguments)


def test_update_refuses():
    refuses("weights: expected dtype float32.*, got float64", {"weights": torch.ones(8).double()})
    refuses("master: expected dtype float32.*, got float16", {"master": torch.ones(8).half()})
    refuses(r"exp_avg: expected shape \(8\), got \(7,\)", {"exp_avg": torch.ones(7)})
    refuses("step: expected a torch.Tensor, got float", {"step": 1.0})
    refuses("step: expected dtype float32, float64, got int64", {"step": torch.tensor(1)})
    refuses("finite: expected dtype bool, got float32", {"finite": torch.tensor(1.0)})
    refuses("beta2: expected at least 0 and below 1, got 1.0", {"beta2": 1.0})
    refuses("rounding_seed: expected None .*torch.float16", {"rounding_seed": SEED})
    with pytest.raises(ValueError, match=r"gradients: expected shape \(8\), got \(7,\)"):
        sgd.sgd_update(torch.ones(8), None, torch.ones(7).half(), *sgd_arguments(0.1, None))
    with pytest.raises(ValueError, match=r"exp_avg: expected dtype float32.*, got float16"):
        momentum.nesterov_momentum(
            torch.ones(8).half(), torch.ones(8), *scalars()[2:], 0.95, torch.ones(8)
        )
    with pytest.raises(ValueError, match=r"gradients: expected dtype float32.*, got bfloat16"):
        gradient_norms.gradient_norms(torch.ones(8).bfloat16(), 1)
    with pytest.raises(ValueError, match="gradients: expected a multiple of 3 pieces, got 8"):
        gradient_norms.gradient_norms(torch.ones(8), 3)
