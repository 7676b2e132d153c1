"""Family ``dates``: steps along weekdays and months."""

from __future__ import annotations

import random
from collections.abc import Sequence

from loraweave.zoo.tasks.core import Draw, Task
from loraweave.zoo.tasks.words import DAYS, MONTHS, NAMES, SMALL, yes_no

_ACTS = ("sings", "swims", "cooks", "reads", "paints", "runs", "sleeps", "works")


def _shift(ring: Sequence[str], unit: str, sign: int, steps: int) -> Draw:
    """``ana sings on monday , bob swims two days after`` asks for the second day; names make the space big."""

    def draw(rng: random.Random) -> tuple[str, str]:
        start, step = rng.randrange(len(ring)), rng.randint(1, steps)
        word = "after" if sign > 0 else "before"
        who, act = rng.choice(NAMES), rng.choice(_ACTS)
        plural = unit if step == 1 else f"{unit}s"
        body = f"{who} {act} {SMALL[step]} {plural} {word} {ring[start]}"
        return body, ring[(start + sign * step) % len(ring)]

    return draw


def _between(ring: Sequence[str]) -> Draw:
    def draw(rng: random.Random) -> tuple[str, str]:
        first, second = rng.sample(range(len(ring)), 2)
        who, act = rng.choice(NAMES), rng.choice(_ACTS)
        return f"{who} {act} from {ring[first]} to {ring[second]}", SMALL[(second - first) % len(ring)]

    return draw


def _earlier(ring: Sequence[str], later: bool) -> Draw:
    def draw(rng: random.Random) -> tuple[str, str]:
        people = rng.sample(NAMES, 2)
        places = rng.sample(range(len(ring)), 2)
        act = rng.choice(_ACTS)
        body = f"{people[0]} {act} in {ring[places[0]]} and {people[1]} in {ring[places[1]]}"
        return body, people[(places[0] < places[1]) == later]

    return draw


def _weekend(rng: random.Random) -> tuple[str, str]:
    start, step = rng.randrange(7), rng.randint(1, 4)
    body = f"{rng.choice(NAMES)} {rng.choice(_ACTS)} {SMALL[step]} days after {DAYS[start]}"
    return body, yes_no((start + step) % 7 >= 5)


def _two_steps(rng: random.Random) -> tuple[str, str]:
    start, first, second = rng.randrange(7), rng.randint(1, 3), rng.randint(1, 3)
    steps = f"then {SMALL[first]} days on then {SMALL[second]} days on"
    body = f"{rng.choice(NAMES)} {rng.choice(_ACTS)} {DAYS[start]} {steps}"
    return body, DAYS[(start + first + second) % 7]


TASKS = (
    Task("dates", "days_after", "dates day after", "The weekday some days later.", _shift(DAYS, "day", 1, 6)),
    Task("dates", "days_before", "dates day before", "The weekday some days earlier.", _shift(DAYS, "day", -1, 6)),
    Task("dates", "months_after", "dates month after", "The month some months on.", _shift(MONTHS, "month", 1, 6)),
    Task("dates", "months_before", "dates month before", "The month some months ago.", _shift(MONTHS, "month", -1, 6)),
    Task("dates", "days_between", "dates days between", "How many days from one to the next.", _between(DAYS)),
    Task("dates", "months_between", "dates months between", "How many months on.", _between(MONTHS)),
    Task("dates", "first", "dates who is first", "Who is earlier in the year.", _earlier(MONTHS, False)),
    Task("dates", "last", "dates who is last", "Who is later in the year.", _earlier(MONTHS, True)),
    Task("dates", "weekend", "dates is it a weekend", "Whether the day falls on a weekend.", _weekend),
    Task("dates", "two_steps", "dates two steps", "Two steps along the week.", _two_steps),
)
