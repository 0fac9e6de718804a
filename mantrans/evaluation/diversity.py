"""How varied generated text is: the share of its words and phrases that are new or repeated.

All four numbers are in [0, 1] and count words in lower case, so that they compare models with
different tokenizers. They show a model that repeats itself, which the loss does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

WORD = re.compile(r"\w+(?:['’]\w+)*")  # letters and digits; "don't" is one word, "." is not a word
REPETITION_LENGTH = 4  # words in a phrase that counts as repeated


def words_of(text: str) -> list[str]:
    """The words of `text` in lower case, without punctuation."""
    return WORD.findall(text.lower())


def phrases_of(words: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    """Every run of n neighboring words (n-gram): len(words) - n + 1 of them, or none."""
    return (tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def distinct(texts: Sequence[str], n: int) -> float | None:
    """distinct-n: different n-grams / all n-grams of the texts together (Li et al. 2016).

    An n-gram never spans two texts. None if no text has n words. Longer samples have smaller
    values: compare only runs with the same prompts and the same `max_generation_length`.
    """
    phrases = [phrase for text in texts for phrase in phrases_of(words_of(text), n)]
    return len(set(phrases)) / len(phrases) if phrases else None


def vocabulary_diversity(texts: Sequence[str]) -> float | None:
    """Type-token ratio: the mean over texts of different words / words. None without any word.

    Computed per text and averaged, while distinct-1 pools the texts: a model that tells the same
    varied story for every prompt has a high diversity here and a low distinct-1.
    """
    ratios = [len(set(words)) / len(words) for words in map(words_of, texts) if words]
    return sum(ratios) / len(ratios) if ratios else None


def repetition_rate(texts: Sequence[str], n: int = REPETITION_LENGTH) -> float | None:
    """The share of n-grams that occurred before in the same text (rep-n: Welleck et al. 2020).

    The n-grams of all texts are pooled after counting, so a long text weighs more than a short
    one. 0: nothing is repeated; near 1: the model loops. None if no text has n words.
    """
    total = repeated = 0
    for text in texts:
        phrases = list(phrases_of(words_of(text), n))
        total += len(phrases)
        repeated += len(phrases) - len(set(phrases))
    return repeated / total if total else None


def diversity(texts: Sequence[str]) -> dict[str, float | None]:
    """All measures of this file for one set of generated texts."""
    return {
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "vocabulary_diversity": vocabulary_diversity(texts),
        "repetition_rate": repetition_rate(texts),
    }
