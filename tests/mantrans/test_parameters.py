"""The flat buffers: where each parameter lies in them, what stays zero, and what inference omits.

Widths are chosen so that no matrix fills a multiple of 64 elements (d_model 20), or every one does
(d_model 64).
"""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mantrans import CustomTransformerWrapper
from mantrans.config import ModelConfig
from mantrans.kernels import native, reference
from mantrans.kernels.reference import IGNORE_INDEX
from mantrans.models import build
from mantrans.models.transformer import CustomTransformer
from mantrans.parameters import ALIGNMENT, GROUPS, Parameters
from tests.support.compare import assert_close

CPU = torch.device("cpu")
V, B, T = 61, 6, 9
SHAPES = pytest.mark.parametrize(
    "shape",
    [
        {"d_model": 20, "d_ffn": 13},
        {"d_model": 64, "d_ffn": 128},
        {"d_model": 20, "bias": False, "tie_embeddings": False},
    ],
    ids=["odd", "even", "without biases, untied"],
)


def config(**shape: Any) -> ModelConfig:
    sizes = {"vocab_size": V, "n_blocks": 3, "n_heads": 2, "max_seq_len": 12, **shape}
    return ModelConfig.complete({"d_model": 20, "dtype": "float64", **sizes}, "test")


def wrapper(**options: Any) -> CustomTransformerWrapper:
    sizes = {"d_model": 20, "n_blocks": 3, "n_heads": 2, "d_ffn": 13, "max_seq_len": 12}
    return CustomTransformerWrapper(V, **{**sizes, "device": "cpu", **options})


def tokens(rows: int = B) -> Tensor:
    return torch.randint(V, (rows, T), generator=torch.Generator().manual_seed(1))


def placed(shape: dict[str, Any]) -> Parameters:
    return Parameters(build(config(**shape)).parameters(), torch.float32, CPU)


# --------------------------------------------------------------------------------------- the order


@SHAPES
def test_groups_each_parameter(shape: dict[str, Any]) -> None:
    """Each parameter lies in its group and none in another."""
    p = placed(shape)
    assert tuple(p.groups) == GROUPS
    ends = [0, *(group.stop for group in p.groups.values())]
    assert [group.start for group in p.groups.values()] == ends[:-1] and ends[-1] == len(p.weights)
    taken = torch.zeros_like(p.weights)
    for name, parameter in p.by_name.items():
        tables = ("token_embedding.weight", "position_embedding.weight", "output.weight")
        kind = (
            "vectors" if len(parameter.shape) == 1 else "tables" if name in tables else "matrices"
        )
        group, offset = p.groups[kind], p.offset(name)
        assert parameter.group == kind and offset % ALIGNMENT == 0
        assert group.start <= offset and offset + parameter.stored_elements <= group.stop
        assert parameter.value.data_ptr() == p.stored(p.weights, name).data_ptr()
        p.stored(taken, name).add_(1)
    assert taken.max() == 1, "two parameters overlap"
    vectors = [name for name, parameter in p.by_name.items() if parameter.group == "vectors"]
    assert all(a < b for a, b in pairwise(map(p.offset, vectors)))  # a block's are one range


@SHAPES
def test_stacks_views(shape: dict[str, Any]) -> None:
    """A view of the very memory, whatever lies between one matrix and the next."""
    p = placed(shape)
    p.weights.copy_(torch.arange(len(p.weights)))
    blocks = p.blocks[1:]
    where = slice(p.buckets[blocks[0]].start, p.buckets[blocks[-1]].stop)
    stacks = list(p.stacks(p.weights[where], blocks))
    stacked = [name for names, _ in stacks for name in names]
    matrices = [name for name, parameter in p.by_name.items() if parameter.bucket in blocks]
    assert sorted(stacked) == sorted(matrices) and len(stacks) < len(matrices)
    assert len({name.split(".", 2)[2] for name in stacked}) == len(stacks)
    for names, stack in stacks:
        assert len(stack) == len(names) == len(p.blocks) - 1 >= 2
        for name, matrix in zip(names, stack, strict=True):
            assert torch.equal(matrix, p.view(p.weights, name)), name
        stack.neg_()
        assert all((p.view(p.weights, name) < 0).all() for name in names)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
