"""The part of a judgement: what ``loraweave judge`` leaves behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loraweave.evaluation.judges.question import DIMENSIONS

JUDGEMENT = "judgement.json"
_SHARES = ("wins", "ties", "losses")


def judgement(found: Mapping[str, Any]) -> dict[str, Any]:
    """The part about ``judgement.json``: every two methods, every method, and position bias."""
    pairs = found["pairs"]
    return {
        "template": "judgement.html.j2",
        "dimensions": DIMENSIONS,
        "pairs": [
            {
                "a": row["a"],
                "b": row["b"],
                "counted": row["counted"],
                "left_out": row["left_out"],
                "dimensions": [_versus(d, row[d]) for d in DIMENSIONS],
            }
            for row in pairs
        ],
        "methods": [
            {"name": method, "cells": [_of_method(method, d, pairs) for d in DIMENSIONS]}
            for method in dict.fromkeys(name for row in pairs for name in (row["a"], row["b"]))
        ],
        "position": [{"dimension": d, "bias": of["bias"], "flips": of["flips"]} for d, of in found["position"].items()],
        "facts": [
            ("judge", str(found["model"])),
            ("answers", _counts(found)),
            ("pairs that count", f"{sum(r['counted'] for r in pairs)} of {_asked(pairs)}"),
        ],
        "missing": found["failed"] + found["open"],
    }


def _versus(dimension: str, of: Mapping[str, Any]) -> dict[str, Any]:
    shares = None if of["wins"] is None else [(name, round(100 * float(of[name]), 2)) for name in _SHARES]
    return {"name": dimension, "a": of["a"], "b": of["b"], "shares": shares}


def _of_method(method: str, dimension: str, pairs: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Mean score, and share of wins against all others, by the pairs that count."""
    mean, wins, counted = 0.0, 0.0, 0
    for row in pairs:
        if method not in (row["a"], row["b"]) or not row["counted"]:
            continue
        of, first = row[dimension], method == row["a"]
        mean += row["counted"] * of["a" if first else "b"]
        wins += row["counted"] * of["wins" if first else "losses"]
        counted += row["counted"]
    return {"mean": mean / counted if counted else None, "wins": wins / counted if counted else None}


def _asked(pairs: Sequence[Mapping[str, Any]]) -> int:
    return sum(int(row["counted"]) + int(row["left_out"]) for row in pairs)


def _counts(found: Mapping[str, Any]) -> str:
    rest = [f"{found[kind]} {what}" for kind, what in (("failed", "not usable"), ("open", "open")) if found[kind]]
    return ", ".join([f"{found['answered']} with scores", *rest])
