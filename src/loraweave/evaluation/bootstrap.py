"""Intervals by resampling: how much better one method is than another on the same items and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from loraweave.errors import LoraweaveError

Array: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"
# Seed by seed, task by task, the score of each item.
Items: TypeAlias = Sequence[Mapping[str, Sequence[float]]]

RESAMPLES, CONFIDENCE = 10_000, 0.95
_AT_ONCE = 1_000_000


def resampled(
    differences: Sequence[Array],
    weights: Sequence[float],
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> tuple[float, float, float]:
    """``sum_t weights[t] * mean(differences[t])`` and its percentile interval ``(value, low, high)``.

    Every draw takes seeds with replacement, the same for all tasks, and within each task items with replacement, the
    same for all seeds (Efron; for NLP see Koehn 2004).

    Args:
        differences: for each task ``[seeds, items]``, one method minus the other; as many seeds in every task.
        weights: of the tasks.
        resamples: number of draws.
        confidence: share of draws inside the bounds.
        seed: of the draws; equal shapes get equal draws.

    Raises:
        LoraweaveError: no items, or a parameter out of range.
    """
    if resamples < 1 or not 0 < confidence < 1:
        raise LoraweaveError(
            f"paired bootstrap: expected resamples >= 1 and 0 < confidence < 1, got {resamples} and {confidence:g}"
        )
    if not differences or any(task.ndim != 2 or not task.size for task in differences):
        raise LoraweaveError("paired bootstrap: expected at least one item and one seed of every task")
    generator = np.random.default_rng(seed)
    seeds = len(differences[0])
    drawn = _counts(generator, resamples, seeds)
    sums = np.zeros(resamples)
    for task, weight in zip(differences, weights, strict=True):
        n = task.shape[1]
        at_once = max(1, _AT_ONCE // n)
        for first in range(0, resamples, at_once):
            some = slice(first, min(first + at_once, resamples))
            items = _counts(generator, some.stop - some.start, n)
            sums[some] += weight * ((drawn[some] @ task) * items).sum(1) / (seeds * n)
    low, high = np.quantile(sums, [(1 - confidence) / 2, (1 + confidence) / 2])
    value = sum(weight * float(task.mean()) for task, weight in zip(differences, weights, strict=True))
    return value, float(low), float(high)


def paired_bootstrap(
    a: Sequence[float],
    b: Sequence[float],
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> tuple[float, float, float]:
    """How much better ``a`` is than ``b`` on the same items: ``(difference of means, low, high)``.

    An interval without 0 means that other items of this kind would hardly turn the order round; it says nothing about
    other seeds.

    Args:
        a: scores of each item under one method.
        b: scores of the same items, in the same order, under the other.
        resamples: number of draws.
        confidence: share of draws inside the bounds.
        seed: of the draws.

    Raises:
        LoraweaveError: no items, unequal numbers of them, or a parameter out of range.
    """
    if len(a) != len(b) or not len(a):
        raise LoraweaveError(f"paired bootstrap: expected as many scores on both sides, got {len(a)} and {len(b)}")
    task = np.asarray([a], dtype=np.float64) - np.asarray([b], dtype=np.float64)
    return resampled([task], [1.0], resamples=resamples, confidence=confidence, seed=seed)


def against_best_rival(
    items: Mapping[str, Items], own: Mapping[str, float], retention: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """Method -> its difference in retention to the best of the others, with an interval.

    ``rival`` (who that is), ``difference``, ``low`` and ``high`` (retention, 95 %), and ``tasks``: the same three for
    every task, in points. Runs are paired by seed; a method that ran once meets every seed of the other. The tasks' own
    scores count as given.

    Args:
        items: method -> seed by seed, task -> the score of each item, 0 to 100.
        own: task -> the score of its own expert, what retention divides by.
        retention: method -> its mean retention; decides who is best (the first of equals).
    """
    if len(items) < 2:
        return {}
    return {
        method: _against(rival, runs, items[rival], own)
        for method, runs in items.items()
        for rival in [max((m for m in items if m != method), key=lambda m: retention[m])]
    }


def _against(rival: str, runs: Items, others: Items, own: Mapping[str, float]) -> dict[str, Any]:
    tasks = {task: _difference(task, runs, others) for task in runs[0]}
    weights = [1 / (len(own) * own[task]) for task in own]
    value, low, high = resampled([tasks[task] for task in own], weights)
    return {
        "rival": rival,
        "difference": value,
        "low": low,
        "high": high,
        "tasks": {
            task: dict(zip(("difference", "low", "high"), resampled([found], [1.0]), strict=True))
            for task, found in tasks.items()
        },
    }


def _difference(task: str, runs: Items, others: Items) -> Array:
    """``[seeds, items]``."""
    ours, theirs = (np.asarray([run[task] for run in side], dtype=np.float64) for side in (runs, others))
    return ours - theirs


def _counts(generator: np.random.Generator, draws: int, n: int) -> Array:
    """``[draws, n]``: how often each of ``n`` is among ``n`` taken with replacement."""
    taken = generator.integers(n, size=(draws, n)) + n * np.arange(draws)[:, None]
    return np.bincount(taken.ravel(), minlength=draws * n).reshape(draws, n).astype(np.float64)