@pytest.mark.parametrize("stochastic", [False, True], ids=["masters", "stochastic rounding"])
def test_padding_zero(optimizer: str, stochastic: bool) -> None:
    """Padding stays zero under every optimizer."""
    model = wrapper(
        dtype=torch.bfloat16, optimizer=optimizer, stochastic_rounding=stochastic,
        optimizer_options={"weight_decay": 0.1},
    )  # fmt: skip
    before = model.model.parameters.weights.clone()
    for _ in range(3):
        assert model.train_step(tokens(), tokens(), learning_rate=1e-2)["status"] == "ok"
    p = model.model.parameters
    padding = torch.ones_like(p.weights, dtype=torch.bool)
    for _, view in p.named(padding):
        view.fill_(False)
    assert len(p.weights) - padding.sum() == p.count() < len(p.weights)
    for flat in [p.weights, p.gradients, *([] if p.master is None else [p.master])]:
        assert not flat[padding].any()
    shards = model.optimizer.shards()
    for name, flat in model.optimizer.state().items():
        for part in shards[name].parts:
            assert not flat[part.kept][padding[part.where]].any()
    assert (p.weights != before)[~padding].float().mean() > 0.2


def test_update_noise() -> None:
    """`update_parameters` on bfloat16 weights without masters rounds with another seed each time;
    from the same beginning it repeats itself."""
    model = wrapper(dtype=torch.bfloat16, stochastic_rounding=True).model
    p = model.parameters
    before = p.weights.clone()
    outcomes = []
    for updates in (0, None, 0):
        p.weights.copy_(before)
        p.gradients.fill_(1.0)
        if updates is not None:
            p.updates.fill_(updates)
        model.update_parameters(1e-5)
        outcomes.append(p.weights.clone())
    first, second, repeated = outcomes
    assert torch.equal(first, repeated) and not torch.equal(first, before)
    assert (first != second).any() and p.updates == 1


# ------------------------------------------------------------------------------------- inference


def test_inference_buffers() -> None:
    """A model for inference is its weights and nothing else."""
    trained = wrapper(dtype=torch.bfloat16, optimizer="adamw")
    model = wrapper(dtype=torch.bfloat16, optimizer="adamw", inference=True)
    p = model.model.parameters
    assert model.get_model_info()["state_bytes"] == 2 * len(p.weights)
    assert trained.get_model_info()["state_bytes"] == (2 + 4 + 4 + 8) * len(p.weights)
    assert p.master is None and p.partials is None and not hasattr(p, "gradients")
    assert not any(hasattr(parameter, "gradient") for parameter in p.by_name.values())
    assert torch.equal(p.weights, trained.model.parameters.weights)
    prompt = tokens(2)[:, :3]
    assert torch.equal(model.generate(prompt, 20), trained.generate(prompt, 20))
    ids = tokens()
    assert model.forward(ids, ids)["loss"] == trained.forward(ids, ids)["loss"]
    assert model.model._saved is None
    with pytest.raises(RuntimeError, match="expected a model with gradients") as refusal:
        model.train_step(ids, ids)
    assert "\n" not in str(refusal.value)


# ---------------------------------------------------------------------------------- partial sums


class InRows(SimpleNamespace):
    """`native`, but the gradient of a vector must be rows (P, C), as on a GPU, and each call puts
    halves of its sum into two of them, of which one is never the same twice in a row."""

    ROWS = 5

    def __init__(self) -> None:
        super().__init__(**vars(native))
        self.calls = 0
        self.sum_partials = reference.sum_partials
        self.partial_rows = lambda device: self.ROWS
        self.layer_norm_backward = self._layer_norm_backward
        self.linear_backward = self._linear_backward
        self.bias_gelu_backward = self._bias_gelu_backward

    def spread(self, rows: Tensor, total: Tensor) -> None:
        assert rows.shape == (self.ROWS, len(total))
        for row in (self.calls % self.ROWS, 3):
            rows[row] += total / 2
        self.calls += 1

    def _layer_norm_backward(
        self, dy, x, weight, mean, rstd, dweight, dbias=None, dresidual=None, dbranch_bias=None
    ):
        sums = [None if rows is None else rows.new_zeros(rows.shape[1])
                for rows in (dweight, dbias, dbranch_bias)]  # fmt: skip
        dx = native.layer_norm_backward(
            dy, x, weight, mean, rstd, sums[0], sums[1], dresidual, sums[2]
        )
        for rows, total in zip((dweight, dbias, dbranch_bias), sums, strict=True):
            if rows is not None:
                self.spread(rows, total)
        return dx

    def _linear_backward(self, dy, x, weight, dweight, dbias=None, accumulate=True):
        if dbias is not None:
            self.spread(dbias, dy.flatten(0, -2).sum(0))
        return native.linear_backward(dy, x, weight, dweight, accumulate=accumulate)

    def _bias_gelu_backward(self, dy, h, bias=None, dbias=None):
        dh = native.bias_gelu_backward(dy, h, bias)
        if dbias is not None:
            self.spread(dbias, dh.flatten(0, -2).sum(0))
        return dh


