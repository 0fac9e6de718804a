"""min_p and the repetition penalty against transformers' logits processors, and at their edges."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mantrans import CustomTransformerWrapper
from mantrans.models.sampling import Sampling, draw, sample
from tests.support.drawing import probabilities_of

INF = math.inf
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def has(V: int, *rows: list[int]) -> Tensor:
    """(B, V) bool: the tokens of each row."""
    seen = torch.zeros(len(rows), V, dtype=torch.bool)
    for row, tokens in zip(seen, rows, strict=True):
        row[tokens] = True
    return seen


@pytest.mark.parametrize("penalty", [1.0, 0.4, 1.3, 90.0])
@pytest.mark.parametrize("min_p", [None, 0.02, 0.3, 1.0])
@pytest.mark.parametrize("others", [{}, {"temperature": 0.7, "top_k": 40, "top_p": 0.9}], ids=str)
def test_sample_equals_transformers(penalty, min_p, others) -> None:
    """The probabilities in float64, with the filters in transformers' order."""
    theirs = pytest.importorskip("transformers.generation.logits_process")
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 300, generator=generator, dtype=torch.float64) * 2
    logits[:, 7] = -INF  # masked
    ids = torch.randint(0, 300, (6, 60), generator=generator)
    ids[:, 0] = 7
    processors = [theirs.RepetitionPenaltyLogitsProcessor(penalty)]
    if others:
        processors += [
            theirs.TemperatureLogitsWarper(0.7), theirs.TopKLogitsWarper(40),
            theirs.TopPLogitsWarper(0.9),
        ]  # fmt: skip
    processors += [] if min_p is None else [theirs.MinPLogitsWarper(min_p)]
    expected = logits.clone()
    for process in processors:
        expected = process(ids, expected)
    found = probabilities_of(
        logits, min_p=min_p, repetition_penalty=penalty, seen=has(300, *ids.tolist()), **others
    )
    assert torch.equal(found > 0, expected.softmax(-1) > 0)
    torch.testing.assert_close(found, expected.softmax(-1), rtol=1e-12, atol=0)


def test_sample_order_of_filters() -> None:
    """top_p sums what min_p would drop."""
    logits = torch.tensor([[0.5, 0.2, 0.1, 0.1, 0.1]], dtype=torch.float64).log()
    assert (probabilities_of(logits, top_p=0.6, min_p=0.3) > 0).tolist() == [
        [True, True] + [False] * 3
    ]
    assert (probabilities_of(logits, top_p=0.75, min_p=0.15) > 0).sum() == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_min_p_ties(dtype) -> None:
    """All that tie with the most likely stay; one token stays where all others are masked."""
    logits = torch.tensor([[1, 5, 5, -INF], [-INF, -INF, 2, -INF]], dtype=dtype)
    assert (probabilities_of(logits, min_p=1.0) > 0).tolist() == [
        [False, True, True, False],
        [False, False, True, False],
    ]
    halves = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    for shift in range(-20, 20):  # whatever the roundings of the quotient
        assert (probabilities_of(halves + shift, min_p=0.5) > 0).all()
    assert not (probabilities_of(halves, min_p=0.5 + 1e-6) > 0)[0, 1:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repetition_penalty_signs(dtype) -> None:
    """A positive logit is divided, a negative one multiplied, 0 and -inf stay; others do not
    change. Below 1 it is the other way round."""
    logits = torch.tensor([[4.0, -2.0, 0.0, -INF, 4.0, -2.0]], dtype=dtype)
    seen = has(6, [0, 1, 2, 3])
    for penalty, expected in ((2.0, [2.0, -4.0, 0.0]), (0.5, [8.0, -1.0, 0.0])):
        found = probabilities_of(logits, repetition_penalty=penalty, seen=seen)
        wanted = torch.tensor([[*expected, -INF, 4.0, -2.0]], dtype=torch.float64).softmax(-1)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    greedy = {"temperature": 0, "repetition_penalty": 2.0}
    assert sample(logits, torch.Generator(), **greedy, seen=seen).tolist() == [4]
    assert sample(logits, torch.Generator(), **greedy, seen=has(6, [4])).tolist() == [0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("penalty", [1.2e-38, 0.01, 100.0])
def test_repetition_penalty_largest_logits(dtype, penalty: float) -> None:
    """Finite logits stay finite, so that something can be drawn; the order stays."""
    largest = torch.finfo(dtype).max
    logits = torch.tensor([[largest, -largest, 1.0], [-largest] * 3], dtype=dtype)
    for seen in (torch.ones(2, 3, dtype=torch.bool), has(3, [0], [1])):
        for temperature in (0, 0.8):
            options = {"temperature": temperature, "repetition_penalty": penalty}
            drawn = sample(logits, torch.Generator().manual_seed(0), **options, seen=seen)
            assert drawn[0] == 0 and 0 <= drawn[1] < 3


@pytest.mark.parametrize(
    "wrong", [None, [[True]], torch.ones(1, 3), torch.ones(2, 3).bool(), torch.ones(3).bool()]
)
def test_sample_seen_wrong(wrong) -> None:
    with pytest.raises(ValueError, match=r"^seen: expected, with repetition_penalty, bool \(1, 3"):
        sample(torch.zeros(1, 3), torch.Generator(), repetition_penalty=1.1, seen=wrong)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ((0.8, 50, 0.9), [105, 146, 58, 89, 156, 140, 74, 177]),
        ((1.0, None, None), [168, 86, 133, 144, 147, 107, 64, 193]),
    ],
)
def test_draw_without_new_settings(settings, expected) -> None:
    """The tokens that were drawn before there were min_p and the penalty."""
    logits = torch.randn(64, 200, generator=torch.Generator().manual_seed(3))
    drawn = draw(logits, Sampling(*settings), torch.Generator().manual_seed(4), None)
    assert drawn[:8].tolist() == expected


@pytest.mark.parametrize("ragged", [False, True])
def test_generate_repetition_penalty(ragged: bool) -> None:
    """The prompt's tokens count, and those drawn since; each row has its own, and no padding."""
    model = CustomTransformerWrapper(
        vocab_size=12, d_model=8, n_blocks=1, n_heads=2, max_seq_len=8, dtype=torch.float32,
        device="cpu", tie_embeddings=False,
    )  # fmt: skip
    write = model.model.parameters.write  # its logits are always 12, 11, ... 1
    write("output.weight", torch.arange(12, 0, -1.0)[:, None].expand(12, 8) / 8)
    write("final_norm.weight", torch.zeros(8))
    write("final_norm.bias", torch.ones(8))
    prompts = [[1, 3], [0, 0, 2, 2] if ragged else [0, 2]]
    rows = model.generate(prompts, max_length=12, temperature=0, repetition_penalty=100.0)
    assert rows[0].tolist() == [1, 3, 0, 2, 4, 5, 6, 7, 8, 9, 10, 11]
    assert rows[1].tolist()[len(prompts[1]) :][:4] == [1, 3, 4, 5]
    plain = model.generate(prompts, max_length=12, temperature=0)
    assert all(set(row[len(p) :].tolist()) == {0} for row, p in zip(plain, prompts, strict=True))
