"""The training step: captured and eager agree to the bit, refusals change nothing, guards guard.

Without a GPU the graph is replaced by a direct call: all the rest of the captured path (warm-up
with the switch off, static inputs, results kept on the device) is the real one.
"""

from __future__ import annotations

import math
import types

import pytest
import torch
from torch import Tensor

from mantrans import CustomTransformerWrapper
from mantrans.kernels import native
from mantrans.kernels.reference import document_starts
from mantrans.optim.guards import OutlierGuard
from mantrans.training import step as step_module
from mantrans.training.batches import DeviceTokens, HostTokens
from mantrans.training.diagnosis import first_non_finite
from mantrans.training.step import TrainStep
from tests.support.compare import assert_same_bits

V, B, T, EOT = 53, 4, 12, 0
CPU = torch.device("cpu")


class Loader:
    """Windows of a fixed random stream, as `mantrans.data.loader.BatchLoader` gives them."""

    def __init__(self) -> None:
        self.stream = self
        self.tokens = torch.randint(0, V, (999,), generator=torch.Generator().manual_seed(0))
        self.tokens = self.tokens.numpy().astype("uint16")
        self.batch_size, self.length = B, T

    def window_starts(self, step: int):
        generator = torch.Generator().manual_seed(step)
        return torch.randint(0, 999 - T - 1, (B,), generator=generator).numpy()

    def batch(self, step: int) -> Tensor:
        rows = [self.tokens[s : s + T + 1] for s in self.window_starts(step)]
        return torch.stack([torch.from_numpy(r.astype("int64")) for r in rows])


def build(dtype: torch.dtype = torch.float32, source=HostTokens, **options):
    wrapper = CustomTransformerWrapper(
        vocab_size=V, d_model=16, n_blocks=2, n_heads=2, max_seq_len=T, dtype=dtype, device="cpu",
        optimizer="adamw",
    )  # fmt: skip
    return wrapper, TrainStep(
        wrapper.model, wrapper.optimizer, source(Loader(), CPU), history=16, **options
    )


def train(step: TrainStep, n: int = 6) -> list:
    for i in range(n):
        step.run(i, 1e-2 / (i + 1))
    return step.read()


def everything(wrapper: CustomTransformerWrapper) -> dict[str, Tensor]:
    p, o = wrapper.model.parameters, wrapper.optimizer
    found = {"weights": p.weights, "updates": p.updates, **o.state()}
    if p.master is not None:
        found["master"] = p.master
    return {name: x.clone() for name, x in found.items()}


@pytest.fixture
def direct_graph(monkeypatch) -> list[int]:
    """A graph that is a direct call, after as many warm-up runs as the real one makes."""
    runs = []

    def stand_in(function):
        for _ in range(step_module.WARM_UP_RUNS + 1):
            function()
        runs.append(step_module.WARM_UP_RUNS + 1)
        return function

    monkeypatch.setattr(step_module, "cuda_graph", stand_in)
    return runs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("micro_batches", [1, 2, 4])
@pytest.mark.parametrize("end_of_text", [None, EOT])
def test_captured_step_equals_eager(direct_graph, dtype, micro_batches, end_of_text) -> None:
    def run(capture: bool):
        guard = OutlierGuard(3.0, 8, CPU)
        wrapper, step = build(
            dtype, micro_batches=micro_batches, end_of_text=end_of_text, capture=capture,
            guards=[guard],
        )  # fmt: skip
        return train(step), everything(wrapper) | guard.state()

    eager_records, eager = run(capture=False)
    assert not direct_graph
    captured_records, captured = run(capture=True)
    assert direct_graph and eager_records == captured_records
    assert_same_bits(eager, captured)


def test_tokens_host_or_device() -> None:
    host, device = HostTokens(Loader(), CPU), DeviceTokens(Loader(), CPU)
    for step in (0, 7, 3):
        host.load(step), device.load(step)
        assert torch.equal(host.rows(), device.rows())
    assert DeviceTokens(Loader(), CPU).rows().dtype == torch.int64


def test_tokens_large_ids() -> None:
    """They survive the signed storage."""
    loader = Loader()
    loader.tokens[:] = 65_535
    source = DeviceTokens(loader, CPU)
    source.load(0)
    assert (source.rows() == 65_535).all()


