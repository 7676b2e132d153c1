"""What a row of a public set says: the fields that its prompt shows, and its right answers.

A reader sees one row as the hub has it. The fields never come from the answer: a prompt is the same whatever is right.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from loraweave.errors import LoraweaveError

Raw: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Item:
    """One row, read.

    Attributes:
        fields: what the prompt's placeholders stand for.
        answers: every right answer, the one to train on first; none where the set keeps them to itself.
    """

    fields: dict[str, str]
    answers: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether there is something to ask and to answer: WMT's pairs, too, are blank on one side at times."""
        return bool(self.answers) and all(self.fields.values())


Reader: TypeAlias = Callable[[Raw], Item]


def inference(first: str, second: str, labels: Mapping[str, str]) -> Reader:
    """Pairs of texts; ``labels`` has the label's names in the order of their numbers, and how an answer says each."""

    def read(row: Raw) -> Item:
        return Item({first: _text(row, first), second: _text(row, second)}, _label(row, labels))

    return read


def translation(source: str, target: str) -> Reader:
    """Sentence pairs by language."""

    def read(row: Raw) -> Item:
        pair = _mapping(row, "translation")
        return Item({"text": _text(pair, source)}, _right(_text(pair, target)))

    return read


def concepts(row: Raw) -> Item:
    """CommonGen: words, and a sentence with all of them, which the test split leaves blank."""
    return Item({"words": ", ".join(_texts(row, "concepts"))}, _right(_text(row, "target")))


def triples(row: Raw) -> Item:
    """DART: facts of three parts."""
    facts = row.get("tripleset")
    if not isinstance(facts, list):
        raise _wrong("tripleset", "a list of facts", facts)
    lines = [" | ".join(_texts({"tripleset": fact}, "tripleset")) for fact in facts]
    return Item({"facts": "\n".join(lines)}, _references(row))


def facts(row: Raw) -> Item:
    """WebNLG: facts as one text each, in which underscores stand for spaces."""
    return Item({"facts": "\n".join(fact.replace("_", " ") for fact in _texts(row, "input"))}, _references(row))


def description(row: Raw) -> Item:
    """E2E: what is known about a restaurant, as ``name[...], area[...]``."""
    return Item({"record": _text(row, "meaning_representation")}, _references(row))


def choice(row: Raw) -> Item:
    """ARC: a question, choices with labels, and the label of the right one. The answer is the choice's text."""
    offered = _mapping(row, "choices")
    texts, labels, key = _texts(offered, "text"), _texts(offered, "label"), _text(row, "answerKey")
    if len(texts) != len(labels) or (key and key not in labels):
        raise _wrong("choices", f"as many labels as texts, one of them the answer's ({key!r})", offered)
    options = "\n".join(f"- {text}" for text in texts)
    return Item(
        {"question": _text(row, "question"), "options": options}, _right(texts[labels.index(key)] if key else "")
    )


def question(row: Raw) -> Item:
    """Natural Questions: lower case, without a question mark, and one or more answers."""
    return Item({"question": _text(row, "question").removesuffix("?").rstrip()}, _right(*_texts(row, "answer")))


def trivia(row: Raw) -> Item:
    """TriviaQA: an answer and its other names, also as the authors' own score normalises them."""
    answer = _mapping(row, "answer")
    names = [*_texts(answer, "aliases", optional=True), *_texts(answer, "normalized_aliases", optional=True)]
    return Item({"question": _text(row, "question")}, _right(_text(answer, "value"), *names))


def as_it_stands(row: Raw) -> Item:
    """BIG-Bench Hard: the input brings its own instructions."""
    return Item({"question": _text(row, "input")}, _right(_text(row, "target")))


def _references(row: Raw) -> tuple[str, ...]:
    """GEM's sets: ``target``, and beside it ``references``, which training splits leave empty."""
    return _right(_text(row, "target"), *_texts(row, "references", optional=True))


def _right(*answers: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(answer for answer in answers if answer))


def _label(row: Raw, labels: Mapping[str, str]) -> tuple[str, ...]:
    label = row.get("label")
    if label is None or label == -1:
        return ()
    if isinstance(label, str) and label in labels:
        return (labels[label],)
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(labels):
        return (list(labels.values())[label],)
    raise _wrong("label", f"a number below {len(labels)}, -1, or one of {', '.join(labels)}", label)


def _text(row: Raw, key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise _wrong(key, "text", value)
    return value.strip()


def _texts(row: Raw, key: str, *, optional: bool = False) -> list[str]:
    value = row.get(key)
    if value is None and optional:
        return []
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise _wrong(key, "a list of texts", value)
    return [one.strip() for one in value]


def _mapping(row: Raw, key: str) -> Raw:
    value = row.get(key)
    if not isinstance(value, Mapping):
        raise _wrong(key, "an object", value)
    return value


def _wrong(key: str, expected: str, got: object) -> LoraweaveError:
    return LoraweaveError(f"{key!r}: expected {expected}, got {reprlib.repr(got)}")
