"""Family ``navigate``: walks on a grid and turns on the spot."""

from __future__ import annotations

import random
from collections.abc import Callable

from loraweave.zoo.tasks.core import Draw, Task
from loraweave.zoo.tasks.words import SMALL, yes_no

_STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, 1), "down": (0, -1)}
_COMPASS = ("north", "east", "south", "west")


def _where(x: int, y: int) -> str:
    parts = [f"{SMALL[abs(x)]} {'right' if x > 0 else 'left'}"] if x else []
    parts += [f"{SMALL[abs(y)]} {'up' if y > 0 else 'down'}"] if y else []
    return " ".join(parts) or "start"


def _walk(ways: tuple[str, ...], low: int, high: int, answer: Callable[[int, int], str]) -> Draw:
    def draw(rng: random.Random) -> tuple[str, str]:
        x = y = 0
        parts = []
        for _ in range(rng.randint(low, high)):
            way, far = rng.choice(ways), rng.randint(1, 4)
            x, y = x + far * _STEPS[way][0], y + far * _STEPS[way][1]
            parts.append(f"{way} {SMALL[far]}")
        return " ".join(parts), answer(x, y)

    return draw


def _home(rng: random.Random) -> tuple[str, str]:
    """Half of the walks are made to return."""
    ways = rng.choice((("left", "right"), ("up", "down")))
    far = [rng.randint(1, 5) for _ in range(2)]
    last = sum(far) if rng.random() < 0.5 else rng.randint(1, 9)
    parts = [f"{ways[0]} {SMALL[far[0]]}", f"{ways[0]} {SMALL[far[1]]}", f"{ways[1]} {SMALL[last]}"]
    rng.shuffle(parts)
    return " ".join(parts), yes_no(last == sum(far))


def _turns(low: int, high: int, around: bool) -> Draw:
    def draw(rng: random.Random) -> tuple[str, str]:
        facing = start = rng.randrange(4)
        turns = []
        for _ in range(rng.randint(low, high)):
            turn = rng.choice(("left", "right", "around") if around else ("left", "right"))
            facing = (facing + {"left": 3, "right": 1, "around": 2}[turn]) % 4
            turns.append(turn)
        return f"face {_COMPASS[start]} turn {' '.join(turns)}", _COMPASS[facing]

    return draw


def _back(rng: random.Random) -> tuple[str, str]:
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    walk = [(rng.choice(list(_STEPS)), rng.randint(1, 5)) for _ in range(rng.randint(2, 3))]
    body = " ".join(f"{way} {SMALL[far]}" for way, far in walk)
    return body, " ".join(f"{opposite[way]} {SMALL[far]}" for way, far in reversed(walk))


TASKS = (
    Task("navigate", "home", "navigate home", "Whether the walk ends where it began.", _home),
    Task("navigate", "line", "navigate on a line", "Where a walk left and right ends.",
         _walk(("left", "right"), 3, 4, _where)),
    Task("navigate", "grid", "navigate on a grid", "Where a walk ends.", _walk(tuple(_STEPS), 2, 3, _where)),
    Task("navigate", "column", "navigate on a column", "Where a walk up and down ends.",
         _walk(("up", "down"), 3, 4, _where)),
    Task("navigate", "side", "navigate to which side", "The side of the start on which a walk ends.",
         _walk(("left", "right"), 3, 4, lambda x, _: "left" if x < 0 else "right" if x else "start")),
    Task("navigate", "turns", "navigate turns", "The way faced after some turns.", _turns(3, 7, False)),
    Task("navigate", "turns_around", "navigate turns around", "Turns, with about turns.", _turns(3, 6, True)),
    Task("navigate", "way_back", "navigate the way back", "The walk undone.", _back),
)  # fmt: skip
