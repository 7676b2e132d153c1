"""Counting answers: averages, wins, ties and losses, and what the order of the pictures did."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from loraweave.evaluation.judges.answers import Answers
from loraweave.evaluation.judges.pictures import Pair
from loraweave.evaluation.judges.question import DIMENSIONS, Question


def tally(asked: Sequence[Question], answers: Answers) -> dict[str, Any]:
    """What the answers say.

    A picture's score is its mean over the two orders; a pair counts when both orders are answered. Keys:

    - ``pairs``: a list with, for each two methods, ``a``, ``b``, ``counted`` and ``left_out`` (pairs with a failed
      or open question), and for each dimension the mean scores ``a`` and ``b`` and the shares ``wins``, ``ties`` and
      ``losses`` of ``a`` (None without a counted pair);
    - ``position``: for each dimension ``bias``, the mean score of the picture shown first less that of the second,
      over all answers, and ``flips``, the share of pairs in which the two orders name opposite winners (None without
      answers);
    - ``scores``: rows with ``id``, ``method``, ``against`` and a score for each dimension, of counted pairs;
    - ``answered``, ``failed``, ``open``: numbers of questions.
    """
    found = {(q.pair.id, q.first, q.second): answers.get(q) for q in asked}
    scored = {key: answer["scores"] for key, answer in found.items() if answer is not None and "scores" in answer}
    unique: dict[tuple[str, str, str], Pair] = {(q.pair.id, q.pair.a, q.pair.b): q.pair for q in asked}
    counted = {key: both for key, pair in unique.items() if (both := _both(pair, scored)) is not None}
    methods = list(dict.fromkeys((pair.a, pair.b) for pair in unique.values()))
    return {
        "pairs": [_versus(a, b, [key for key in unique if key[1:] == (a, b)], counted) for a, b in methods],
        "position": {d: _position(d, list(scored.values()), list(counted.values())) for d in DIMENSIONS},
        "scores": [
            {"id": key[0], "method": method, "against": other, **{d: _mean(both, side, d) for d in DIMENSIONS}}
            for key, both in counted.items()
            for side, method, other in ((0, key[1], key[2]), (1, key[2], key[1]))
        ],
        "answered": len(scored),
        "failed": sum(answer is not None and "failed" in answer for answer in found.values()),
        "open": sum(answer is None for answer in found.values()),
    }


Scores = Mapping[str, Mapping[str, float]]
Both = tuple[tuple[Mapping[str, float], Mapping[str, float]], tuple[Mapping[str, float], Mapping[str, float]]]


def _both(pair: Pair, scored: Mapping[tuple[str, str, str], Scores]) -> Both | None:
    """Scores of ``a`` and of ``b``, each as shown first and as shown second."""
    forth, back = scored.get((pair.id, pair.a, pair.b)), scored.get((pair.id, pair.b, pair.a))
    if forth is None or back is None:
        return None
    return (forth["first"], back["second"]), (back["first"], forth["second"])


def _mean(both: Both, side: int, dimension: str) -> float:
    return statistics.fmean(scores[dimension] for scores in both[side])


def _versus(
    a: str, b: str, keys: Sequence[tuple[str, str, str]], counted: Mapping[tuple[str, str, str], Both]
) -> dict[str, Any]:
    here = [counted[key] for key in keys if key in counted]
    row: dict[str, Any] = {"a": a, "b": b, "counted": len(here), "left_out": len(keys) - len(here)}
    for dimension in DIMENSIONS:
        means = [(_mean(both, 0, dimension), _mean(both, 1, dimension)) for both in here]
        row[dimension] = {
            "a": _average([x for x, _ in means]),
            "b": _average([y for _, y in means]),
            "wins": _average([float(x > y) for x, y in means]),
            "ties": _average([float(x == y) for x, y in means]),
            "losses": _average([float(x < y) for x, y in means]),
        }
    return row


def _position(dimension: str, scored: Sequence[Scores], counted: Sequence[Both]) -> dict[str, float | None]:
    gaps = [scores["first"][dimension] - scores["second"][dimension] for scores in scored]
    # a as first against b as second, then a as second against b as first: opposite signs are opposite winners.
    forth_back = [(a[0][dimension] - b[1][dimension], a[1][dimension] - b[0][dimension]) for a, b in counted]
    return {"bias": _average(gaps), "flips": _average([float(x * y < 0) for x, y in forth_back])}


def _average(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None
