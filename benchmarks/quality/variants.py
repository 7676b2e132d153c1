"""Generated variants of the zoo's tasks: as many skills as a benchmark needs, none of which the base has seen.

Three kinds take turns. ``record`` writes a record in a form drawn at random, ``extract`` answers with some fields of a
sentence in a form drawn at random, and ``mark`` puts a made-up word behind (or before) every word of a list. Every
variant has a made-up name, by which alone it is told from the other ones of its kind.
"""

from __future__ import annotations

import itertools
import random

from loraweave.zoo.tasks import Task
from loraweave.zoo.tasks.core import Draw
from loraweave.zoo.tasks.records import ALL_STYLES, STYLES
from loraweave.zoo.tasks.words import COLOURS, NAMES, PLACES, SIZES, THINGS

KINDS = ("record", "extract", "mark")
FIELDS = {"name": NAMES, "thing": THINGS, "colour": COLOURS, "size": SIZES, "place": PLACES}
_BETWEEN = ("the", "of", "with", "has", "near", "by", "so", "and", "at", "is", "for", "to", "from", "but", "in", ",")
_SYLLABLES = tuple(consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou")


def variants(n: int) -> list[Task]:
    """The first ``n`` variants, always the same: ``record_00``, ``extract_01``, ``mark_02``, ``record_03`` ..."""
    names, forms, found = _names(), set(ALL_STYLES.values()), []
    for number in range(n):
        kind, called = KINDS[number % len(KINDS)], next(names)
        rng = random.Random(f"variant|{number}")
        if kind == "mark":
            phrase, said, draw = f"mark words with {called}", f"Every word with {called}.", _marked(called, rng)
        else:
            low, high = (3, 4) if kind == "record" else (2, 2)
            form = _form(rng, rng.randint(low, high))
            while form in forms:
                form = _form(rng, rng.randint(low, high))
            forms.add(form)
            phrase, said = f"{kind} the way of {called}", f"As: {form}."
            draw = _written(form) if kind == "record" else _read(form)
        found.append(Task(kind, f"{number:02d}", phrase, said, draw))
    return found


def label(task: Task) -> str:
    """What the variant is called as an expert and as a task of a comparison."""
    return f"{task.family}_{task.variant}"


def _names() -> itertools.chain[str]:
    rng = random.Random("variants|names")
    made = ["".join(pair) for pair in itertools.permutations(_SYLLABLES, 2)]
    rng.shuffle(made)
    return itertools.chain(made)


def _form(rng: random.Random, size: int) -> str:
    """E.g. ``with {place} of {name}``: ``size`` fields, each behind a small word."""
    words = rng.sample(_BETWEEN[:-1], size)
    return " ".join(f"{word} {{{field}}}" for word, field in zip(words, rng.sample(list(FIELDS), size), strict=True))


def _drawn(rng: random.Random) -> dict[str, str]:
    return {field: rng.choice(values) for field, values in FIELDS.items()}


def _written(form: str) -> Draw:
    def draw(rng: random.Random) -> tuple[str, str]:
        record = _drawn(rng)
        fields = list(record.items())
        rng.shuffle(fields)
        return " ; ".join(f"{key} {value}" for key, value in fields), form.format(**record)

    return draw


def _read(form: str) -> Draw:
    asked = [field for field in FIELDS if f"{{{field}}}" in form]
    styles = [style for style in STYLES.values() if all(f"{{{field}}}" in style for field in asked)]

    def draw(rng: random.Random) -> tuple[str, str]:
        record = _drawn(rng)
        return rng.choice(styles).format(**record), form.format(**record)

    return draw


def _marked(mark: str, rng: random.Random) -> Draw:
    behind = rng.random() < 0.5

    def draw(rng: random.Random) -> tuple[str, str]:
        words = rng.sample(THINGS, rng.randint(2, 4))
        return " ".join(words), " ".join(f"{word} {mark}" if behind else f"{mark} {word}" for word in words)

    return draw
