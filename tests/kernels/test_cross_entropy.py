"""Softmax cross-entropy, alone and fused with the output projection, against the reference."""

from __future__ import annotations

import pytest
import torch

from mantrans.kernels import reference
from mantrans.kernels.native import row_chunks
from mantrans.kernels.triton import cross_entropy
from tests.kernels.common import (
    SUM_TOLERANCE,
    TOLERANCE,
    each_dtype,
    generator,
    normal,
    random_gradients,
)
from tests.support.compare import assert_close

IGNORED = reference.IGNORE_INDEX
SCALE = torch.tensor(0.25)

# (N, V, Vp): one column; odd and unpadded, below a lane's share; padded within one block; a whole
# block and nothing else; a vocabulary that ends one column into padding's block; the largest block,
# whole, with a rest; the same with the rest in padding alone.
SHAPES = [
    (1, 1, 1),
    (5, 7, 7),
    (3, 100, 128),
    (3, 512, 512),
    (4, 1025, 1152),
    (2, 16500, 16512),
    (2, 16384, 16512),
]

each_shape = pytest.mark.parametrize("N, V, Vp", SHAPES, ids=str)


def problem(N, V, Vp, dtype):
    """Logits with NaN in the padding, which no result may see, and targets with one ignored."""
    source = generator(N, V, Vp)
    logits = 3 * normal(source, N, Vp, dtype=dtype)
    logits[:, V:] = float("nan")
    targets = torch.randint(0, V, (N,), generator=source)
    targets[-1] = V - 1  # the last column that counts
    if N > 1:
        targets[0] = IGNORED
    return logits, targets


@each_dtype
@each_shape
def test_cross_entropy_forward(N, V, Vp, dtype):
    logits, targets = problem(N, V, Vp, dtype)
    before = logits.clone()
    losses, normalizer = cross_entropy.cross_entropy_forward(logits, targets, V)
    expected_losses, expected_normalizer = reference.cross_entropy_forward(logits, targets, V)
    assert_close(losses, expected_losses, SUM_TOLERANCE, "losses")
    counted = targets != IGNORED
    expected_normalizer = expected_normalizer[counted]
    assert_close(normalizer[counted], expected_normalizer, SUM_TOLERANCE, "normalizer")
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())


@each_dtype
@each_shape
def test_cross_entropy_forward_backward(N, V, Vp, dtype):
    logits, targets = problem(N, V, Vp, dtype)
    dlogits, expected = logits.clone(), logits.clone()
    losses = cross_entropy.cross_entropy_forward_backward(dlogits, targets, SCALE, V)
    expected_losses = reference.cross_entropy_forward_backward(expected, targets, SCALE, V)
    assert_close(losses, expected_losses, SUM_TOLERANCE, "losses")
    assert_close(dlogits, expected, TOLERANCE[dtype], "dlogits")
    assert torch.equal(dlogits[:, V:], torch.zeros(N, Vp - V, dtype=dtype))
    assert torch.equal(dlogits[targets == IGNORED], torch.zeros_like(dlogits[targets == IGNORED]))


@each_dtype
@each_shape
def test_cross_entropy_two_steps(N, V, Vp, dtype):
    """Forward, then backward: the same bits as at once."""
    logits, targets = problem(N, V, Vp, dtype)
    at_once = logits.clone()
    cross_entropy.cross_entropy_forward_backward(at_once, targets, SCALE, V)
    _, normalizer = cross_entropy.cross_entropy_forward(logits, targets, V)
    returned = cross_entropy.cross_entropy_backward(logits, targets, normalizer, SCALE, V)
    assert returned is logits
    assert torch.equal(logits, at_once)


def test_cross_entropy_all_ignored():
    logits = normal(generator(1), 3, 130)
    targets = torch.full((3,), IGNORED)
    losses = cross_entropy.cross_entropy_forward_backward(logits, targets, SCALE, 130)
    assert torch.equal(losses, torch.zeros(3))
    assert torch.equal(logits, torch.zeros(3, 130))


