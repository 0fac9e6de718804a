"""Generation: the cache changes nothing, prompts of all lengths, stopping, sliding, sampling."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from mantrans import CustomTransformerWrapper
from mantrans.cuda_graph import WARM_UP_RUNS
from mantrans.models import generation
from mantrans.models.generation import Decoder, TokenStep, window_start
from mantrans.models.sampling import sample

V = 61


@pytest.fixture(scope="module", params=["reference", "native"])
def model(request) -> CustomTransformerWrapper:
    """Weights far from their start, so that what is drawn depends on the whole context."""
    model = CustomTransformerWrapper(
        vocab_size=V, d_model=32, n_blocks=2, n_heads=4, max_seq_len=24, dtype=torch.float32,
        device="cpu", backend=request.param,
    )  # fmt: skip
    torch.manual_seed(0)
    for _, p in model.model.named_parameters():
        if p.dim() == 2:
            p.copy_(torch.randn_like(p) * 0.25)
    return model


def prompts(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, V, (n,), generator=generator) for n in lengths]


@pytest.mark.parametrize("lengths", [(5,), (1, 9, 4), (23, 24, 25, 60)])
def test_generate_with_cache(model, lengths) -> None:
    """Also past max_seq_len, where the window slides, and for rows that slide at other times."""
    given = prompts(*lengths)
    options = {"max_length": 90, "temperature": 0.9, "top_k": 20, "top_p": 0.95, "seed": 7}
    cached = model.generate(given, **options)
    recomputed = model.generate(given, use_cache=False, **options)
    for row, other, prompt in zip(cached, recomputed, given, strict=True):
        assert torch.equal(row, other) and len(row) == 90
        assert torch.equal(row[: len(prompt)], prompt)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_token_step_captured(monkeypatch, backend) -> None:
    """The capture's extra runs change nothing; a replay reads and writes where the capture did.
    Rows slide at other times, which rebuilds the cache under the same graph."""
    captures = []

    def stand_in(function):
        """A graph: what the function wrote last keeps its address, and a replay writes there."""
        for _ in range(WARM_UP_RUNS + 1):
            function()
        step = function.__self__
        captured = step.logits

        def replay() -> None:
            function()
            step.logits = captured.copy_(step.logits)

        captures.append(captured)
        return replay

    model = CustomTransformerWrapper(
        vocab_size=V, d_model=32, n_blocks=1, n_heads=2, max_seq_len=12, dtype=torch.float32,
        device="cpu", backend=backend, seed=5,
    )  # fmt: skip
    options = {"max_length": 17, "temperature": 0.9, "seed": 7}
    eager = model.generate(prompts(5, 3, 11), **options)
    monkeypatch.setattr(generation, "cuda_graph", stand_in)
    monkeypatch.setattr(TokenStep, "captures", staticmethod(lambda device: True))
    graph = model.generate(prompts(5, 3, 11), **options)
    assert len(captures) == 1
    assert all(map(torch.equal, eager, graph))


@pytest.mark.parametrize(
    ("lengths", "max_length", "expected"),
    [((5,), 9, 9), ((5,), 2, 5), ((3, 7), 10, 14), ((3, 7), 24, 24), ((1, 24), 90, 24), ((), 9, 9)],
)
def test_cache_length(model, lengths, max_length, expected) -> None:
    """And holds all that is put there: the longest row goes along until the shortest is done."""
    given = [row.tolist() for row in prompts(*lengths)]
    cache = Decoder(model.model, given, max_length).cache
    assert all(x.shape == (len(lengths), expected, 32) for pair in cache for x in pair)
    if not lengths:
        return
    options = {"max_length": max_length, "temperature": 0.9, "seed": 2}
    rows, others = (
        model.generate(prompts(*lengths), **options, use_cache=use) for use in (True, False)
    )
    assert all(map(torch.equal, rows, others))


def test_generate_greedy_rows_independent(model) -> None:
    """Greedy rows do not depend on their neighbors."""
    given = prompts(3, 11, 7)
    together = model.generate(given, max_length=40, temperature=0)
    for prompt, row in zip(given, together, strict=True):
        alone = model.generate([prompt], max_length=40, temperature=0)[0]
        assert torch.equal(alone, row)


def test_generate_seed(model) -> None:
    """The same seed, the same tokens; another seed, other tokens."""
    given = prompts(4)
    first, again, other = (model.generate(given, max_length=40, seed=s)[0] for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_generate_end_of_text(model) -> None:
    """A row ends after its end of text."""
    given = prompts(4, 6)
    free = model.generate(given, max_length=60, temperature=0)
    stop = free[0][20].item()
    rows = model.generate(given, max_length=60, temperature=0, eos_token_id=stop)
    end = free[0].tolist().index(stop, 4) + 1
    assert rows[0].tolist() == free[0][:end].tolist()
    expected = free[1].tolist()
    if stop in expected[6:]:
        expected = expected[: expected.index(stop, 6) + 1]
    assert rows[1].tolist() == expected


def test_generate_tensor_prompts(model) -> None:
    """Tensor prompts give a tensor filled up with end of text."""
    ids = torch.stack(prompts(5, 5))
    free = model.generate(ids, max_length=30, temperature=0)
    assert free.shape == (2, 30)
    stop = free[0, 12].item()
    rows = model.generate(ids, max_length=30, temperature=0, eos_token_id=stop)
    end = free[0].tolist().index(stop, 5) + 1
    assert (rows[0, end:] == stop).all()
    assert model.generate(ids[0], max_length=8).shape == (1, 8)


def test_generate_max_length(model) -> None:
    """Max_length counts the prompt."""
    given = prompts(3, 10)
    rows = model.generate(given, max_length=8)
    assert [len(r) for r in rows] == [8, 10] and torch.equal(rows[1], given[1])


def test_stream_equals_generate(model) -> None:
    """Stream yields what generate returns."""
    given = prompts(2, 5)
    options = {"max_length": 12, "temperature": 0.8, "top_k": 50, "top_p": 0.9, "seed": 4}
    steps = list(model.stream(given, **options))
    assert len(steps) == 10 and steps[-1][1] is None
    for i, row in enumerate(model.generate(given, **options)):
        assert [s[i] for s in steps if s[i] is not None] == row[len(given[i]) :].tolist()
    ended = list(model.stream(given, **options, eos_token_id=steps[1][0]))
    assert ended[:2] == steps[:2] and ended[2][0] is None


@pytest.mark.parametrize("limit", [1, 2, 3, 8, 25])
def test_windows_slide(limit: int) -> None:
    """They hold the newest tokens, and slide by halves."""
    starts = [window_start(n, limit) for n in range(1, 6 * limit)]
    for n, start in enumerate(starts, start=1):
        assert 1 <= n - start <= limit
        assert n <= limit or n - start > limit - max(1, limit // 2)
    jumps = {b - a for a, b in pairwise(starts)} - {0}
    assert jumps <= {max(1, limit // 2)}


def test_sampling_filters() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, 1)
    generator = torch.Generator().manual_seed(0)

    def drawn(**options) -> torch.Tensor:
        return sample(logits, generator, **options).bincount(minlength=4) / len(logits)

    # the share of a token with probability p scatters by √(p (1-p) / 4000) <= 0.008; 4 of those
    assert (drawn() - logits[0].exp()).abs().max() < 0.032
    assert (drawn(top_k=2) - torch.tensor([5 / 8, 3 / 8, 0, 0])).abs().max() < 0.032
    assert (drawn(top_p=0.7) - torch.tensor([5 / 8, 3 / 8, 0, 0])).abs().max() < 0.032
    assert drawn(top_p=0.4).tolist() == [1, 0, 0, 0]
    assert drawn(temperature=0).tolist() == [1, 0, 0, 0]
    cold = drawn(temperature=0.5)
    assert abs(cold[0].item() - 0.25 / (0.25 + 0.09 + 0.0225 + 0.0025)) < 0.032


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": 0.0}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"stop": [""]}, "stop"),
        ({"stop": "a"}, "stop"),
        ({"stop": ["a"]}, "tokenizer"),
        ({"tokenizer": "gpt2"}, "tokenizer"),
        ({"max_length": 0}, "max_length"),
    ],
)
def test_options_wrong(model, options, named) -> None:
    with pytest.raises(ValueError, match=named):
        model.generate(prompts(3), **options)
    with pytest.raises(ValueError, match=named):
        model.stream(prompts(3), **options)  # at once, not at the first token


@pytest.mark.parametrize("bad", [[-1], [V], []])
def test_prompts_wrong(model, bad) -> None:
    with pytest.raises(ValueError, match="input_ids"):
        model.generate([torch.tensor(bad, dtype=torch.int64)], max_length=5)
