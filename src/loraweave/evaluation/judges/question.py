"""What the judge is asked about two pictures, and how its answer is read.

Two dimensions, composition and image quality, 0 to 10 for each picture, with deductions for what is missing or
wrong, as in Multi-LoRA Composition (arXiv 2402.16843, section 4 and appendix); the words are ours.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loraweave.evaluation.judges.pictures import Element, Pair, digest

DIMENSIONS = ("composition", "quality")
MARK = "SCORES:"
_PLACES = ("first", "second")

_TEXT = """\
You see two pictures, the first and the second. Two programs made them from one request: to show all of these \
elements in a single picture.

{elements}

Judge each picture by itself on two scales from 0 (worst) to 10 (best); halves are allowed.

composition: does the picture show what was asked for? Start at 10. Take off 3 for each element that is absent or \
plainly another thing, 1 for each listed feature that is absent or wrong, 1 where elements do not fit together, and \
more where the whole makes no sense.
quality: is it a good picture, whatever it shows? Start at 10. Take off 3 for each deformity such as extra fingers, a \
distorted face or impossible proportions, 2 for each clear fault of texture, light or colour, 1 for each small flaw.

Be strict, and use the scale so that the better picture of the two gets the higher score. Which picture comes first \
means nothing. Say in a few sentences what you see in each. Then end with one line of exactly this form, numbers in \
place of X:

SCORES: {{"first": {{"composition": X, "quality": X}}, "second": {{"composition": X, "quality": X}}}}"""


@dataclass(frozen=True)
class Question:
    """One question: two pictures in one order.

    Attributes:
        pair: what is compared.
        first: the method whose picture comes first.
        second: the other.
        digests: sha256 of the first and the second picture.
    """

    pair: Pair
    first: str
    second: str
    digests: tuple[str, str]

    @property
    def text(self) -> str:
        return prompt(self.pair.elements)

    def key(self, model: str) -> str:
        """A file name for the answer of ``model``: other pictures, words or models make another question."""
        parts = [model, self.text, self.pair.id, self.first, self.second, *self.digests]
        mark = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{self.pair.id}--{self.first}--{self.second}")[:120].lstrip(".")
        return f"{name}--{mark}.json"


def questions(pairs: Sequence[Pair]) -> list[Question]:
    """Both orders of every pair, one after the other."""
    digests = {path: digest(path) for pair in pairs for path in (pair.pictures[pair.a], pair.pictures[pair.b])}
    return [
        Question(pair, x, y, (digests[pair.pictures[x]], digests[pair.pictures[y]]))
        for pair in pairs
        for x, y in ((pair.a, pair.b), (pair.b, pair.a))
    ]


def prompt(elements: Sequence[Element]) -> str:
    """What is asked about two pictures of ``elements``."""
    lines = [
        f"{number}. {element.name}" + (f": {', '.join(element.features)}" if element.features else "")
        for number, element in enumerate(elements, start=1)
    ]
    return _TEXT.format(elements="\n".join(lines))


def parse(answer: str) -> dict[str, dict[str, float]] | str:
    """``{"first": {"composition": ..., "quality": ...}, "second": ...}``, or in words why the answer does not hold
    that.

    Strict: the mark once, after it a JSON object with exactly these keys and numbers from 0 to 10, and nothing else
    but a closing code fence. Nothing is guessed.
    """
    if answer.count(MARK) != 1:
        return f"expected {MARK!r} once, found it {answer.count(MARK)} times"
    rest = answer.partition(MARK)[2].strip().removeprefix("```json").strip("`* \n\t")
    try:
        scores = json.loads(rest, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        return f"what follows {MARK!r} is not JSON"
    if not isinstance(scores, dict) or set(scores) != set(_PLACES):
        return f"expected the keys {', '.join(_PLACES)}"
    for place in _PLACES:
        of_one = scores[place]
        if not isinstance(of_one, dict) or set(of_one) != set(DIMENSIONS):
            return f"{place}: expected the keys {', '.join(DIMENSIONS)}"
        for dimension, value in of_one.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 10:
                return f"{place}.{dimension}: expected a number from 0 to 10, got {str(value)[:40]!r}"
    return {place: {d: float(scores[place][d]) for d in DIMENSIONS} for place in _PLACES}


def _once(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) < len(items):
        raise ValueError("a key comes twice")
    return found