def test_documents_isolated() -> None:
    """With boundaries, what stands before an end-of-text token does not change what follows."""
    wrapper, _ = build(torch.float64)
    tokens = torch.randint(1, V, (1, T), generator=torch.Generator().manual_seed(5))
    tokens[0, 5] = EOT
    other = tokens.clone()
    other[0, :5] = (other[0, :5] + 7) % (V - 1) + 1
    targets = torch.full_like(tokens, 3)
    a, b = (wrapper.model.losses(x, targets, document_starts(x, EOT)) for x in (tokens, other))
    assert torch.equal(a[6:], b[6:]) and not torch.equal(a[:5], b[:5])
    a, b = (wrapper.model.losses(x, targets) for x in (tokens, other))
    assert not torch.equal(a[6:], b[6:])


def test_step_equals_wrapper() -> None:
    """The same arithmetic, reached from either side."""
    wrapper, step = build()
    step.run(3, 1e-2)
    other, _ = build()
    rows = Loader().batch(3)
    labels = torch.cat([rows[:, :1], rows[:, 1:]], dim=1)
    other.model.zero_gradients()
    targets = rows[:, 1:].contiguous()
    loss = other.accumulate_gradients(rows[:, :-1].contiguous(), targets)
    other.optimizer.step(loss, torch.tensor(1e-2))
    assert labels.shape == rows.shape and step.read()[0].loss == loss.item()
    assert_same_bits(everything(wrapper), everything(other))


@pytest.mark.promise("NaN and infinity")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("where", ["weights", "gradients"])
def test_step_not_finite(dtype, where, monkeypatch) -> None:
    """It is skipped and counted."""
    wrapper, step = build(dtype)
    train(step, 2)
    before = everything(wrapper)
    if where == "weights":  # the loss becomes NaN
        kept = wrapper.model.parameters.weights.clone()
        wrapper.model.parameters.weights[5] = math.nan
        before["weights"][5] = math.nan
    else:  # the loss stays finite, a gradient does not
        original = wrapper.model.forward_backward

        def poisoned(*args, **options):
            loss = original(*args, **options)
            wrapper.model.parameters.gradients[3] = math.inf
            return loss

        monkeypatch.setattr(wrapper.model, "forward_backward", poisoned)
    step.run(2, 1e-2)
    (record,) = step.read()
    assert not record.applied
    assert math.isfinite(record.loss) == (where == "gradients")
    after = everything(wrapper)
    for name in before:
        assert torch.equal(after[name].nan_to_num(7), before[name].nan_to_num(7)), name
    if where == "weights":
        wrapper.model.parameters.weights.copy_(kept)
    monkeypatch.undo()
    step.run(3, 1e-2)
    assert step.read()[0].applied


def test_wrapper_not_finite_status(monkeypatch) -> None:
    wrapper, _ = build()
    ids = torch.randint(0, V, (2, T))
    before = everything(wrapper)
    original = wrapper.model.forward_backward
    monkeypatch.setattr(
        wrapper.model, "forward_backward", lambda *a, **o: original(*a, **o) * math.nan
    )
    assert wrapper.train_step(ids, ids)["status"] == "nan_detected"

    def poisoned(*args, **options):
        loss = original(*args, **options)
        wrapper.model.parameters.gradients[3] = math.nan
        return loss

    monkeypatch.setattr(wrapper.model, "forward_backward", poisoned)
    assert wrapper.train_step(ids, ids)["status"] == "nan_gradient"
    assert_same_bits(before, everything(wrapper))


def attention_broken_when(breaks) -> types.SimpleNamespace:
    """`native`, but one value of attention's output is NaN where breaks(document_start)."""

    def attention_forward(qkv, n_heads, document_start, n_kv_heads):
        out, statistics = native.attention_forward(qkv, n_heads, document_start, n_kv_heads)
        if breaks(document_start):
            out[-1, -1, 0] = math.nan
        return out, statistics

    return types.SimpleNamespace(**{**vars(native), "attention_forward": attention_forward})


