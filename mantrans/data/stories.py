"""The built-in text: simple children's stories, as many as wanted, from a seed.

A story is told by one of the plots in `story_plots`: somebody small, a wish or a trouble, an
attempt, help, a solution, a feeling and what was learned. Who it is, what it is about and how
each sentence is put are drawn at random, so that a model has to keep a name, a pronoun, an object
and a feeling in mind from the first sentence to the last.

Story `index` of `seed` is a pure function of the two; it depends on no library's random stream
except `random.Random.random`, which Python promises to keep.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator

from mantrans.data.story_plots import PLOTS
from mantrans.data.story_words import Teller

VERSION = 1
"""Raised whenever the text that a seed gives changes: caches of tokens are keyed by it."""


def story(seed: int, index: int) -> str:
    """Story number `index` of `seed`: one or two paragraphs, about 90 to 130 words in all."""
    teller = Teller(random.Random(f"mantrans story {seed} {index}"))
    plot = teller.one_of(PLOTS)
    return "\n\n".join(" ".join(paragraph) for paragraph in plot(teller))


def stories(seed: int, count: int) -> Iterator[str]:
    """`count` distinct stories, always the same ones in the same order for the same seed.

    A story that was already told is passed over; what is kept of each is a hash.
    """
    told: set[bytes] = set()
    index = 0
    while len(told) < count:
        text = story(seed, index)
        index += 1
        fingerprint = hashlib.blake2b(text.encode(), digest_size=8).digest()
        if fingerprint not in told:
            told.add(fingerprint)
            yield text
