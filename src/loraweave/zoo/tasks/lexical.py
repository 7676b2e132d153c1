"""Families ``kind``, ``letters`` and ``relate``: what words mean and how they are spelt."""

from __future__ import annotations

import random
from collections.abc import Callable

from loraweave.zoo.tasks.core import Draw, Task
from loraweave.zoo.tasks.words import GROUP_OF, GROUPS, SMALL, THINGS, yes_no

OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("old", "new"), ("heavy", "light"), ("fast", "slow"), ("wet", "dry"),
    ("high", "low"), ("hard", "soft"), ("full", "empty"), ("rich", "poor"), ("early", "late"), ("near", "far"),
)  # fmt: skip
OPPOSITE = {a: b for pair in OPPOSITES for a, b in (pair, pair[::-1])}
IRREGULAR = {
    "go": "went", "see": "saw", "take": "took", "run": "ran", "give": "gave", "eat": "ate", "sing": "sang",
    "write": "wrote", "make": "made", "find": "found", "tell": "told", "keep": "kept", "swim": "swam", "win": "won",
}  # fmt: skip


def _odd(rng: random.Random) -> tuple[str, str]:
    main, other = rng.sample(list(GROUPS), 2)
    words = rng.sample(GROUPS[main], rng.randint(3, 4))
    answer = rng.choice(GROUPS[other])
    words.insert(rng.randint(0, len(words)), answer)
    return " ".join(words), answer


def _same(rng: random.Random) -> tuple[str, str]:
    one, two = rng.sample(THINGS, 2)
    if rng.random() < 0.5:
        two = rng.choice([word for word in GROUPS[GROUP_OF[one]] if word != one])
    return f"{one} and {two}", yes_no(GROUP_OF[one] == GROUP_OF[two])


def _each(words: tuple[str, ...], answer: Callable[[str], str], low: int = 2, high: int = 4) -> Draw:
    """The answer for every word of a list."""

    def draw(rng: random.Random) -> tuple[str, str]:
        chosen = rng.sample(words, rng.randint(low, high))
        return " ".join(chosen), " ".join(map(answer, chosen))

    return draw


def _starts(rng: random.Random) -> tuple[str, str]:
    while True:
        words = rng.sample(THINGS, rng.randint(3, 5))
        answer = rng.choice(words)
        if sum(word[0] == answer[0] for word in words) == 1:
            return f"{answer[0]} in {' '.join(words)}", answer


def _ends(rng: random.Random) -> tuple[str, str]:
    while True:
        words = rng.sample(THINGS, rng.randint(3, 5))
        answer = rng.choice(words)
        if sum(word[-1] == answer[-1] for word in words) == 1:
            return f"{answer[-1]} in {' '.join(words)}", answer


def _spell(word: str) -> str:
    return " ".join(word)


def _join(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(THINGS, 2)
    return " , ".join(map(_spell, words)), " ".join(words)


_ADJECTIVES = tuple(OPPOSITE)
TASKS = (
    Task("kind", "odd_one", "kind odd one out", "The one word of another kind.", _odd),
    Task("kind", "same", "kind same or not", "Whether two words are of a kind.", _same),
    Task("kind", "each", "kind of each", "The kind of each word.", _each(THINGS, GROUP_OF.__getitem__)),
    Task("letters", "first", "letters first", "The first letter of each word.", _each(THINGS, lambda w: w[0])),
    Task("letters", "last", "letters last", "The last letter of each word.", _each(THINGS, lambda w: w[-1])),
    Task("letters", "second", "letters second", "The second letter of each word.", _each(THINGS, lambda w: w[1])),
    Task("letters", "length", "letters how many", "The length of each word.", _each(THINGS, lambda w: SMALL[len(w)])),
    Task("letters", "vowels", "letters vowels", "The vowels in each word.",
         _each(THINGS, lambda w: SMALL[sum(c in "aeiou" for c in w)])),
    Task("letters", "spell", "letters spelt out", "Two words spelt out.", _each(THINGS, _spell, 2, 2)),
    Task("letters", "backwards", "letters backwards", "Two words spelt backwards.",
         _each(THINGS, lambda w: _spell(w[::-1]), 2, 2)),
    Task("letters", "join", "letters joined", "Two spelt words joined.", _join),
    Task("letters", "starts", "letters word that starts with", "The word with a given first letter.", _starts),
    Task("letters", "ends", "letters word that ends with", "The word with a given last letter.", _ends),
    Task("relate", "opposite", "relate opposite", "The opposite of each word.",
         _each(_ADJECTIVES, OPPOSITE.__getitem__)),
    Task("relate", "past", "relate past", "The past of each verb.", _each(tuple(IRREGULAR), IRREGULAR.__getitem__)),
    Task("relate", "present", "relate present", "The present form of each verb.",
         _each(tuple(IRREGULAR.values()), {v: k for k, v in IRREGULAR.items()}.__getitem__)),
    Task("relate", "more", "relate more", "More of each quality.", _each(_ADJECTIVES, lambda w: f"more {w}", 2, 3)),
    Task("relate", "less", "relate less", "Less of each opposite.",
         _each(_ADJECTIVES, lambda w: f"less {OPPOSITE[w]}", 2, 3)),
)  # fmt: skip
