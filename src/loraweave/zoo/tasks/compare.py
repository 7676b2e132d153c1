"""Family ``compare``: orders told in pairs."""

from __future__ import annotations

import itertools
import random

from loraweave.zoo.tasks.core import Draw, Task
from loraweave.zoo.tasks.words import NAMES, yes_no

_WORDS = {"tall": ("taller", "shorter"), "old": ("older", "younger"), "fast": ("faster", "slower")}


def _chain(kind: str, ask: str, people: int) -> Draw:
    """``ask`` is ``first``, ``last``, ``middle``, ``all`` or ``pair``; facts come in any order and either way round."""

    def draw(rng: random.Random) -> tuple[str, str]:
        more, less = _WORDS[kind]
        order = rng.sample(NAMES, people)
        facts = [
            f"{high} {more} than {low}" if rng.random() < 0.6 else f"{low} {less} than {high}"
            for high, low in itertools.pairwise(order)
        ]
        rng.shuffle(facts)
        body = " . ".join(facts)
        if ask == "pair":
            one, two = rng.sample(order, 2)
            return f"{body} . {one} {more} than {two} ?", yes_no(order.index(one) < order.index(two))
        answers = {"first": order[0], "last": order[-1], "middle": order[people // 2], "all": " ".join(order)}
        return body, answers[ask]

    return draw


TASKS = (
    Task("compare", "tallest", "compare tallest", "Who is tallest of three.", _chain("tall", "first", 3)),
    Task("compare", "shortest", "compare shortest", "Who is shortest of three.", _chain("tall", "last", 3)),
    Task("compare", "middle", "compare middle", "Who is in the middle of three.", _chain("tall", "middle", 3)),
    Task("compare", "line_up", "compare line up", "Three from the tallest down.", _chain("tall", "all", 3)),
    Task("compare", "oldest", "compare oldest", "Who is oldest of three.", _chain("old", "first", 3)),
    Task("compare", "youngest", "compare youngest", "Who is youngest of three.", _chain("old", "last", 3)),
    Task("compare", "fastest", "compare fastest", "Who is fastest of three.", _chain("fast", "first", 3)),
    Task("compare", "slowest", "compare slowest", "Who is slowest of three.", _chain("fast", "last", 3)),
    Task("compare", "older", "compare older or not", "Whether one is older.", _chain("old", "pair", 3)),
    Task("compare", "two", "compare two", "Who is taller of two.", _chain("tall", "first", 2)),
)
