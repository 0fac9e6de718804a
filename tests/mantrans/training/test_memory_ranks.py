"""The memory of one of several ranks: predicted, and counted in what a rank really allocates."""

from __future__ import annotations

import pytest
import torch

from mantrans.config import Config
from mantrans.distributed.world import World
from mantrans.errors import ConfigError
from mantrans.training import memory
from mantrans.training.building import build_wrapper
from mantrans.training.gradient_sum import GradientSum
from mantrans.training.share import share_of
from mantrans.training.summary import summary

SMALL = [
    "model.vocab_size=130", "model.d_model=32", "model.n_blocks=3", "model.n_heads=2",
    "model.max_seq_len=16", "training.device=cpu", "training.batch_size=2", "training.max_steps=1",
]  # fmt: skip


def configured(*settings: str) -> Config:
    return Config.from_dict({}, "test", [*SMALL, *settings])


def held(config: Config, world: World) -> dict[str, int]:
    """Bytes of the buffers that a rank has between steps. Building it sends nothing."""
    wrapper = build_wrapper(config, 130, world)
    share = share_of(config.training, world)
    sums = GradientSum(wrapper.model, share.micro_batches, world, config.training.gradient_sum)
    p, optimizer = wrapper.model.parameters, wrapper.trainable()
    buffers = {t.data_ptr(): t.nbytes for t in (p.gradients, p.owned_gradients)}
    return {
        "weights": p.weights.nbytes,
        "masters": 0 if p.master is None else p.master.nbytes,
        "gradients": sum(buffers.values()),
        "levels": sum(level.nbytes for level in sums.levels[1:]),
        "exchange": sums.exchange.received.nbytes,
        "moments": sum(moment.nbytes for moment in optimizer.state().values()),
    }


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("shard", ["none", "optimizer", "gradients"])
@pytest.mark.parametrize(
    ("dtype", "gradient_sum", "optimizer"),
    [
        ("bfloat16", "tree", "muon"),
        pytest.param("bfloat16", "tree", "adamw", marks=pytest.mark.slow),
        pytest.param("float32", "running", "adamw", marks=pytest.mark.slow),
    ],
)
def test_predict_with_ranks(
    ranks: int, shard: str, dtype: str, gradient_sum: str, optimizer: str
) -> None:
    """Byte for byte: of the rank that has the most."""
    config = configured(
        f"training.shard={shard}", f"model.dtype={dtype}", f"training.gradient_sum={gradient_sum}",
        f"training.optimizer={optimizer}", "training.gradient_accumulation_steps=120",
    )  # fmt: skip
    predicted = memory.predict(config, getattr(torch, dtype), "cpu", ranks=ranks)
    most = max(
        (held(config, World(rank, ranks)) for rank in range(ranks)), key=lambda h: sum(h.values())
    )
    assert {name: getattr(predicted, name) for name in most} == most
    assert predicted.state == sum(most.values())


def test_predict_with_smaller_micro_batches() -> None:
    """Ranks that do not divide the micro-batches have smaller ones, and so fewer activations."""
    config = configured("training.batch_size=8", "training.gradient_accumulation_steps=1")
    one, four = (memory.predict(config, torch.float32, "cpu", ranks=n) for n in (1, 4))
    assert four.activations * 4 == one.activations


def test_summary_with_ranks() -> None:
    config = configured("model.dtype=bfloat16", "training.gradient_accumulation_steps=4")
    table = summary(config, ranks=4).split("\n\n")[-1].splitlines()
    assert table[0] == "memory of one of 4 ranks, predicted for bfloat16 on cpu"
    assert table[1].split() == ["training.shard", "none", "optimizer", "gradients"]
    moments = next(line for line in table if "moments" in line).split()[1::2]
    assert float(moments[0]) == pytest.approx(4 * float(moments[1]), rel=0.2)
    with pytest.raises(ConfigError, match="expected a multiple of the 3 processes, got 8"):
        summary(config, ranks=3)
