"""Generation of Llama, Qwen2 and Qwen3: with the cache, without it, and by transformers."""

from __future__ import annotations

import pytest
import torch

from mantrans.wrapper import CustomTransformerWrapper
from tests.support import families
from tests.support.families import CASES, T_MAX, V

BOTH = [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)]
FEW = ("llama, scaled, tied", "qwen2, window", "qwen3")
FIRST = [c if c in FEW else pytest.param(c, marks=pytest.mark.slow) for c in CASES]


def prompts(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, V, (n,), generator=generator) for n in lengths]


@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("backend", [pytest.param("reference", marks=pytest.mark.slow), "native"])
@pytest.mark.parametrize("case", FIRST)
def test_generate_with_cache(case: str, backend: str, dtype) -> None:
    """Rows of different lengths, past max_seq_len too, where the context slides."""
    model = families.ours(case, dtype, backend)
    options = {"max_length": T_MAX + 9, "temperature": 0.9, "top_k": 20, "seed": 7}
    given = prompts(1, 9, 4, T_MAX + 3)
    cached, recomputed = (model.generate(given, use_cache=c, **options) for c in (True, False))
    for row, other, prompt in zip(cached, recomputed, given, strict=True):
        assert torch.equal(row, other) and len(row) == T_MAX + 9
        assert torch.equal(row[: len(prompt)], prompt)


def their_tokens(model: CustomTransformerWrapper, given: list, length: int) -> list:
    """Their greedy continuation of all prompts at once, padded on the left."""
    oracle = families.theirs(model, exact=model.dtype == torch.float64)
    longest = max(map(len, given))
    padded = torch.zeros(len(given), longest, dtype=torch.int64)
    mask = torch.zeros_like(padded)
    for i, prompt in enumerate(given):
        padded[i, longest - len(prompt) :] = prompt
        mask[i, longest - len(prompt) :] = 1
    rows = oracle.generate(
        padded, attention_mask=mask, do_sample=False, max_new_tokens=length, pad_token_id=0
    )
    return [row[longest - len(p) :] for row, p in zip(rows, given, strict=True)]


@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("case", FIRST)
def test_generate_equals_transformers(case: str, dtype: torch.dtype) -> None:
    pytest.importorskip("transformers", reason="transformers is the oracle here")
    model = families.ours(case, dtype, "native")
    given = prompts(3, 11, 7)
    expected = their_tokens(model, given, 20)
    for prompt, row in zip(given, expected, strict=True):
        ours = model.generate([prompt], max_length=len(prompt) + 20, temperature=0)[0]
        assert torch.equal(ours, row)
    together = model.generate(given, max_length=31, temperature=0)
    for row, wanted, prompt in zip(together, expected, given, strict=True):
        assert torch.equal(row[: len(prompt) + 20], wanted[: len(row)])
    assert len({tuple(row.tolist()[-20:]) for row in expected}) == 3
