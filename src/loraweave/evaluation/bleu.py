"""BLEU by sacrebleu: of a sentence, of a corpus, and of any corpus drawn from items whose counts are known."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[np.float64]]

_ORDERS = 4


def sentence_bleu(prediction: str, references: Sequence[str]) -> float:
    """sacrebleu's sentence BLEU (effective order): a guide to single items, not a share of the corpus BLEU."""
    return float(_sentence(prediction, references).score)


def corpus_bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """sacrebleu's corpus BLEU (tokeniser 13a, mixed case, exponential smoothing); items may differ in references."""
    from sacrebleu.metrics import BLEU

    # sacrebleu wants streams: the first references of all items, then the second ones, None where an item has no more.
    streams = [list(stream) for stream in itertools.zip_longest(*references)]
    # A perfect score comes out a rounding error above 100.
    return min(100.0, float(BLEU().corpus_score(list(predictions), streams).score))


def bleu_counts(prediction: str, references: Sequence[str]) -> list[float]:
    """What one item adds to a corpus BLEU: lengths of prediction and closest reference, then n-grams of orders 1 to 4
    that are right, and that there are."""
    found = _sentence(prediction, references)
    return [float(n) for n in (found.sys_len, found.ref_len, *found.counts, *found.totals)]


def bleu_of_counts(sums: Array) -> Array:
    """Corpus BLEU from sums of :func:`bleu_counts`, ``[..., 10] -> [...]``: what :func:`corpus_bleu` computes, for many
    corpora at once."""
    import numpy as np

    length, reference = sums[..., 0], sums[..., 1]
    right, total = sums[..., 2 : 2 + _ORDERS], sums[..., 2 + _ORDERS :]
    # The k-th order without a right n-gram counts as 1 / 2^k of one (mteval-v13a).
    missed = (right == 0) & (total > 0)
    smoothed = np.where(missed, 0.5 ** np.cumsum(missed, -1), right)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(smoothed / total).mean(-1) + np.minimum(0.0, 1 - reference / length)
    possible = (right.sum(-1) > 0) & (total > 0).all(-1)
    return np.where(possible, np.minimum(100.0, 100 * np.exp(np.where(possible, logs, 0.0))), 0.0)


def _sentence(prediction: str, references: Sequence[str]) -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU(effective_order=True).sentence_score(prediction, list(references))
