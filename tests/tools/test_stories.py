"""The built-in stories: what `tools.stories` makes, distinct, and good English."""

from __future__ import annotations

import hashlib
import lzma
import re
import sys
from pathlib import Path

import pytest

from mantrans.data import stories as shipped
from mantrans.data.tokenizer import load_tokenizer
from tools import stories
from tools.story_plots import PLOTS
from tools.story_words import ANIMALS, CHILDREN, COLORS, NATURES, a

GIRLS, BOYS, _HOMES = zip(*CHILDREN, strict=True)
ANIMALS_SHE = {name: kind for (name, kind), _ in ANIMALS}
ANIMALS_HE = {name: kind for _, (name, kind) in ANIMALS}
SHE = {*GIRLS, *ANIMALS_SHE, "mom", "grandma", "Mom", "Grandma", "woman"}
HE = {*BOYS, *ANIMALS_HE, "dad", "grandpa", "Dad", "Grandpa", "brother", "man"}


@pytest.fixture(scope="module")
def told() -> list[str]:
    return shipped.stories()


def words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z]+", text)


def test_stories_seed() -> None:
    """A seed always tells the same stories."""
    digest = hashlib.sha256("\0".join(stories.stories(seed=0, count=200)).encode()).hexdigest()
    # If the text was changed on purpose: `python -m tools.stories --write`, and the new value here.
    assert digest[:16] == "90e7559bef8bc8b4"


@pytest.mark.parametrize("count", [300, pytest.param(shipped.COUNT, marks=pytest.mark.slow)])
def test_stories_shipped(told: list[str], count: int) -> None:
    """The shipped stories are what the tool makes."""
    assert told[:count] == list(stories.stories(stories.SHIPPED_SEED, count))


def test_stories_written(told: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tool writes the file anew."""
    monkeypatch.setattr(stories, "FILE", tmp_path / "few.xz")
    monkeypatch.setattr(stories, "COUNT", 20)
    monkeypatch.setattr(sys, "argv", ["tools.stories", "--write"])
    stories.main()
    text = lzma.decompress((tmp_path / "few.xz").read_bytes()).decode()
    assert text.split(shipped.SEPARATOR) == told[:20]


def test_story_seed_and_index() -> None:
    """A story depends on seed and index alone."""
    assert stories.story(3, 17) == stories.story(3, 17)
    assert list(stories.stories(5, 30))[:10] == list(stories.stories(5, 10))


def test_stories_distinct(told: list[str]) -> None:
    """Stories are distinct within and mostly across seeds."""
    assert len(set(told)) == len(told) == shipped.COUNT
    others = set(stories.stories(seed=8, count=1000))
    assert len(others & set(told)) < 20  # under 2%


def test_stories_casts(told: list[str]) -> None:
    """Every plot, name, animal and color is told."""
    every = set(words(" ".join(told)))
    animals = ANIMALS_SHE | ANIMALS_HE
    cast = {*GIRLS, *BOYS, *animals, *animals.values(), *COLORS, *NATURES}
    assert cast <= every
    assert len(every) < 800  # a small vocabulary is what makes them learnable in minutes
    assert len(PLOTS) >= 12


def test_stories_lengths(told: list[str]) -> None:
    """They suit a window of 160 tokens."""
    tokenizer = load_tokenizer("tinystories_bpe_4096")
    lengths = [len(ids) + 1 for ids in tokenizer.encode_batch(told[::4])]
    assert 100 <= sum(lengths) / len(lengths) <= 130
    assert min(lengths) >= 80
    assert sum(length <= 160 for length in lengths) / len(lengths) > 0.995


def test_articles(told: list[str]) -> None:
    """Articles agree with what follows."""
    for text in told:
        assert not re.search(r"\b[Aa] [aeiou]", text), text
        assert not re.search(r"\b[Aa]n [^aeiou]", text), text
    assert a("orange ball") == "an orange ball"
    assert a("kite") == "a kite"


def test_pronouns(told: list[str]) -> None:
    """Pronouns agree with the cast."""
    checked = 0
    for text in told:
        found = set(words(text))
        if not found & HE:
            assert not found & {"he", "He", "him", "his", "His"}, text
            checked += 1
        if not found & SHE:
            assert not found & {"she", "She", "her", "Her"}, text
            checked += 1
    assert checked > 1000


def test_hero(told: list[str]) -> None:
    """A story stays with its hero."""
    for text in told:
        beginning, end = text.split("\n\n")
        hero = next(word for word in words(beginning) if word in SHE | HE)
        pronouns = "she|her|She|Her" if hero in SHE else "he|his|him|He|His"
        assert re.search(rf"\b({hero}|{pronouns})\b", end), text
        assert re.search(rf"\b{hero}\b", re.split(r"(?<=[.!?]) ", text)[0]), text


def test_sentences(told: list[str]) -> None:
    for text in told:
        assert not re.search(r"[{}]|  |\bNone\b| [.,!?]|\.\.|,\.", text), text
        for paragraph in text.split("\n\n"):
            assert paragraph.count('"') % 2 == 0, paragraph
            assert re.fullmatch(r'["A-Z].*[.!?]"?', paragraph), paragraph
            # A full stop outside speech is followed by a capital or by speech.
            for follower in re.findall(r'[.!?] (["A-Za-z])', re.sub(r'"[^"]*"', '"', paragraph)):
                assert follower.isupper() or follower == '"', paragraph


def test_sentences_repeated(told: list[str]) -> None:
    """No sentence is said twice in a story."""
    for text in told:
        sentences = re.split(r"(?<=[.!?]) ", re.sub(r'"[^"]*"', "", text))
        long = [sentence for sentence in sentences if len(sentence) > 20]
        assert len(set(long)) == len(long), text
