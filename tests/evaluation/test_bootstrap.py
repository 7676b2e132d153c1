"""Intervals of differences between methods: by hand, and against closed forms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from loraweave.errors import LoraweaveError
from loraweave.evaluation.bootstrap import against_best_rival, paired_bootstrap, resampled


def test_two_seeds_without_spread_among_items_by_hand() -> None:
    """Means of two draws from {1, 3}: 1 and 3 with probability 1/4 each, 2 with 1/2."""
    task = np.array([[1.0] * 5, [3.0] * 5])
    assert resampled([task], [1.0]) == (pytest.approx(2), pytest.approx(1), pytest.approx(3))
    # The middle 40 % of these draws are all 2.
    assert resampled([task], [1.0], confidence=0.4)[1:] == (pytest.approx(2), pytest.approx(2))


def test_tasks_are_weighed_and_drawn_from_separately() -> None:
    """One item a task: nothing is left to chance, and the value is the weighted sum."""
    value, low, high = resampled([np.array([[10.0]]), np.array([[-4.0]])], [0.5, 0.25])
    assert value == low == high == 4.0


def test_the_spread_is_the_closed_form() -> None:
    """Independent seeds and items: the bootstrap's variance is known (Owen & Eckles 2012 call it the product one).

    With ``D = a_s + b_i`` it is ``var(a) / S + var(b) / n`` for each task, the seeds' part shared by tasks of one a.
    """
    chance = np.random.default_rng(0)
    a, b, c = chance.normal(size=8), chance.normal(size=300), chance.normal(size=200)
    tasks = [a[:, None] + b[None], a[:, None] + c[None]]
    weights = [0.7, 0.3]
    value, low, high = resampled(tasks, weights)
    assert value == pytest.approx(a.mean() + 0.7 * b.mean() + 0.3 * c.mean())
    variance = a.var() / 8 + 0.49 * b.var() / 300 + 0.09 * c.var() / 200
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(variance), rel=0.06)


def test_one_seed_of_one_task_is_the_plain_paired_bootstrap() -> None:
    a, b = [3.0, 1.0, 4.0, 1.0, 5.0], [1.0, 1.0, 2.0, 0.0, 7.0]
    plain = paired_bootstrap(a, b, resamples=500, seed=2)
    assert resampled([np.subtract([a], [b])], [1.0], resamples=500, seed=2) == plain


def test_against_the_best_rival_by_hand() -> None:
    """mole leads sum; own scores are 80 and 50, so a point is worth 1/160 of retention in qa and 1/100 in nli."""
    items: dict[str, list[Any]] = {
        "base": [{"qa": [0.0, 0.0], "nli": [0.0]}],
        "sum": [{"qa": [40.0, 40.0], "nli": [10.0]}],
        "mole": [{"qa": [80.0, 80.0], "nli": [50.0]}, {"qa": [60.0, 60.0], "nli": [30.0]}],
    }
    found = against_best_rival(items, {"qa": 80.0, "nli": 50.0}, {"base": 0.0, "sum": 0.35, "mole": 0.8})
    assert {method: difference["rival"] for method, difference in found.items()} == {
        "base": "mole",
        "sum": "mole",
        "mole": "sum",
    }
    # Seeds lead by (40, 20) and (40, 20) points: 40/160 + 40/100 and 20/160 + 20/100.
    mole = found["mole"]
    assert mole["difference"] == pytest.approx((0.65 + 0.325) / 2)
    assert (mole["low"], mole["high"]) == (pytest.approx(0.325), pytest.approx(0.65))
    assert found["sum"]["difference"] == pytest.approx(-mole["difference"])
    assert (found["sum"]["low"], found["sum"]["high"]) == (pytest.approx(-0.65), pytest.approx(-0.325))
    assert mole["tasks"]["nli"] == {"difference": 30.0, "low": 20.0, "high": 40.0}


def test_runs_are_paired_by_seed() -> None:
    """Seeds that are hard for both methods say nothing about which is better."""
    a: list[Any] = [{"qa": [90.0, 90.0]}, {"qa": [10.0, 10.0]}]
    b: list[Any] = [{"qa": [85.0, 85.0]}, {"qa": [5.0, 5.0]}]
    found = against_best_rival({"a": a, "b": b}, {"qa": 100.0}, {"a": 0.5, "b": 0.45})["a"]
    assert (found["low"], found["high"]) == (pytest.approx(0.05), pytest.approx(0.05))


def test_a_method_alone_has_no_rival() -> None:
    assert against_best_rival({"sum": [{"qa": [1.0]}]}, {"qa": 1.0}, {"sum": 1.0}) == {}


def test_nothing_to_draw_from() -> None:
    with pytest.raises(LoraweaveError, match="at least one item and one seed"):
        resampled([np.zeros((2, 0))], [1.0])
    with pytest.raises(LoraweaveError, match="at least one item and one seed"):
        resampled([], [])