def gradients(ops: Any, shape: dict[str, Any], recompute: str, parts: int) -> dict[str, Tensor]:
    """Of a batch in so many micro-batches: native's are added to zeros, those in rows begin where
    an earlier step left something."""
    model = CustomTransformer(
        config(**shape), ops, dtype=torch.float64, device=CPU, recompute=recompute, seed=1
    )
    p = model.parameters
    for _, gradient in model.named_gradients():
        gradient.fill_(0.0 if ops is native else 7.0)
    targets = tokens().roll(-1, 1)
    targets[:, -1] = IGNORE_INDEX
    scale = torch.tensor(1 / 50, dtype=torch.float64)
    for i, (x, y) in enumerate(zip(tokens().chunk(parts), targets.chunk(parts), strict=True)):
        model.forward_backward(x, y, scale, accumulate=ops is native or i > 0)
        assert p.partials is None or not any(rows.any() for rows in p.partials.rows.values())
    logits = model.forward(tokens())
    model.backward(torch.cos(logits))  # adds
    assert (p.partials is None) == (ops is native)
    assert p.partials is None or not any(rows.any() for rows in p.partials.rows.values())
    return dict(model.named_gradients())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("bias", [True, False], ids=["biases", "no biases"])
@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("parts", [1, 3])
def test_partial_sums(tied: bool, bias: bool, recompute: str, parts: int) -> None:
    """float64: the sums are those of native in another order."""
    shape = {"tie_embeddings": tied, "bias": bias}
    expected = gradients(native, shape, recompute, parts)
    ops = InRows()
    actual = gradients(ops, shape, recompute, parts)
    assert ops.calls > 0 and actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(actual[name], gradient, 1e-13, name)


def test_backward_broken_off() -> None:
    """Out of memory in the middle, and the caller goes on with less."""
    results = []
    for fails in (False, True):
        ops = InRows()
        model = CustomTransformer(config(), ops, dtype=torch.float64, device=CPU, seed=1)

        def backward(*arguments: Any) -> None:
            raise torch.OutOfMemoryError("full")

        arguments = tokens(), tokens().roll(-1, 1), torch.tensor(0.1, dtype=torch.float64)
        if fails:
            ops.attention_backward = backward
            with pytest.raises(torch.OutOfMemoryError):
                model.forward_backward(*arguments, accumulate=False)
            ops.attention_backward = native.attention_backward
        model.forward_backward(*arguments, accumulate=False)
        results.append(dict(model.named_gradients()))
    for name, expected in results[0].items():
        assert_close(results[1][name], expected, 1e-13, name)


# ------------------------------------------------------------------------------ logits in chunks


@pytest.mark.parametrize("ops", [native, reference], ids=["native", "reference"])
@pytest.mark.parametrize("chunk_rows", [1, 7, B * T])
def test_chunk_rows_any(ops: Any, chunk_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients are the same with any number of logits at a time."""
    lengths: list[int] = []
    whole = ops.cross_entropy_forward_backward

    def watched(logits: Tensor, *arguments: Any) -> Tensor:
        lengths.append(len(logits))
        return whole(logits, *arguments)

    monkeypatch.setattr(ops, "cross_entropy_forward_backward", watched)
    results = []
    for rows in (None, chunk_rows):
        model = CustomTransformer(config(), ops, dtype=torch.float64, device=CPU)
        model.output.chunk_rows = rows
        scale = torch.tensor(0.1, dtype=torch.float64)
        loss = model.forward_backward(tokens(), tokens().roll(-1, 1), scale, accumulate=False)
        results.append({"loss": loss, **dict(model.named_gradients())})
    assert max(lengths[1:]) == chunk_rows and sum(lengths[1:]) == B * T
    for name, expected in results[0].items():
        assert_close(results[1][name], expected, 1e-12, name)
