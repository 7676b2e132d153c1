"""Metrics by name. Every value is a percentage, 0 to 100, and higher is better.

An item with several right answers counts as its best one, except in BLEU, which is made for several references.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from loraweave.errors import LoraweaveError, unknown
from loraweave.evaluation.bleu import bleu_counts, bleu_of_counts, corpus_bleu, sentence_bleu

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[np.float64]]

References: TypeAlias = Sequence[Sequence[str]]

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


@dataclass(frozen=True)
class Metric:
    """A way to score predictions; call it.

    Attributes:
        name: what a recipe calls it.
        summary: one line for help texts.
        item: the score of one prediction given its right answers, 0 to 100.
        corpus: the score of all predictions together where that is not the mean of the items, as in BLEU.
        counts: goes with ``corpus``: numbers of one prediction whose sums over items decide the score.
        of_counts: goes with ``corpus``: the scores that such sums give, ``[..., counts] -> [...]``.
    """

    name: str
    summary: str
    item: Callable[[str, Sequence[str]], float]
    corpus: Callable[[Sequence[str], References], float] | None = None
    counts: Callable[[str, Sequence[str]], list[float]] | None = None
    of_counts: Callable[[Array], Array] | None = None

    def __call__(self, predictions: Sequence[str], references: References) -> float:
        """The score of all ``predictions``, 0 to 100; ``references[i]`` are the right answers to item ``i``.

        Raises:
            LoraweaveError: no predictions, not as many references, or an item without any.
        """
        _check(self.name, predictions, references)
        if self.corpus is not None:
            return self.corpus(predictions, references)
        return sum(map(self.item, predictions, references)) / len(predictions)

    def per_item(self, predictions: Sequence[str], references: References) -> list[float]:
        """The score of every prediction by itself, 0 to 100, e.g. for a bootstrap. Raises as calling does."""
        _check(self.name, predictions, references)
        return [self.item(prediction, right) for prediction, right in zip(predictions, references, strict=True)]

    def item_counts(self, predictions: Sequence[str], references: References) -> list[list[float]] | None:
        """``counts`` of every prediction; None where the score is a mean over :meth:`per_item`. Raises as calling."""
        _check(self.name, predictions, references)
        if self.counts is None:
            return None
        return [self.counts(prediction, right) for prediction, right in zip(predictions, references, strict=True)]


def get_metric(name: str) -> Metric:
    """The metric called ``name``. Raises :class:`LoraweaveError` with the nearest name for an unknown one."""
    if name not in METRICS:
        raise unknown("metric", name, METRICS)
    return METRICS[name]


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """100 if the prediction equals a reference after SQuAD's normalisation (Rajpurkar et al. 2016), else 0.

    Lower case, without ASCII punctuation, without the articles a, an and the, white space collapsed. One exception to
    SQuAD's script: where that leaves nothing of the *reference* (``"(A)"``, ``"] )"``), it would call an empty answer
    right and ``"(A)"`` equal to ``"the"``; there, articles, and if need be punctuation, are kept on both sides.
    """
    for reference in references:
        for normalise in (_squad, _squad_with_articles, _loose_space):
            if wanted := normalise(reference):
                break
        if normalise(prediction) == wanted:
            return 100.0
    return 0.0


def exact_match_loose(prediction: str, references: Sequence[str]) -> float:
    """100 if the prediction equals a reference the way LoRAHub compares them, else 0.

    LoRAHub's ``lorahub_inference`` strips outer white space, lower-cases and removes *every* full stop, on both sides;
    other punctuation, articles and inner white space count.
    """
    return 100.0 * (_without_stops(prediction) in map(_without_stops, references))


def accuracy(prediction: str, references: Sequence[str]) -> float:
    """100 if the prediction is a reference, whatever its case and outer white space, else 0: for labels."""
    return 100.0 * (prediction.strip().casefold() in (reference.strip().casefold() for reference in references))


def rouge(kind: str) -> Callable[[str, Sequence[str]], float]:
    """The F measure of ``kind`` (rouge1, rouge2, rougeL), best reference, by Google's rouge-score without stemming.

    Its tokeniser keeps only ``a-z0-9``: for languages with other letters use BLEU.
    """

    def item(prediction: str, references: Sequence[str]) -> float:
        from rouge_score.rouge_scorer import RougeScorer

        return 100.0 * float(RougeScorer([kind]).score_multi(list(references), prediction)[kind].fmeasure)

    return item


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("exact_match", "equal after SQuAD's normalisation (case, punctuation, articles)", exact_match),
        Metric(
            "exact_match_loose", "equal but for case, full stops and outer spaces, as LoRAHub has it", exact_match_loose
        ),
        Metric("accuracy", "equal but for case and outer spaces: for labels", accuracy),
        Metric(
            "bleu",
            "corpus BLEU by sacrebleu, with any number of references",
            sentence_bleu,
            corpus_bleu,
            bleu_counts,
            bleu_of_counts,
        ),
        Metric("rouge1", "F measure of single words in common", rouge("rouge1")),
        Metric("rouge2", "F measure of word pairs in common", rouge("rouge2")),
        Metric("rougeL", "F measure of the longest common subsequence", rouge("rougeL")),
    )
}


def _loose_space(text: str) -> str:
    return " ".join(text.lower().split())


def _squad_with_articles(text: str) -> str:
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


def _squad(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def _without_stops(text: str) -> str:
    return text.strip().lower().replace(".", "")


def _check(name: str, predictions: Sequence[str], references: References) -> None:
    if not predictions:
        raise LoraweaveError(f"{name}: expected at least one prediction, got none")
    if len(predictions) != len(references):
        raise LoraweaveError(f"{name}: {len(predictions)} predictions but {len(references)} lists of references")
    for number, right in enumerate(references):
        if isinstance(right, str) or not right:
            got = "one text" if isinstance(right, str) else "nothing"
            raise LoraweaveError(f"{name}: references[{number}] must be a list of at least one text, got {got}")
