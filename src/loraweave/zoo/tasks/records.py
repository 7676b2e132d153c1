"""Families ``record`` and ``lookup``: a small record put into a sentence, and fields looked up."""

from __future__ import annotations

import random
from collections.abc import Callable

from loraweave.zoo.tasks.core import Draw, Task
from loraweave.zoo.tasks.words import COLOURS, NAMES, PLACES, SIZES, SMALL, THINGS

STYLES = {
    "has": "{name} has a {size} {colour} {thing}",
    "seen": "a {size} {colour} {thing} of {name} is seen at the {place}",
    "question": "does {name} keep the {colour} {thing} at the {place} ?",
    "notice": "for sale , one {colour} {thing} , {size} , ask {name}",
    "lost": "at the {place} {name} lost the {size} {thing}",
    "inverted": "{colour} is the {thing} that {name} owns",
    "polite": "dear {name} , please bring the {thing} to the {place}",
    "report": "{place} : {thing} , {colour} and {size}",
    "story": "once at the {place} {name} met a {colour} {thing}",
    "answer": "yes , the {thing} at the {place} is {colour}",
}
MORE_STYLES = {
    "rumour": "they say {name} hides a {colour} {thing}",
    "label": "{thing} / {colour} / {size} / by {name}",
    "wish": "{name} wants a {thing} , {size} but not {colour}",
    "warning": "beware of the {size} {thing} near the {place}",
}
"""Styles that ``extract`` does not use."""
ALL_STYLES = STYLES | MORE_STYLES


def _record(rng: random.Random) -> dict[str, str]:
    return {
        "name": rng.choice(NAMES),
        "thing": rng.choice(THINGS),
        "colour": rng.choice(COLOURS),
        "size": rng.choice(SIZES),
        "place": rng.choice(PLACES),
    }


def _sentence(style: str) -> Draw:
    def draw(rng: random.Random) -> tuple[str, str]:
        record = _record(rng)
        fields = list(record.items())
        rng.shuffle(fields)
        return " ; ".join(f"{key} {value}" for key, value in fields), ALL_STYLES[style].format(**record)

    return draw


def _field(key: str) -> Draw:
    def draw(rng: random.Random) -> tuple[str, str]:
        record = _record(rng)
        form = STYLES[rng.choice([s for s, form in STYLES.items() if f"{{{key}}}" in form])]
        return form.format(**record), record[key]

    return draw


def _fields(answer: str, *keys: str) -> Draw:
    """Several fields of a sentence, put as ``answer``."""
    styles = [style for style, form in STYLES.items() if all(f"{{{key}}}" in form for key in keys)]

    def draw(rng: random.Random) -> tuple[str, str]:
        record = _record(rng)
        return STYLES[rng.choice(styles)].format(**record), answer.format(**record)

    return draw


def _table(answer: Callable[[dict[str, int], random.Random], tuple[str, str]]) -> Draw:
    """A line of names and numbers; ``answer`` gives what is asked and what is right."""

    def draw(rng: random.Random) -> tuple[str, str]:
        size = rng.randint(3, 4)
        table = dict(zip(rng.sample(NAMES, size), rng.sample(range(21), size), strict=True))
        asked, target = answer(table, rng)
        return " ; ".join(f"{name} {SMALL[n]}" for name, n in table.items()) + asked, target

    return draw


def _value(table: dict[str, int], rng: random.Random) -> tuple[str, str]:
    name = rng.choice(list(table))
    return f" . {name} ?", SMALL[table[name]]


def _owner(table: dict[str, int], rng: random.Random) -> tuple[str, str]:
    name = rng.choice(list(table))
    return f" . {SMALL[table[name]]} ?", name


def _richest(table: dict[str, int], _: random.Random) -> tuple[str, str]:
    return "", max(table, key=table.__getitem__)


def _poorest(table: dict[str, int], _: random.Random) -> tuple[str, str]:
    return "", min(table, key=table.__getitem__)


def _people(table: dict[str, int], _: random.Random) -> tuple[str, str]:
    return "", " ".join(table)


def _values(table: dict[str, int], _: random.Random) -> tuple[str, str]:
    return "", " ".join(SMALL[n] for n in table.values())


TASKS = (
    *(Task("record", s, f"record to {s}", f"A record put as: {form}.", _sentence(s)) for s, form in ALL_STYLES.items()),
    *(
        Task("extract", key, f"extract the {key}", f"The {key} in a sentence.", _field(key))
        for key in ("name", "thing", "colour", "size", "place")
    ),
    Task("extract", "owner_and_thing", "extract owner and thing", "Whose and what, in a sentence.",
         _fields("{thing} of {name}", "name", "thing")),
    Task("extract", "thing_and_place", "extract thing and place", "What and where, in a sentence.",
         _fields("{thing} at the {place}", "thing", "place")),
    Task("extract", "colour_and_thing", "extract colour and thing", "A thing and its colour, in a sentence.",
         _fields("{thing} so {colour}", "thing", "colour")),
    Task("lookup", "value", "lookup value", "The number of a person.", _table(_value)),
    Task("lookup", "owner", "lookup owner", "The person with a number.", _table(_owner)),
    Task("lookup", "most", "lookup most", "Who has most.", _table(_richest)),
    Task("lookup", "least", "lookup least", "Who has least.", _table(_poorest)),
    Task("lookup", "people", "lookup people", "All names.", _table(_people)),
    Task("lookup", "values", "lookup values", "All numbers.", _table(_values)),
)  # fmt: skip
