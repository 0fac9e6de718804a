"""The words of the built-in stories, and the `Teller` that chooses among them.

Things are grouped by what can be done with them, so that in a story a kite flies, a boat floats
and a cake is eaten.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

T = TypeVar("T")

# Two friends, who are neighbors, and their home.
CHILDREN = (
    ("Lily", "Tom", "in a little house by the sea"),
    ("Anna", "Ben", "in a small house near the forest"),
    ("Mia", "Sam", "on a farm with many animals"),
    ("Emma", "Max", "in a little town by the river"),
    ("Lucy", "Leo", "in a yellow house on a hill"),
    ("Zoe", "Finn", "in a tall house in the city"),
)
ANIMALS = (
    (("Hazel", "squirrel"), ("Patch", "fox")),
    (("Dot", "mouse"), ("Teddy", "bear")),
    (("Poppy", "rabbit"), ("Pip", "hedgehog")),
    (("Daisy", "duck"), ("Bobo", "frog")),
)
ANIMAL_HOMES = {
    "rabbit": "in a warm hole under the hill",
    "mouse": "in a tiny house under the old oak tree",
    "fox": "at the edge of the forest",
    "duck": "by a quiet pond",
    "squirrel": "high up in the old oak tree",
    "hedgehog": "under a pile of leaves in the garden",
    "frog": "by a quiet pond",
    "bear": "in a cave in the forest",
}
NATURES = ("little", "kind", "curious", "shy", "cheerful", "gentle", "quiet", "friendly")
COLORS = ("red", "blue", "green", "yellow", "purple", "white", "orange", "pink")


def a(phrase: str) -> str:
    """The phrase with its indefinite article: `a kite`, `an orange ball`."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def capital(phrase: str) -> str:
    """The phrase with a capital first letter, to start a sentence."""
    return phrase[0].upper() + phrase[1:]


@dataclass(frozen=True)
class Character:
    """A character of a story: a name, a noun, and the pronouns."""

    name: str
    noun: str
    female: bool
    home: str = ""
    neighbor: Character | None = None
    relation: str | None = None
    """The hero's word for this character: `mom`, or `friend` for one with a name."""

    @property
    def he(self) -> str:
        return "she" if self.female else "he"

    @property
    def him(self) -> str:
        return "her" if self.female else "him"

    @property
    def his(self) -> str:
        return "her" if self.female else "his"

    @property
    def He(self) -> str:
        return capital(self.he)

    @property
    def His(self) -> str:
        return capital(self.his)

    @property
    def is_animal(self) -> bool:
        return self.noun in ANIMAL_HOMES

    def of(self, hero: Character) -> str:
        """The first mention of this character: `her mom`, `his friend Mia`."""
        if self.relation == "friend":
            the = f" the {self.noun}" if self.is_animal else ""
            return f"{hero.his} friend {self.name}{the}"
        return f"{hero.his} {self.relation}"


FAMILY = (
    Character("Mom", "mother", True, relation="mom"),
    Character("Dad", "father", False, relation="dad"),
    Character("Grandma", "grandmother", True, relation="grandma"),
    Character("Grandpa", "grandfather", False, relation="grandpa"),
)


class Teller:
    """Makes all choices of one story, from one random stream."""

    def __init__(self, stream: random.Random) -> None:
        self._stream = stream

    def one_of(self, options: Sequence[T]) -> T:
        return options[int(self._stream.random() * len(options))]

    def say(self, *phrasings: str) -> str:
        """One of several phrasings."""
        return self.one_of(phrasings)

    def maybe(self, *phrasings: str) -> list[str]:
        """One of the phrasings or, twice as often, nothing: an optional sentence."""
        return [self.one_of(phrasings)] if self.one_of((True, False, False)) else []

    def some_of(self, options: Sequence[T], count: int) -> list[T]:
        """`count` different ones, in random order."""
        left = list(options)
        return [left.pop(int(self._stream.random() * len(left))) for _ in range(count)]

    def child(self) -> Character:
        girl_name, boy_name, home = self.one_of(CHILDREN)
        girl = Character(girl_name, "girl", True, home)
        boy = Character(boy_name, "boy", False, home)
        return self._one_of_pair(girl, boy)

    def animal(self, *kinds: str) -> Character:
        """An animal of one of the kinds, or of any."""
        pairs = [pair for pair in ANIMALS if not kinds or {kind for _, kind in pair} & {*kinds}]
        she, he = (
            Character(name, kind, female, ANIMAL_HOMES[kind])
            for (name, kind), female in zip(self.one_of(pairs), (True, False), strict=True)
        )
        if kinds and not {she.noun, he.noun} <= {*kinds}:
            chosen, other = (she, he) if she.noun in kinds else (he, she)
            return replace(chosen, neighbor=other)
        return self._one_of_pair(she, he)

    def _one_of_pair(self, first: Character, second: Character) -> Character:
        if self.one_of((True, False)):
            return replace(first, neighbor=second)
        return replace(second, neighbor=first)

    def hero(self) -> Character:
        """A child twice as often as an animal."""
        return self.one_of((self.child, self.child, self.animal))()

    def friend(self, hero: Character) -> Character:
        """The hero's neighbor, of the other sex, so that `he` and `she` stay unambiguous."""
        assert hero.neighbor is not None
        return replace(hero.neighbor, relation="friend")

    def helper(self, hero: Character) -> Character:
        """A parent, a grandparent or a friend."""
        return self.one_of((*FAMILY, self.friend(hero), self.friend(hero)))

    def opening(self, hero: Character) -> list[str]:
        """One or two sentences that say who the story is about."""
        someone = f"{a(self.one_of(NATURES))} {hero.noun} named {hero.name}"
        return self.one_of(
            (
                [f"Once upon a time, there was {someone}."],
                [f"Once upon a time, {someone} lived {hero.home}."],
                [f"There once was {someone}.", f"{hero.He} lived {hero.home}."],
                [f"{hero.name} was {a(self.one_of(NATURES))} {hero.noun} who lived {hero.home}."],
            )
        )
