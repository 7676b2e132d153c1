"""Families ``boolean`` and ``lies``: truth values of expressions, and of chains of speakers."""

from __future__ import annotations

import random
from collections.abc import Callable

from loraweave.zoo.tasks.core import Draw, Task
from loraweave.zoo.tasks.words import NAMES, SMALL, truth, yes_no

_OPERATORS: dict[str, Callable[[bool, bool], bool]] = {
    "and": lambda a, b: a and b,
    "or": lambda a, b: a or b,
    "xor": lambda a, b: a != b,
    "nand": lambda a, b: not (a and b),
    "nor": lambda a, b: not (a or b),
}


def _chain(operators: tuple[str, ...], low: int, high: int, negate: bool = True) -> Draw:
    """Evaluated strictly from the left, so that the expression needs no rules of precedence."""

    def draw(rng: random.Random) -> tuple[str, str]:
        parts: list[str] = []
        value = False
        for i in range(rng.randint(low, high)):
            bit, flipped = rng.random() < 0.5, negate and rng.random() < 0.4
            operator = rng.choice(operators)
            operand = bit != flipped
            value = operand if i == 0 else _OPERATORS[operator](value, operand)
            parts += ([] if i == 0 else [operator]) + (["not"] if flipped else []) + [truth(bit)]
        return " ".join(parts), truth(value)

    return draw


def _bracket(rng: random.Random) -> tuple[str, str]:
    bits = [rng.random() < 0.5 for _ in range(4)]
    inner, outer, last = (rng.choice(("and", "or")) for _ in range(3))
    flip = rng.random() < 0.5
    first = _OPERATORS[inner](bits[0], bits[1]) != flip
    value = _OPERATORS[outer](first, _OPERATORS[last](bits[2], bits[3]))
    head = "not " if flip else ""
    body = f"{head}( {truth(bits[0])} {inner} {truth(bits[1])} ) {outer} ( {truth(bits[2])} {last} {truth(bits[3])} )"
    return body, truth(value)


def _bits(answer: Callable[[list[bool]], str]) -> Draw:
    def draw(rng: random.Random) -> tuple[str, str]:
        pairs = [(rng.random() < 0.5, rng.random() < 0.4) for _ in range(rng.randint(4, 7))]
        body = " ".join(("not " if flip else "") + truth(bit) for bit, flip in pairs)
        return body, answer([bit != flip for bit, flip in pairs])

    return draw


def _majority(values: list[bool]) -> str:
    trues = sum(values)
    return "tie" if 2 * trues == len(values) else truth(2 * trues > len(values))


def _story(rng: random.Random, length: int) -> tuple[str, list[str], list[bool]]:
    people = rng.sample(NAMES, length)
    honest = [rng.random() < 0.5]
    parts = [f"{people[0]} {'is honest' if honest[0] else 'lies'}"]
    for i in range(1, length):
        says_lies = rng.random() < 0.5
        honest.append(honest[-1] != says_lies)
        parts.append(f"{people[i]} says {people[i - 1]} {'lies' if says_lies else 'is honest'}")
    return " . ".join(parts), people, honest


def _last(length: int) -> Draw:
    def draw(rng: random.Random) -> tuple[str, str]:
        story, people, honest = _story(rng, length)
        return f"{story} . {people[-1]} ?", "honest" if honest[-1] else "liar"

    return draw


def _liars(rng: random.Random) -> tuple[str, str]:
    story, _, honest = _story(rng, 3)
    return story, SMALL[honest.count(False)]


def _who(rng: random.Random) -> tuple[str, str]:
    story, people, honest = _story(rng, 3)
    liars = [person for person, value in zip(people, honest, strict=True) if not value]
    return story, " ".join(liars) if liars else "nobody"


def _asked(rng: random.Random) -> tuple[str, str]:
    story, people, honest = _story(rng, 3)
    at = rng.randrange(3)
    return f"{story} . does {people[at]} lie ?", yes_no(not honest[at])


TASKS = (
    Task("boolean", "and", "boolean and", "Chains of and.", _chain(("and",), 3, 6)),
    Task("boolean", "or", "boolean or", "Chains of or.", _chain(("or",), 3, 6)),
    Task("boolean", "and_or", "boolean and or", "And and or, from the left.", _chain(("and", "or"), 3, 5)),
    Task("boolean", "xor", "boolean xor", "Chains of exclusive or.", _chain(("xor",), 3, 5)),
    Task("boolean", "nand", "boolean nand", "Chains of nand, from the left.", _chain(("nand",), 3, 5)),
    Task("boolean", "nor", "boolean nor", "Chains of nor, from the left.", _chain(("nor",), 3, 5)),
    Task("boolean", "mixed", "boolean mixed", "And, or and exclusive or.", _chain(("and", "or", "xor"), 3, 4)),
    Task("boolean", "brackets", "boolean brackets", "Two bracketed pairs.", _bracket),
    Task("boolean", "count_true", "boolean count true", "How many values are true.",
         _bits(lambda v: SMALL[sum(v)])),
    Task("boolean", "count_false", "boolean count false", "How many values are false.",
         _bits(lambda v: SMALL[len(v) - sum(v)])),
    Task("boolean", "majority", "boolean majority", "What most values are.", _bits(_majority)),
    Task("boolean", "values", "boolean values", "Every value, negations worked out.",
         _bits(lambda v: " ".join(map(truth, v)))),
    Task("lies", "two", "lies of two", "Whether the second speaker lies.", _last(2)),
    Task("lies", "three", "lies of three", "Whether the third speaker lies.", _last(3)),
    Task("lies", "four", "lies of four", "Whether the fourth speaker lies.", _last(4)),
    Task("lies", "how_many", "lies how many", "How many of three lie.", _liars),
    Task("lies", "who", "lies by whom", "Who of three lies.", _who),
    Task("lies", "asked", "lies asked", "Whether one of three lies.", _asked),
)  # fmt: skip