def test_cross_entropy_ignored_nan():
    """What is ignored may hold anything."""
    logits = torch.full((1, 64), float("nan"))
    losses = cross_entropy.cross_entropy_forward_backward(
        logits, torch.tensor([IGNORED]), SCALE, 64
    )
    assert losses.item() == 0
    assert torch.equal(logits, torch.zeros(1, 64))


def test_cross_entropy_other_ignore_index():
    logits = normal(generator(2), 2, 16)
    losses, _ = cross_entropy.cross_entropy_forward(logits, torch.tensor([3, 5]), 16, 3)
    expected, _ = reference.cross_entropy_forward(logits, torch.tensor([3, 5]), 16, 3)
    assert losses[0] == 0
    assert_close(losses, expected, SUM_TOLERANCE)


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_cross_entropy_large_logits(shift):
    """exp(1e4) overflows: only differences from the maximum may be exponentiated."""
    logits = normal(generator(3), 2, 200).round() + shift  # exact in float32, shifted or not
    losses, _ = cross_entropy.cross_entropy_forward(logits, torch.tensor([0, 199]), 200)
    expected, _ = reference.cross_entropy_forward(logits.double(), torch.tensor([0, 199]), 200)
    # lse is a float32 near 1e4, whose neighbours are 1e-3 away; the losses are a few units
    assert_close(losses, expected, 5e-4)


def test_cross_entropy_minus_infinity():
    """A forbidden token has probability 0 and no gradient."""
    logits = normal(generator(4), 1, 40)
    logits[0, 7:] = float("-inf")
    expected = logits.clone()
    targets = torch.tensor([2])
    losses = cross_entropy.cross_entropy_forward_backward(logits, targets, SCALE, 40)
    expected_losses = reference.cross_entropy_forward_backward(expected, targets, SCALE, 40)
    assert_close(losses, expected_losses, SUM_TOLERANCE)
    assert_close(logits, expected, SUM_TOLERANCE)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("column", [0, 150])
def test_cross_entropy_logit_not_finite(bad, column):
    """It shows in the loss."""
    logits = normal(generator(5), 1, 200)
    logits[0, column] = bad
    losses, _ = cross_entropy.cross_entropy_forward(logits, torch.tensor([3]), 200)
    assert not torch.isfinite(losses).item()


@pytest.mark.parametrize("target", [200, -1, 2**40])
def test_cross_entropy_target_missing(target):
    """200 is a padded column: there is a number, but not a token."""
    logits = normal(generator(6), 1, 256)
    losses = cross_entropy.cross_entropy_forward_backward(
        logits, torch.tensor([target]), SCALE, 200
    )
    assert losses.isnan().item()
    assert torch.equal(logits[:, 200:], torch.zeros(1, 56))


# ------------------------------------------------------------------------ with the projection


