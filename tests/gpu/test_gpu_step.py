"""The captured step on a GPU: the eager step's bits, no question to the device, refusals obeyed.

`tests/mantrans/training/test_step.py` tests the same logic without a GPU, where the graph is a
direct call. What only a GPU can show is here: that everything the step does can be captured, that
replaying reads what was written before the replay, and that copies on another stream arrive in
time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from mantrans.optim.guards import OutlierGuard
from mantrans.training.batches import DeviceTokens, HostTokens
from tests.gpu.small_runs import (
    END_OF_TEXT,
    PlainTokens,
    build,
    everything,
    loader,
    train,
)
from tests.support.compare import assert_same_bits

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float32]


class EveryThird:
    """A guard that refuses the third step, the sixth, …; counted on the device."""

    def __init__(self, device: torch.device) -> None:
        self.asked = torch.zeros((), dtype=torch.int64, device=device)

    def allows(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        self.asked += 1
        return self.asked % 3 != 0

    def state(self) -> dict[str, Tensor]:
        return {"asked": self.asked}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("end_of_text", [None, END_OF_TEXT])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_captured_step_equals_eager(
    device: torch.device,
    dtype: torch.dtype,
    micro_batches: int,
    end_of_text: int | None,
    optimizer: str,
) -> None:
    """With accumulation, with documents, under guards that refuse some steps; and both repeat."""

    def run(capture: bool) -> tuple[list, dict[str, Tensor]]:
        guards = [OutlierGuard(0.5, 4, device), EveryThird(device)]
        wrapper, step = build(
            device, dtype, micro_batches=micro_batches, end_of_text=end_of_text, capture=capture,
            guards=guards, model={"optimizer": optimizer},
        )  # fmt: skip
        records = train(step, range(12))
        return records, everything(wrapper) | guards[0].state() | guards[1].state()

    eager_records, eager = run(capture=False)
    for capture in (True, True, False):
        records, state = run(capture)
        assert records == eager_records
        assert_same_bits(state, eager)
    assert all(math.isfinite(record.loss) for record in eager_records)
    assert not any(record.applied for record in eager_records[2::3])
    assert all(record.applied for record in eager_records[:2])


@pytest.mark.parametrize("recompute", ["gelu", "block"])
def test_recompute_same_bits(device: torch.device, recompute: str) -> None:
    """Recomputing activations changes no bit."""

    def run(mode: str) -> tuple[list, dict[str, Tensor]]:
        wrapper, step = build(device, model={"recompute": mode}, capture=True)
        return train(step), everything(wrapper)

    (records, state), (kept_records, kept) = run(recompute), run("none")
    assert records == kept_records
    assert_same_bits(state, kept)


def test_stochastic_rounding_each_replay(device: torch.device) -> None:
    """Stochastic rounding draws anew in each replay."""

    def run(capture: bool) -> tuple[list, dict[str, Tensor]]:
        wrapper, step = build(device, model={"stochastic_rounding": True}, capture=capture)
        return train(step), everything(wrapper)

    (records, state), (eager_records, eager) = run(True), run(False)
    assert records == eager_records and "master" not in state
    assert_same_bits(state, eager)


@pytest.mark.parametrize("capture", [True, False], ids=["captured", "eager"])
@pytest.mark.parametrize("source", [HostTokens, DeviceTokens])
def test_batches_run_ahead(device: torch.device, source: type, capture: bool) -> None:
    """The host runs forty steps ahead of the device; each step must still see its own batch."""
    numbers = range(40)
    plain_model, plain = build(device, source=PlainTokens, capture=False)
    expected = train(plain, numbers)
    for _ in range(3):
        wrapper, step = build(device, source=source, capture=capture)
        assert train(step, numbers) == expected
        assert_same_bits(everything(wrapper), everything(plain_model))


@pytest.mark.parametrize("source", [HostTokens, DeviceTokens])
def test_batches_out_of_order(device: torch.device, source: type) -> None:
    """A resumed run starts anywhere; what was fetched ahead is then of no use."""
    batches = loader()
    tokens = source(batches, device)
    for step in (0, 1, 7, 7, 3, 4):
        tokens.load(step)
        assert torch.equal(tokens.rows().cpu(), batches.batch(step))


@contextmanager
def no_synchronization() -> Iterator[None]:
    """PyTorch raises where the host would wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_synchronization_watch(device: torch.device) -> None:
    with no_synchronization(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones((), device=device).item()


@pytest.mark.parametrize("capture", [True, False], ids=["captured", "eager"])
@pytest.mark.parametrize("source", [HostTokens, DeviceTokens])
def test_step_no_synchronization(device: torch.device, source: type, capture: bool) -> None:
    """With all that a step can have: accumulation, documents, a guard."""
    _, step = build(
        device, source=source, capture=capture, micro_batches=2, end_of_text=END_OF_TEXT,
        guards=[OutlierGuard(3.0, 4, device)],
    )  # fmt: skip
    step.run(0, 1e-3)  # compiles, captures
    with no_synchronization():
        for i in range(1, 6):
            step.run(i, 1e-3)
    assert len(step.read()) == 6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", ["weights", "gradients"])
def test_replay_not_finite(
    device: torch.device, dtype: torch.dtype, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay that is not finite changes nothing."""
    poison = torch.zeros((), device=device)
    wrapper, step = build(device, dtype, capture=True)
    model = wrapper.model
    forward_backward = model.forward_backward

    def poisoned(*arguments: Tensor, **options: bool) -> Tensor:
        loss = forward_backward(*arguments, **options)
        model.parameters.gradients[3] += poison
        return loss

    monkeypatch.setattr(model, "forward_backward", poisoned)
    train(step, range(2))
    kept = model.parameters.weights[5].clone()
    if where == "weights":  # the loss becomes NaN
        model.parameters.weights[5] = math.nan
    else:
        poison.fill_(math.inf)
    before = everything(wrapper)
    (record,) = train(step, range(2, 3))
    assert not record.applied
    assert math.isfinite(record.loss) == (where == "gradients")
    assert_same_bits(everything(wrapper), before)
    model.parameters.weights[5] = kept
    poison.zero_()
    (record,) = train(step, range(3, 4))
    assert record.applied and math.isfinite(record.loss)


def test_replay_guards(device: torch.device) -> None:
    """Guards are asked in every replay and obeyed."""
    guard = EveryThird(device)
    wrapper, step = build(device, capture=True, guards=[guard])
    train(step, range(2))
    assert guard.asked == 2  # the runs that the capture took are forgotten
    before = everything(wrapper)
    (record,) = train(step, range(2, 3))
    assert not record.applied and math.isfinite(record.loss)
    assert_same_bits(everything(wrapper), before)
    (record,) = train(step, range(3, 4))
    assert record.applied and guard.asked == 4


def test_replay_learning_rate(device: torch.device) -> None:
    wrapper, step = build(device, capture=True)
    step.run(0, 1e-3)
    before = everything(wrapper)
    step.run(1, 0.0)
    after = everything(wrapper)
    assert torch.equal(after["master"], before["master"])
    assert not torch.equal(after["exp_avg"], before["exp_avg"])
    step.run(2, 1e-3)
    assert not torch.equal(everything(wrapper)["master"], before["master"])
    assert all(record.applied for record in step.read())
