"""Family ``brackets``: nested words instead of signs; ``in`` opens and ``out`` closes, with kinds."""

from __future__ import annotations

import random

from loraweave.zoo.tasks.core import Task
from loraweave.zoo.tasks.words import SMALL, yes_no

_PAIRS = {"(": ")", "[": "]", "{": "}", "<": ">"}


def _prefix(rng: random.Random, length: int) -> tuple[list[str], list[str], int]:
    """A balanced prefix: its signs, the signs still open, and the greatest depth."""
    signs: list[str] = []
    still: list[str] = []
    depth = 0
    for _ in range(length):
        if still and (len(still) > 3 or rng.random() < 0.45):
            signs.append(_PAIRS[still.pop()])
        else:
            still.append(rng.choice(list(_PAIRS)))
            signs.append(still[-1])
        depth = max(depth, len(still))
    return signs, still, depth


def _close(rng: random.Random) -> tuple[str, str]:
    while True:
        signs, still, _ = _prefix(rng, rng.randint(4, 9))
        if still:
            return " ".join(signs), " ".join(_PAIRS[sign] for sign in reversed(still))


def _next(rng: random.Random) -> tuple[str, str]:
    while True:
        signs, still, _ = _prefix(rng, rng.randint(4, 9))
        if still:
            return " ".join(signs), _PAIRS[still[-1]]


def _depth(rng: random.Random) -> tuple[str, str]:
    signs, _, depth = _prefix(rng, rng.randint(4, 9))
    return " ".join(signs), SMALL[depth]


def _open(rng: random.Random) -> tuple[str, str]:
    signs, still, _ = _prefix(rng, rng.randint(4, 9))
    return " ".join(signs), SMALL[len(still)]


def _balanced(rng: random.Random) -> tuple[str, str]:
    signs, still, _ = _prefix(rng, rng.randint(4, 6))
    signs += [_PAIRS[sign] for sign in reversed(still)]
    wrong = rng.random() < 0.5
    if wrong:
        at = rng.randrange(len(signs))
        signs[at] = rng.choice([sign for pair in _PAIRS.items() for sign in pair if sign != signs[at]])
    return " ".join(signs), yes_no(not wrong)


TASKS = (
    Task("brackets", "close", "brackets close", "The signs that close what is open.", _close),
    Task("brackets", "next", "brackets next", "The next closing sign.", _next),
    Task("brackets", "depth", "brackets depth", "The greatest depth.", _depth),
    Task("brackets", "open", "brackets open", "How many are still open.", _open),
    Task("brackets", "balanced", "brackets balanced", "Whether every sign is matched.", _balanced),
)