def projection(N, dtype, V=380, Vp=384, C=16):
    """x, weight, targets (one ignored); rows of the weight beyond V are not zero."""
    source = generator(N, V, C)
    x, weight = (normal(source, rows, C, dtype=dtype) for rows in (N, Vp))
    targets = torch.randint(0, V, (N,), generator=source)
    targets[N // 2] = IGNORED
    return x, weight, targets, V


@pytest.fixture(params=[False, True], ids=["one chunk", "chunks"])
def n_rows(request, monkeypatch):
    """19 rows: the workspace holds them all, or 8 at a time, the last chunk being short."""
    if request.param:
        monkeypatch.setattr(cross_entropy, "WORKSPACE_BYTES", 1)
        monkeypatch.setattr(cross_entropy, "CHUNK_ROW_MULTIPLE", 8)
    return 19


# The products are PyTorch's own, and in low precision the logits are rounded between product and
# softmax. A logit near 10 is rounded by 0.02 in bfloat16; where the two products, summed in another
# order, fall on different sides, that is the error of a row's loss.
LOSS_TOLERANCE = {torch.float32: 5e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
# native's weight_gradient on a CPU rounds each chunk's product to the dtype: half its last digit.
WEIGHT_TOLERANCE = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}


@each_dtype
def test_linear_cross_entropy_forward(dtype, n_rows):
    x, weight, targets, V = projection(n_rows, dtype)
    losses = cross_entropy.linear_cross_entropy_forward(x, weight, targets, V)
    expected = reference.linear_cross_entropy_forward(x, weight, targets, V)
    assert losses.dtype == torch.float32
    assert_close(losses, expected, LOSS_TOLERANCE[dtype])


@each_dtype
def test_linear_cross_entropy_forward_backward(dtype, n_rows):
    x, weight, targets, V = projection(n_rows, dtype)
    (dweight,) = random_gradients(generator(7), tuple(weight.shape))
    expected_dweight = dweight.clone()
    loss, dx = cross_entropy.linear_cross_entropy_forward_backward(
        x, weight, targets, SCALE, dweight, V
    )
    expected_loss, expected_dx = reference.linear_cross_entropy_forward_backward(
        x, weight, targets, SCALE, expected_dweight, V
    )
    assert loss.shape == ()
    assert_close(loss, expected_loss, LOSS_TOLERANCE[dtype], "loss")
    assert_close(dx, expected_dx, WEIGHT_TOLERANCE[dtype], "dx")
    assert_close(dweight, expected_dweight, WEIGHT_TOLERANCE[dtype], "dweight")


@pytest.mark.parametrize(
    "n_rows, row_bytes", [(1, 8), (128, 2**21), (129, 2**21), (16384, 100608), (300, 2**29)]
)
def test_linear_cross_entropy_chunks(n_rows, row_bytes):
    """They cover the rows within the workspace."""
    chunks = list(row_chunks(n_rows, cross_entropy.chunk_rows_within(n_rows, row_bytes)))
    assert [row for c in chunks for row in range(c.start, c.stop)] == list(range(n_rows))
    lengths = [c.stop - c.start for c in chunks]
    assert all(length % 128 == 0 for length in lengths[:-1])
    # a row so long that 128 of them do not fit is still taken 128 at a time
    assert max(lengths) * row_bytes <= max(cross_entropy.WORKSPACE_BYTES, 128 * row_bytes)


def test_linear_cross_entropy_no_rows():
    dweight = torch.ones(8, 4)
    loss, dx = cross_entropy.linear_cross_entropy_forward_backward(
        torch.empty(0, 4), torch.ones(8, 4), torch.empty(0).long(), SCALE, dweight, 8
    )
    assert loss.item() == 0
    assert dx.shape == (0, 4)
    assert torch.equal(dweight, torch.ones(8, 4))


def test_cross_entropy_refuses():
    logits, targets = torch.ones(2, 8), torch.zeros(2).long()
    forward = cross_entropy.cross_entropy_forward
    with pytest.raises(ValueError, match=r"logits: expected dtype float32, float16.*, got float64"):
        forward(logits.double(), targets, 8)
    with pytest.raises(ValueError, match="targets: expected dtype int64, got int32"):
        forward(logits, targets.int(), 8)
    with pytest.raises(ValueError, match=r"targets: expected shape \(2\), got \(3,\)"):
        forward(logits, torch.zeros(3).long(), 8)
    with pytest.raises(ValueError, match=r"vocab_size: expected 1 to 8, .*, got 9"):
        forward(logits, targets, 9)
    with pytest.raises(
        ValueError, match=r"logits: expected a contiguous tensor, got strides \(1, 2\)"
    ):
        forward(torch.ones(8, 2).t(), targets, 8)
    with pytest.raises(ValueError, match=r"scale: expected a torch\.Tensor, got float"):
        cross_entropy.cross_entropy_forward_backward(logits, targets, 0.5, 8)
    with pytest.raises(ValueError, match=r"weight: expected dtype bfloat16.*, got float32"):
        cross_entropy.linear_cross_entropy_forward(
            torch.ones(2, 4).bfloat16(), torch.ones(8, 4), targets, 8
        )
