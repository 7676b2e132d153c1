"""Family ``translate``: English clauses to small made languages and back.

A language has its own words, an order of subject, verb and object, and adjectives before or after the noun. Its words
are made from the English ones by a seeded draw of syllables, so that they look like nothing else in the zoo.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from loraweave.zoo.tasks.core import Draw, Task
from loraweave.zoo.tasks.words import ANIMALS, COLOURS, FRUITS, SIZES

_NOUNS = ANIMALS + FRUITS[:4]
_VERBS = ("sees", "likes", "finds", "wants", "takes", "paints")
_ADJECTIVES = COLOURS[:5] + SIZES[:3]


@dataclass(frozen=True)
class Clause:
    """Subject, verb and object, each noun with an adjective or ``""``."""

    subject: tuple[str, str]
    verb: str
    object: tuple[str, str]


@dataclass(frozen=True)
class Language:
    """A made language: its words by their English ones, its order (e.g. ``sov``), and where adjectives stand."""

    words: dict[str, str]
    order: str
    adjective_first: bool

    def say(self, clause: Clause) -> str:
        """The clause in this language."""
        parts = {"s": self._noun(clause.subject), "v": [self.words[clause.verb]], "o": self._noun(clause.object)}
        return " ".join(word for role in self.order for word in parts[role])

    def _noun(self, phrase: tuple[str, str]) -> list[str]:
        words = [self.words[word] for word in phrase if word]
        return words if self.adjective_first else words[::-1]


def _make(name: str, onsets: str, vowels: str, order: str, adjective_first: bool) -> Language:
    rng = random.Random(f"language|{name}")
    syllables = [onset + vowel for onset in onsets for vowel in vowels]
    made = [a + b for a in syllables for b in syllables if a != b]
    english = _NOUNS + _VERBS + _ADJECTIVES
    return Language(dict(zip(english, rng.sample(made, len(english)), strict=True)), order, adjective_first)


ENGLISH = Language({word: word for word in _NOUNS + _VERBS + _ADJECTIVES}, "svo", True)
LANGUAGES = {
    "zog": _make("zog", "zgd", "ou", "sov", True),
    "mip": _make("mip", "mpn", "ie", "vso", False),
    "sul": _make("sul", "slf", "ua", "ovs", True),
}


def _clause(rng: random.Random) -> Clause:
    subject, other = rng.sample(_NOUNS, 2)
    adjectives = [rng.choice(_ADJECTIVES) if rng.random() < 0.6 else "" for _ in range(2)]
    return Clause((adjectives[0], subject), rng.choice(_VERBS), (adjectives[1], other))


def _translate(source: Language, target: Language) -> Draw:
    def draw(rng: random.Random) -> tuple[str, str]:
        clause = _clause(rng)
        return source.say(clause), target.say(clause)

    return draw


def _reorder(order: str, adjective_first: bool = True) -> Draw:
    return _translate(ENGLISH, Language(ENGLISH.words, order, adjective_first))


def _passive(rng: random.Random) -> tuple[str, str]:
    clause = _clause(rng)
    subject, other = (" ".join(word for word in phrase if word) for phrase in (clause.subject, clause.object))
    return ENGLISH.say(clause), f"{other} is what {subject} {clause.verb}"


def _part(part: str) -> Draw:
    def draw(rng: random.Random) -> tuple[str, str]:
        clause = _clause(rng)
        answers = {"subject": clause.subject[1], "object": clause.object[1], "verb": clause.verb}
        return ENGLISH.say(clause), answers[part]

    return draw


TASKS = (
    *(
        Task("translate", f"to_{name}", f"translate to {name}", f"English to {name}.", _translate(ENGLISH, language))
        for name, language in LANGUAGES.items()
    ),
    *(
        Task(
            "translate", f"from_{name}", f"translate from {name}", f"{name} to English.", _translate(language, ENGLISH)
        )
        for name, language in LANGUAGES.items()
    ),
    Task("reorder", "sov", "reorder as sov", "The verb moves to the end.", _reorder("sov")),
    Task("reorder", "vso", "reorder as vso", "The verb moves to the front.", _reorder("vso")),
    Task("reorder", "osv", "reorder as osv", "The object moves to the front.", _reorder("osv")),
    Task("reorder", "ovs", "reorder as ovs", "Subject and object change places.", _reorder("ovs")),
    Task("reorder", "adjective_last", "reorder adjectives last", "Adjectives follow nouns.", _reorder("svo", False)),
    Task(
        "reorder", "sov_last", "reorder as sov adjectives last", "Verb last, adjectives last.", _reorder("sov", False)
    ),
    Task("reorder", "cleft", "reorder as cleft", "The object is brought to the front.", _passive),
    Task("parse", "subject", "parse the subject", "The noun that acts.", _part("subject")),
    Task("parse", "object", "parse the object", "The noun acted on.", _part("object")),
    Task("parse", "verb", "parse the verb", "The verb.", _part("verb")),
)