@pytest.mark.parametrize("end_of_text", [None, EOT])
def test_diagnose_documents(end_of_text: int | None) -> None:
    """The diagnosis sees what only documents break."""
    wrapper, step = build(end_of_text=end_of_text)
    wrapper.model.blocks[1].attention.ops = attention_broken_when(lambda start: start is not None)
    step.source.load(0)
    said = first_non_finite(wrapper.model, step.batch())
    if end_of_text is None:
        assert "all values are finite" in said
    else:
        assert "blocks.1.attention.out, right after blocks.1.attention.qkv" in said


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_diagnose_later_micro_batch(micro_batches: int) -> None:
    """Found by a token that is in the last row alone, and by a gradient that the second adds."""
    wrapper, step = build(micro_batches=micro_batches)
    step.source.load(0)
    tokens = step.source.rows()
    (odd, *_) = set(tokens[-1, :-1].tolist()) - set(tokens[: B // 2].flatten().tolist())
    embedding = wrapper.model.embedding
    embed = embedding.forward
    embedding.forward = lambda x: embed(x).masked_fill((x == odd)[..., None], math.nan)
    assert [not embedding.forward(part.tokens).isfinite().all() for part in step.batch()] == (
        [True] if micro_batches == 1 else [False, True]
    )
    said = first_non_finite(wrapper.model, step.batch())
    assert "blocks.0.norm_1.x, right after the tokens" in said

    embedding.forward = embed
    backward = wrapper.model.blocks[0].mlp.backward

    def breaking(dy, saved, accumulate):
        dx = backward(dy, saved, accumulate)
        if accumulate == (micro_batches == 2):
            wrapper.model.blocks[0].mlp.down.weight.gradient[0, 0] = math.inf
        return dx

    wrapper.model.blocks[0].mlp.backward = breaking
    said = first_non_finite(wrapper.model, step.batch())
    assert said == "the first gradient that is not finite is that of blocks.0.mlp.down.weight"


@pytest.mark.promise("outlier guard")
def test_outlier_guard_far_above() -> None:
    """It refuses what is far above, and learns a new level."""
    guard = OutlierGuard(4.0, 16, CPU)
    generator = torch.Generator().manual_seed(0)

    def asks(loss: float, norm: float) -> bool:
        noise = 0.1 * torch.randn(2, generator=generator)
        return bool(guard.allows(loss + noise[0], norm + noise[1]))

    assert all(asks(3.0, 1.0) for _ in range(16))
    assert asks(3.0, 1.0) and asks(1.0, 0.1)  # lower is never refused
    assert not asks(9.0, 1.0)
    guard = OutlierGuard(4.0, 16, CPU)
    for _ in range(17):
        asks(3.0, 1.0)
    assert not asks(3.0, 5.0)
    assert not guard.allows(torch.tensor(math.nan), torch.tensor(1.0))
    assert guard.values.isfinite().all()
    answers = [asks(6.0, 1.0) for _ in range(20)]
    assert not answers[0] and answers[-1]


@pytest.mark.promise("outlier guard")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("z_score", [1e-6, 1.0, 4.0])
@pytest.mark.parametrize("level", [0.0, 1e-30, 1e-3, 1.0, 2.7182818, 1e6, 1e30])
def test_outlier_guard_rounding(dtype: torch.dtype, z_score: float, level: float) -> None:
    """After equal losses and norms their standard deviation is 0, or that of a rounding."""
    equal, above = torch.tensor([level, math.inf], dtype=dtype)
    ulp = torch.nextafter(equal, above)

    def guard() -> OutlierGuard:
        guard = OutlierGuard(z_score, 8, CPU)
        assert all(guard.allows(equal, equal) for _ in range(9))
        return guard

    assert guard().allows(ulp, equal) and guard().allows(equal, ulp)
    assert guard().allows(equal * (1 + 1e-5), equal * (1 + 1e-5))
    for outlier in (equal * 1.01 + 1e-30, equal * 2 + 1):
        assert not guard().allows(outlier, equal) and not guard().allows(equal, outlier)


def test_results_unread() -> None:
    """Unread results are never overwritten."""
    _, step = build()
    train(step, 2)
    for i in range(16):
        step.run(i, 1e-3)
    with pytest.raises(RuntimeError, match="call read"):
        step.run(16, 1e-3)
    assert len(step.read()) == 16
