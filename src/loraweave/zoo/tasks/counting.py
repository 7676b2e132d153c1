"""Families ``count`` and ``sets``: how many of a kind a list holds, and what two lists share."""

from __future__ import annotations

import random

from loraweave.zoo.tasks.core import Draw, Task
from loraweave.zoo.tasks.words import COLOURS, GROUP_OF, GROUPS, PLURALS, SMALL, THINGS, yes_no


def _mixture(rng: random.Random, group: str, count: int, others: int) -> list[str]:
    words = rng.choices(GROUPS[group], k=count)
    words += rng.choices([word for word in THINGS if GROUP_OF[word] != group], k=others)
    rng.shuffle(words)
    return words


def _of_group(group: str) -> Draw:
    def draw(rng: random.Random) -> tuple[str, str]:
        count = rng.randint(0, 5)
        return " ".join(_mixture(rng, group, count, rng.randint(1, 3))), SMALL[count]

    return draw


def _not_animals(rng: random.Random) -> tuple[str, str]:
    others = rng.randint(1, 5)
    return " ".join(_mixture(rng, "animal", rng.randint(1, 4), others)), SMALL[others]


def _two_groups(rng: random.Random, low: int) -> tuple[list[str], int, int]:
    animals, fruits = rng.randint(low, 4), rng.randint(low, 4)
    words = rng.choices(GROUPS["animal"], k=animals) + rng.choices(GROUPS["fruit"], k=fruits)
    words += rng.choices(GROUPS["tool"], k=rng.randint(0, 1))
    rng.shuffle(words)
    return words, animals, fruits


def _both(rng: random.Random) -> tuple[str, str]:
    words, animals, fruits = _two_groups(rng, 1)
    return " ".join(words), f"{SMALL[animals]} animals {SMALL[fruits]} fruits"


def _more(rng: random.Random) -> tuple[str, str]:
    words, animals, fruits = _two_groups(rng, 1)
    return " ".join(words), "animals" if animals > fruits else "fruits" if fruits > animals else "equal"


def _total(rng: random.Random) -> tuple[str, str]:
    words = rng.choices(THINGS, k=rng.randint(2, 8))
    return " ".join(words), SMALL[len(words)]


def _occurrences(rng: random.Random) -> tuple[str, str]:
    word = rng.choice(THINGS)
    count = rng.randint(0, 4)
    words = [word] * count + [rng.choice([w for w in THINGS if w != word]) for _ in range(rng.randint(2, 4))]
    rng.shuffle(words)
    return f"{word} in {' '.join(words)}", SMALL[count]


def _colours(rng: random.Random) -> tuple[str, str]:
    count = rng.randint(0, 5)
    words = rng.choices(COLOURS, k=count) + rng.choices(THINGS, k=rng.randint(1, 3))
    rng.shuffle(words)
    return " ".join(words), SMALL[count]


def _majority(rng: random.Random) -> tuple[str, str]:
    group = rng.choice(list(GROUPS))
    words = rng.choices(GROUPS[group], k=3)
    for other in rng.sample([name for name in GROUPS if name != group], 3):
        words.append(rng.choice(GROUPS[other]))
    rng.shuffle(words)
    return " ".join(words), group


def _things(rng: random.Random) -> tuple[str, str]:
    owned = [(rng.randint(1, 5), rng.choice(THINGS)) for _ in range(rng.randint(2, 3))]
    return " and ".join(f"{SMALL[n]} {word}" for n, word in owned), SMALL[sum(n for n, _ in owned)]


def _sets(kind: str) -> Draw:
    def draw(rng: random.Random) -> tuple[str, str]:
        shared = rng.sample(THINGS, rng.randint(1, 2))
        rest = [word for word in THINGS if word not in shared]
        extra = rng.sample(rest, 4)
        left, right = [*shared, *extra[:2]], [*shared, *extra[2:]]
        rng.shuffle(left)
        rng.shuffle(right)
        answers = {
            "shared": [word for word in left if word in right],
            "only_first": [word for word in left if word not in right],
            "only_second": [word for word in right if word not in left],
            "union": left + [word for word in right if word not in left],
        }
        return f"{' '.join(left)} and {' '.join(right)}", " ".join(answers[kind])

    return draw


def _member(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(THINGS, rng.randint(3, 5))
    inside = rng.random() < 0.5
    asked = rng.choice(words if inside else [word for word in THINGS if word not in words])
    return f"{asked} in {' '.join(words)}", yes_no(inside)


TASKS = (
    *(
        Task(
            "count",
            f"{group}s",
            f"count the {PLURALS[group]}",
            f"How many words are {PLURALS[group]}.",
            _of_group(group),
        )
        for group in GROUPS
    ),
    Task("count", "not_animals", "count all but animals", "How many words are not animals.", _not_animals),
    Task("count", "animals_and_fruits", "count animals and fruits", "Both counts, in words.", _both),
    Task("count", "more", "count which are more", "Whether there are more animals or more fruits.", _more),
    Task("count", "words", "count all words", "The length of the list.", _total),
    Task("count", "occurrences", "count the word", "How often a word stands in the list.", _occurrences),
    Task("count", "colours", "count the colours", "How many words are colours.", _colours),
    Task("count", "majority", "count the main kind", "The kind that most words belong to.", _majority),
    Task("count", "things", "count things in all", "The total of two or three amounts.", _things),
    Task("sets", "shared", "sets shared words", "Words in both lists.", _sets("shared")),
    Task("sets", "only_first", "sets only in first", "Words of the first list alone.", _sets("only_first")),
    Task("sets", "only_second", "sets only in second", "Words of the second list alone.", _sets("only_second")),
    Task("sets", "union", "sets joined", "Both lists without repeats.", _sets("union")),
    Task("sets", "member", "sets member", "Whether a word is in the list.", _member),
)
