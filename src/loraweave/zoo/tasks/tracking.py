"""Families ``shuffle`` and ``switch``: who holds what after swaps, and how a switch stands after presses."""

from __future__ import annotations

import random

from loraweave.zoo.tasks.core import Draw, Task
from loraweave.zoo.tasks.words import NAMES, SMALL, THINGS


def _swaps(people: int, swaps: int, ask: str) -> Draw:
    def draw(rng: random.Random) -> tuple[str, str]:
        names, things = rng.sample(NAMES, people), rng.sample(THINGS, people)
        holds = dict(zip(names, things, strict=True))
        parts = [" ".join(f"{name} {thing}" for name, thing in holds.items())]
        for _ in range(swaps):
            one, two = rng.sample(names, 2)
            holds[one], holds[two] = holds[two], holds[one]
            parts.append(f"{one} swaps {two}")
        if ask == "all":
            return " . ".join(parts), " ".join(holds[name] for name in names)
        asked = rng.choice(names)
        if ask == "owner":
            return f"{' . '.join(parts)} . {holds[asked]} ?", asked
        return f"{' . '.join(parts)} . {asked} ?", holds[asked]

    return draw


def _gives(rng: random.Random) -> tuple[str, str]:
    names, thing = rng.sample(NAMES, 4), rng.choice(THINGS)
    at = 0
    parts = [f"{names[0]} has the {thing}"]
    for _ in range(rng.randint(1, 3)):
        to = rng.choice([i for i in range(4) if i != at])
        parts.append(f"{names[at]} to {names[to]}")
        at = to
    return " . ".join(parts), names[at]


def _switch(on: str, off: str, thing: str) -> Draw:
    def draw(rng: random.Random) -> tuple[str, str]:
        state = rng.random() < 0.5
        parts = [f"{thing} is {on if state else off}"]
        for name in rng.sample(NAMES, rng.randint(2, 5)):
            flips = rng.random() < 0.5
            state = state != flips
            parts.append(f"{name} {'flips' if flips else 'waits'}")
        return " . ".join(parts), on if state else off

    return draw


def _flips(rng: random.Random) -> tuple[str, str]:
    names = rng.sample(NAMES, rng.randint(2, 6))
    flips = [rng.random() < 0.5 for _ in names]
    body = " . ".join(f"{name} {'flips' if flip else 'waits'}" for name, flip in zip(names, flips, strict=True))
    return body, SMALL[sum(flips)]


TASKS = (
    Task("shuffle", "two_once", "shuffle two once", "Two people, one swap.", _swaps(2, 1, "thing")),
    Task("shuffle", "two_twice", "shuffle two twice", "Two people, two swaps.", _swaps(2, 2, "thing")),
    Task("shuffle", "three_once", "shuffle three once", "Three people, one swap.", _swaps(3, 1, "thing")),
    Task("shuffle", "three_twice", "shuffle three twice", "Three people, two swaps.", _swaps(3, 2, "thing")),
    Task("shuffle", "owner", "shuffle whose", "Who holds a thing after one swap.", _swaps(3, 1, "owner")),
    Task("shuffle", "all", "shuffle all", "What everyone holds after one swap.", _swaps(3, 1, "all")),
    Task("shuffle", "gives", "shuffle gifts", "Who holds a thing that is passed on.", _gives),
    Task("switch", "lamp", "switch lamp", "Whether a lamp is on.", _switch("on", "off", "lamp")),
    Task("switch", "coin", "switch coin", "Which side of a coin is up.", _switch("heads", "tails", "coin")),
    Task("switch", "door", "switch door", "Whether a door is open.", _switch("open", "shut", "door")),
    Task("switch", "how_often", "switch how often", "How many people flip.", _flips),
)
