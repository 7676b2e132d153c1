"""Intervals of differences between methods: by hand, and against closed forms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from loraweave.errors import LoraweaveError
from loraweave.evaluation.bootstrap import DECISIVE, Resampled, against_best_rival, paired_bootstrap, resampled
from loraweave.evaluation.metrics import get_metric


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


# ---------------------------------------------------------------- scores of a corpus

REFERENCES = [
    ["the cat sits on the mat in the hall"],
    ["a dog barks at night", "the dog barks all night"],
    ["we ate bread and cheese and drank some wine"],
    ["it rains"],
    ["nobody came to the station on that cold morning"],
]
SAID = {
    "mole": [
        ["the cat sits on a mat in the hall", "the dog barks", "we ate bread and drank", "it rains", "nobody came"],
        ["a cat sits on the mat", "a dog barks at night", "bread and cheese and wine", "rain", "to the station"],
    ],
    "sum": [["the cat", "", "we ate bread and cheese and drank wine", "it rains", "nobody came to that station"]],
}
LABELS = ["red", "large", "red"]
CHOSEN = {"mole": [["red", "large", "large"], ["red", "large", "red"]], "sum": [["red", "red", "large"]]}
OWN_SAID = [right[0] for right in REFERENCES[:3]] + ["it snows", "nobody came to the station"]
OWN_CHOSEN = ["red", "large", "large"]


def runs(name: str) -> list[dict[str, Any]]:
    bleu, accuracy = get_metric("bleu"), get_metric("accuracy")
    found = []
    for said, chosen in zip(SAID[name], CHOSEN[name], strict=True):
        counted = bleu.item_counts(said, REFERENCES)
        assert counted is not None
        found.append({"news": counted, "size": accuracy.per_item(chosen, [[label] for label in LABELS])})
    return found


def slow(seeds: Any, items: dict[str, Any]) -> float:
    """The difference in retention on one draw: texts are taken, and the metric itself is called on them."""
    kept = dict.fromkeys(SAID, 0.0)
    for name in SAID:
        for seed in seeds:
            run = seed if len(SAID[name]) > 1 else 0
            for task, metric, said, own, right in (
                ("news", get_metric("bleu"), SAID[name][run], OWN_SAID, REFERENCES),
                ("size", get_metric("accuracy"), CHOSEN[name][run], OWN_CHOSEN, [[label] for label in LABELS]),
            ):
                taken = items[task]
                wanted = [right[i] for i in taken]
                # Where the own expert has nothing, nothing can be compared with it: such draws are left out.
                yardstick = metric([own[i] for i in taken], wanted) or math.nan
                kept[name] += metric([said[i] for i in taken], wanted) / yardstick / 2 / len(seeds)
    return kept["mole"] - kept["sum"]


def test_each_draw_has_the_score_of_the_corpus_that_it_took() -> None:
    """The oracle: a loop that draws seeds and items and asks the metrics (Koehn 2004)."""
    own = {
        "news": get_metric("bleu").item_counts(OWN_SAID, REFERENCES),
        "size": get_metric("accuracy").per_item(OWN_CHOSEN, [[label] for label in LABELS]),
    }
    draws = 300
    found = Resampled(
        {name: runs(name) for name in SAID},
        own,  # type: ignore[arg-type]
        {"news": "bleu", "size": "accuracy"},
        resamples=draws,
    ).difference("mole", "sum")
    chance = np.random.default_rng(0)
    seeds = chance.integers(2, size=(draws, 2))
    items = {task: chance.integers(n, size=(draws, n)) for task, n in (("news", 5), ("size", 3))}
    expected = [slow(seeds[d], {task: taken[d] for task, taken in items.items()}) for d in range(draws)]
    assert found["difference"] == pytest.approx(slow([0, 1], {"news": range(5), "size": range(3)}))
    assert 0 < np.isnan(expected).sum() < 30
    low, high = np.nanquantile(expected, [0.025, 0.975])
    assert (found["low"], found["high"]) == (pytest.approx(low), pytest.approx(high))


def test_what_is_measured_is_what_the_table_shows() -> None:
    """Sentence by sentence the first is better, as a corpus the second, which is what the score says."""
    bleu = get_metric("bleu")
    right = [["it rains in spring"]] * 6 + [[" ".join("abcdefghijklmnopqrst")]] * 2
    first, second = (
        ["it rains in spring"] * 6 + ["a b"] * 2,
        ["it rains in may"] * 6 + [" ".join("abcdefghijklmnopqrst")] * 2,
    )
    assert sum(bleu.per_item(first, right)) > sum(bleu.per_item(second, right))
    assert bleu(first, right) < bleu(second, right)
    answers = {name: [{"news": bleu.item_counts(said, right)}] for name, said in (("a", first), ("b", second))}
    kept = {name: bleu(said, right) / 50 for name, said in (("a", first), ("b", second))}
    found = against_best_rival(answers, {"news": 50.0}, kept, {"news": "bleu"})["a"]  # type: ignore[arg-type]
    assert found["difference"] < 0
    assert found["difference"] == pytest.approx(kept["a"] - kept["b"])
    assert found["tasks"]["news"]["difference"] == pytest.approx(bleu(first, right) - bleu(second, right))


def test_the_own_expert_is_asked_the_same_draw() -> None:
    """Who answers as the own expert does keeps everything, on whichever items; a fixed yardstick would not know."""
    own = [100.0] * 6 + [0.0] * 4
    answers = {"same": [{"qa": own}], "nothing": [{"qa": [0.0] * 10}]}
    kept = {"same": 1.0, "nothing": 0.0}
    found = against_best_rival(answers, {"qa": own}, kept)["same"]
    assert (found["low"], found["difference"], found["high"]) == (1.0, 1.0, 1.0)
    fixed = against_best_rival(answers, {"qa": 60.0}, kept)["same"]
    assert fixed["low"] < 0.7 < 1.3 < fixed["high"]


def test_a_handful_of_items_decides_nothing() -> None:
    """Five items, all for the same side, happen by chance in 1 of 16 cases; six in 1 of 32."""
    for items, clear in ((DECISIVE - 1, False), (DECISIVE, True)):
        answers = {"a": [{"qa": [100.0] * items + [0.0] * 20}], "b": [{"qa": [0.0] * (items + 20)}]}
        found = against_best_rival(answers, {"qa": 100.0}, {"a": 0.2, "b": 0.0})["a"]
        assert found["items"] == items
        assert found["low"] > 0
        assert found["clear"] is clear
        behind = against_best_rival(answers, {"qa": 100.0}, {"a": 0.2, "b": 0.0})["b"]
        assert behind["high"] < 0
        assert behind["clear"] is clear, "who is behind is so as surely"
    many = {"a": [{"qa": [100.0, 0.0] * 20}], "b": [{"qa": [0.0, 100.0] * 20}]}
    assert not against_best_rival(many, {"qa": 100.0}, {"a": 0.5, "b": 0.5})["a"]["clear"], "0 is inside"


def test_a_yardstick_that_many_draws_lose_is_no_ground_to_stand_on() -> None:
    """The own expert has one of ten items right: a third of all draws has none of its points."""
    answers = {"a": [{"qa": [100.0] * 10}], "b": [{"qa": [0.0] * 10}]}
    found = against_best_rival(answers, {"qa": [100.0] + [0.0] * 9}, {"a": 10.0, "b": 0.0})["a"]
    assert found["difference"] == pytest.approx(10)
    assert 0 < found["low"] <= found["high"] == pytest.approx(10)
    assert not found["clear"]


def test_runs_of_other_items_are_refused() -> None:
    with pytest.raises(LoraweaveError, match="the same items and seeds"):
        Resampled({"a": [{"qa": [1.0, 2.0]}], "b": [{"qa": [1.0]}]}, {"qa": 1.0})
    with pytest.raises(LoraweaveError, match="the same items and seeds"):
        Resampled({"a": [{"qa": [1.0]}] * 3, "b": [{"qa": [1.0]}] * 2}, {"qa": 1.0})


# ---------------------------------------------------------------- edges


def test_a_method_alone_has_no_rival() -> None:
    assert against_best_rival({"sum": [{"qa": [1.0]}]}, {"qa": 1.0}, {"sum": 1.0}) == {}


def test_nothing_to_draw_from() -> None:
    with pytest.raises(LoraweaveError, match="at least one item and one seed"):
        resampled([np.zeros((2, 0))], [1.0])
    with pytest.raises(LoraweaveError, match="at least one item and one seed"):
        resampled([], [])
