"""Generates the built-in text: any number of simple children's stories from a seed.

    python -m tools.stories --write                  rewrites the file in mantrans/assets/stories
    python -m tools.stories --seed 2 --count 100     prints other stories

A story follows one of the plots in `story_plots`: a child or an animal, a wish or a problem, an
attempt, help, a solution, a feeling and what was learned. The hero, the topic and the phrasing of
each sentence are drawn at random, so that a model has to remember a name, a pronoun, an object and
a feeling from the first sentence to the last.

Story `index` of `seed` is a pure function of the two; the only random stream it depends on is
`random.Random.random`, which Python promises to keep.
"""

from __future__ import annotations

import argparse
import hashlib
import lzma
import random
from collections.abc import Iterator

from mantrans.data.stories import COUNT, FILE, SEPARATOR
from tools.story_plots import PLOTS
from tools.story_words import Teller

SHIPPED_SEED = 1


def story(seed: int, index: int) -> str:
    """Story number `index` of `seed`: one or two paragraphs, about 90 to 130 words in all."""
    teller = Teller(random.Random(f"mantrans story {seed} {index}"))
    plot = teller.one_of(PLOTS)
    return "\n\n".join(" ".join(paragraph) for paragraph in plot(teller))


def stories(seed: int, count: int) -> Iterator[str]:
    """`count` distinct stories, always the same ones in the same order for the same seed.

    A repeated story is skipped; only a hash of each story is kept.
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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.stories")
    parser.add_argument("--write", action="store_true", help="make the shipped file again")
    parser.add_argument("--seed", type=int, default=SHIPPED_SEED, help="of the stories printed")
    parser.add_argument("--count", type=int, default=COUNT)
    options = parser.parse_args()
    if options.write:
        text = SEPARATOR.join(stories(SHIPPED_SEED, COUNT))
        FILE.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    else:
        print(SEPARATOR.join(stories(options.seed, options.count)))


if __name__ == "__main__":
    main()
