"""Metrics against values worked out by hand, and against the libraries that define them."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from loraweave.errors import LoraweaveError
from loraweave.evaluation.metrics import METRICS, get_metric


def one(metric: str, prediction: str, *references: str) -> float:
    return get_metric(metric)([prediction], [list(references)])


@pytest.mark.parametrize(
    ("prediction", "references", "right"),
    [
        ("The  Cat!", ["cat"], True),
        ("an apple, a pear", ["Apple pear"], True),
        ("another", ["other"], False),
        ("theatre", ["atre"], False),
        ("U.S.A.", ["USA"], True),
        ("six geese", ["6 geese", "Six geese."], True),
        ("", ["cat"], False),
        ("cat dog", ["cat"], False),
    ],
)
def test_exact_match_as_squad(prediction: str, references: list[str], right: bool) -> None:
    assert one("exact_match", prediction, *references) == 100.0 * right


@pytest.mark.parametrize(
    ("prediction", "reference", "right"),
    [
        # SQuAD's script leaves nothing of these references and would call anything as empty right.
        ("", "(A)", False),
        ("the", "(A)", False),
        ("A", "(A)", True),
        ("(B)", "(A)", False),
        ("(A)", "(B)", False),
        ("] )", "] )", True),
        (") ]", "] )", False),
        ("", "] )", False),
        ("", "", True),
        ("a", "", False),
    ],
)
def test_exact_match_where_normalisation_leaves_nothing(prediction: str, reference: str, right: bool) -> None:
    assert one("exact_match", prediction, reference) == 100.0 * right


@pytest.mark.parametrize(
    ("prediction", "reference", "right"),
    [
        (" Yes. ", "yes", True),
        ("yes", "Yes.", True),
        ("U.S.", "us", True),
        ("yes!", "yes", False),
        ("the cat", "cat", False),
        ("a  b", "a b", False),
        ("yes .", "yes", False),
    ],
)
def test_loose_match_as_lorahub(prediction: str, reference: str, right: bool) -> None:
    assert one("exact_match_loose", prediction, reference) == 100.0 * right


def test_accuracy_is_case_and_outer_space_only() -> None:
    metric = get_metric("accuracy")
    assert metric([" Entailment\n", "neutral", "yes."], [["entailment"], ["contradiction"], ["yes"]]) == 100 / 3
    assert one("accuracy", "STRASSE", "Straße") == 100.0


def test_best_reference_and_mean() -> None:
    metric = get_metric("exact_match")
    references = [["x", "b"], ["x"], ["d"], ["e", "y"]]
    assert metric(["b", "c", "d", "e"], references) == 75.0
    assert metric.per_item(["b", "c", "d", "e"], references) == [100.0, 0.0, 100.0, 100.0]


def test_rouge_by_hand() -> None:
    # Words in common: "the cat sat" of 3 and 6; pairs: "the cat", "cat sat" of 2 and 5.
    prediction, reference = "the cat sat", "the cat sat on the mat"
    assert one("rouge1", prediction, reference) == pytest.approx(200 * 1 * 0.5 / 1.5)
    assert one("rouge2", prediction, reference) == pytest.approx(200 * 1 * 0.4 / 1.4)
    # The order of the longest common subsequence counts, adjacency does not: "the sat" of "sat the ... sat".
    assert one("rougeL", "cat the sat", reference) == pytest.approx(200 * (2 / 3) * (2 / 6) / (2 / 3 + 2 / 6))
    assert one("rouge1", "dog", reference, "dog") == 100.0
    assert one("rouge1", "", reference) == 0.0


def test_bleu_by_hand() -> None:
    # Precisions of "the cat sat on mat": 5/5, 3/4, 2/3, 1/2; brevity exp(1 - 6/5).
    expected = 100 * math.exp(1 - 6 / 5) * (1 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert one("bleu", "the cat sat on mat", "the cat sat on the mat") == pytest.approx(expected)
    assert one("bleu", "the cat sat on the mat", "something else", "the cat sat on the mat") == pytest.approx(100)


WORDS = ["a", "man", "dog", "sees", "runs", "the", "blue", "on", "hill", "and", "sits"]


def sentences(seed: int, n: int) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(4, 9))) for _ in range(n)]


def test_bleu_is_sacrebleu() -> None:
    predictions, first, second = sentences(0, 30), sentences(1, 30), sentences(2, 30)
    metric = get_metric("bleu")
    single = sacrebleu.corpus_bleu(predictions, [first]).score
    assert 0 < single < 100
    assert metric(predictions, [[r] for r in first]) == pytest.approx(single)
    double = sacrebleu.corpus_bleu(predictions, [first, second]).score
    assert double > single
    assert metric(predictions, list(zip(first, second, strict=True))) == pytest.approx(double)


def test_bleu_with_unequal_numbers_of_references() -> None:
    predictions, first, second = sentences(0, 30), sentences(1, 30), sentences(2, 30)
    ragged = [[f, s] if n % 3 == 0 else [f] for n, (f, s) in enumerate(zip(first, second, strict=True))]
    # Repeating a reference changes neither clipped counts nor the closest length.
    filled = [refs if len(refs) == 2 else refs * 2 for refs in ragged]
    expected = sacrebleu.corpus_bleu(predictions, [list(stream) for stream in zip(*filled, strict=True)]).score
    metric = get_metric("bleu")
    assert metric(predictions, ragged) == pytest.approx(expected)
    assert metric(predictions, ragged[::-1]) != pytest.approx(expected)
    order = list(range(30))
    random.Random(0).shuffle(order)
    assert metric([predictions[n] for n in order], [ragged[n] for n in order]) == pytest.approx(expected)


def test_bleu_of_single_items_is_sacrebleus() -> None:
    predictions, first = sentences(0, 5), sentences(1, 5)
    expected = [sacrebleu.sentence_bleu(p, [f]).score for p, f in zip(predictions, first, strict=True)]
    assert get_metric("bleu").per_item(predictions, [[f] for f in first]) == pytest.approx(expected)


def test_bleu_of_counts_is_the_corpus_bleu_of_the_items_that_were_counted() -> None:
    """Whatever is drawn: empty answers, orders without a right n-gram, none at all, answers too short for some."""
    metric = get_metric("bleu")
    said = [*sentences(0, 20), "", "a", "blue hill", "zebra", "zebra yak gnu emu", "the man"]
    right = [[f, s] if n % 3 else [f] for n, (f, s) in enumerate(zip(sentences(1, 26), sentences(2, 26), strict=True))]
    right[-1] = ["the man", "a dog"]
    counts = metric.item_counts(said, right)
    assert counts is not None
    assert metric.of_counts is not None
    chance = random.Random(3)
    drawn = [chance.choices(range(26), k=chance.choice([1, 2, 5, 26])) for _ in range(200)]
    drawn += [[n] * 2 for n in range(26)]
    expected = [metric([said[n] for n in some], [right[n] for n in some]) for some in drawn]
    assert expected.count(0.0) > 10
    sums = np.array([[sum(counts[n][k] for n in some) for k in range(10)] for some in drawn])
    assert metric.of_counts(sums) == pytest.approx(np.array(expected))


@pytest.mark.parametrize("name", METRICS)
def test_what_is_no_mean_of_items_has_counts(name: str) -> None:
    metric = get_metric(name)
    said, right = ["the cat", "a dog barks at night now"], [["the hat"], ["a dog barks at midnight now"]]
    if metric.corpus is None:
        assert metric.item_counts(said, right) is None
        assert metric(said, right) == pytest.approx(sum(metric.per_item(said, right)) / 2)
    else:
        assert metric.item_counts(said, right) is not None
        assert metric.of_counts is not None


@pytest.mark.parametrize("kind", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_rouge_score_with_the_best_reference(kind: str) -> None:
    predictions, first, second = sentences(0, 20), sentences(1, 20), sentences(2, 20)
    scorer = RougeScorer([kind], use_stemmer=False)
    best = [
        max(scorer.score(r, p)[kind].fmeasure for r in refs)
        for p, *refs in zip(predictions, first, second, strict=True)
    ]
    value = get_metric(kind)(predictions, list(zip(first, second, strict=True)))
    assert value == pytest.approx(100 * sum(best) / len(best))


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_runs_from_0_to_100(name: str) -> None:
    metric = get_metric(name)
    right = ["the blue dog runs on", "a man sits on the hill"]
    assert metric(right, [[text] for text in right]) == pytest.approx(100)
    assert metric(["zzz", "qqq"], [[text] for text in right]) == pytest.approx(0)
    assert metric(["", ""], [[text] for text in right]) == pytest.approx(0)
    assert metric.name == name
    assert metric.summary


@pytest.mark.parametrize("name", METRICS)
def test_misuse_is_named(name: str) -> None:
    metric = get_metric(name)
    for call in (metric, metric.per_item):
        with pytest.raises(LoraweaveError, match="at least one prediction"):
            call([], [])
        with pytest.raises(LoraweaveError, match="2 predictions but 1 lists"):
            call(["a", "b"], [["a"]])
        with pytest.raises(LoraweaveError, match=r"references\[1\] must be a list .* got one text"):
            call(["a", "b"], [["a"], "b"])
        with pytest.raises(LoraweaveError, match=r"references\[0\] .* got nothing"):
            call(["a"], [[]])


def test_unknown_metric_suggests_the_nearest() -> None:
    with pytest.raises(LoraweaveError, match=r"unknown metric 'rougel'; did you mean 'rougeL'"):
        get_metric("rougel")
