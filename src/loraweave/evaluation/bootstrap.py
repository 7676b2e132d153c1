"""Intervals by resampling: how much better one method is than another on the same items and seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from loraweave.errors import LoraweaveError
from loraweave.evaluation.metrics import get_metric

Array: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"
# Of each item its score, or the counts of which a corpus score is made (``Metric.counts``).
Answers: TypeAlias = Sequence[float] | Sequence[Sequence[float]]
# Seed by seed, task by task.
Runs: TypeAlias = Sequence[Mapping[str, Answers]]

RESAMPLES, CONFIDENCE = 10_000, 0.95
# Fewer items on which two methods differ cannot decide at 95 %, even if all speak for the same one: 2 * 0.5^5 > 0.05.
DECISIVE = 6
# Draws in which an own expert has no point at all say nothing about retention; more of them than this share, and the
# yardstick is too small to be sure of anything.
_LOST = 0.05
_AT_ONCE = 1_000_000


@dataclass(frozen=True)
class Table:
    """What some runs answered to the items of one task.

    Attributes:
        runs: who -> ``[seeds or 1, items, counts]``, the same items for all.
        score: sums of counts ``[..., counts]`` -> scores ``[...]``; None: the mean over items of their one count.
    """

    runs: Mapping[str, Array]
    score: Callable[[Array], Array] | None = None


def draw(
    tables: Sequence[Table], *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[list[dict[str, float]], list[dict[str, Array]]]:
    """The score of everybody in every table: on the items as they are, and on each of ``resamples`` draws of them.

    Every draw takes seeds with replacement, the same for all tables, and within each table items with replacement, the
    same for all seeds and runs (Efron; for corpus scores see Koehn 2004), and computes the score of what it took.

    Args:
        tables: with as many seeds in all of them; a run without chance has one and meets every seed of the others.
        resamples: number of draws.
        seed: of the draws; equal shapes get equal draws.

    Returns:
        For each table who -> score, and who -> ``[resamples]``; means over seeds.

    Raises:
        LoraweaveError: no items, or runs of unequal shape.
    """
    if not tables or any(not table.runs or not all(run.size for run in table.runs.values()) for table in tables):
        raise LoraweaveError("paired bootstrap: expected at least one item and one seed of every task")
    seeds = max(len(run) for table in tables for run in table.runs.values())
    for table in tables:
        shapes = {run.shape[1:] for run in table.runs.values()}
        if len(shapes) > 1 or any(len(run) not in (1, seeds) for run in table.runs.values()):
            raise LoraweaveError("paired bootstrap: expected the same items and seeds of all runs")
    generator = np.random.default_rng(seed)
    drawn_seeds = _counts(generator, resamples, seeds) / seeds
    values, drawn = [], []
    for table in tables:
        names, n = list(table.runs), next(iter(table.runs.values())).shape[1]
        everybody = np.concatenate([table.runs[name] for name in names])
        ends = np.cumsum([len(table.runs[name]) for name in names])
        flat = everybody.transpose(1, 0, 2).reshape(n, -1)

        def scores(items: Array, flat: Array = flat, table: Table = table, shape: Any = everybody.shape) -> Array:
            """``[draws, items]`` -> ``[draws, runs]``."""
            sums = (items @ flat).reshape(len(items), shape[0], shape[2])
            return sums[..., 0] / shape[1] if table.score is None else table.score(sums)

        whole = np.split(scores(np.ones((1, n)))[0], ends[:-1])
        values.append({name: float(found.mean()) for name, found in zip(names, whole, strict=True)})
        here = {name: np.zeros(resamples) for name in names}
        at_once = max(1, _AT_ONCE // max(n, flat.shape[1]))
        for first in range(0, resamples, at_once):
            some = slice(first, min(first + at_once, resamples))
            found = np.split(scores(_counts(generator, some.stop - some.start, n)), ends[:-1], axis=1)
            for name, of_seeds in zip(names, found, strict=True):
                here[name][some] = (
                    (of_seeds * drawn_seeds[some]).sum(1) if of_seeds.shape[1] == seeds else of_seeds[:, 0]
                )
        drawn.append(here)
    return values, drawn


def resampled(
    differences: Sequence[Array],
    weights: Sequence[float],
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> tuple[float, float, float]:
    """``sum_t weights[t] * mean(differences[t])`` and its percentile interval ``(value, low, high)``.

    Args:
        differences: for each task ``[seeds, items]``, one method minus the other; as many seeds in every task.
        weights: of the tasks.
        resamples: number of draws, see :func:`draw`.
        confidence: share of draws inside the bounds.
        seed: of the draws; equal shapes get equal draws.

    Raises:
        LoraweaveError: no items, or a parameter out of range.
    """
    if resamples < 1 or not 0 < confidence < 1:
        raise LoraweaveError(
            f"paired bootstrap: expected resamples >= 1 and 0 < confidence < 1, got {resamples} and {confidence:g}"
        )
    if any(task.ndim != 2 for task in differences):
        raise LoraweaveError("paired bootstrap: expected at least one item and one seed of every task")
    tables = [Table({"": task[..., None]}) for task in differences]
    values, drawn = draw(tables, resamples=resamples, seed=seed)
    value = sum(weight * task[""] for weight, task in zip(weights, values, strict=True))
    sums = sum((weight * task[""] for weight, task in zip(weights, drawn, strict=True)), np.zeros(resamples))
    return (value, *_bounds(sums, confidence))


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


class Resampled:
    """Every method's scores on one set of draws, from which all differences are read.

    Args:
        methods: method -> seed by seed, task -> the answers to its items. A method that ran once has one run.
        own: task -> the answers of its own expert, whose score each draw computes anew, or a number that stands for it.
            Retention divides by it; tasks that are not here do not count there.
        metrics: task -> name of its metric; default: the score is the mean over items.
        resamples: number of draws.
        seed: of the draws.
    """

    def __init__(
        self,
        methods: Mapping[str, Runs],
        own: Mapping[str, Answers | float],
        metrics: Mapping[str, str] | None = None,
        *,
        resamples: int = RESAMPLES,
        seed: int = 0,
    ) -> None:
        self.own = own
        self.tasks = list(next(iter(methods.values()))[0])
        tables = {}
        for task in self.tasks:
            runs = {name: np.stack([_rows(run[task]) for run in of_method]) for name, of_method in methods.items()}
            if task in own and not isinstance(yardstick := own[task], float | int):
                runs[_OWN] = _rows(yardstick)[None]
            metric = (metrics or {}).get(task)
            tables[task] = Table(runs, None if metric is None else get_metric(metric).of_counts)
        values, drawn = draw(list(tables.values()), resamples=resamples, seed=seed)
        self._values, self._drawn = dict(zip(tables, values, strict=True)), dict(zip(tables, drawn, strict=True))
        self._runs = {task: table.runs for task, table in tables.items()}

    def difference(self, method: str, rival: str) -> dict[str, Any]:
        """How far ``method`` is ahead of ``rival``.

        ``difference``, ``low`` and ``high`` in retention (95 %); ``items``, on how many the two differ; ``clear``,
        whether the interval decides; ``tasks``: the first three for every task, in points.
        """
        of_tasks = {}
        for task in self.tasks:
            low, high = _bounds(self._drawn[task][method] - self._drawn[task][rival])
            value = self._values[task][method] - self._values[task][rival]
            of_tasks[task] = {"difference": value, "low": low, "high": high}
        drawn = np.mean([self._kept(task, method, rival) for task in self.own], axis=0)
        told = drawn[np.isfinite(drawn)]
        if not len(told):
            raise LoraweaveError("paired bootstrap: no draw gives every own expert a point; take more test items")
        low, high = _bounds(told)
        value = float(np.mean([of_tasks[task]["difference"] / self._yardstick(task) for task in self.own]))
        items = sum(_differing(self._runs[task][method], self._runs[task][rival]) for task in self.own)
        sure = items >= DECISIVE and len(told) >= (1 - _LOST) * len(drawn)
        return {
            "rival": rival,
            "difference": value,
            "low": low,
            "high": high,
            "items": items,
            "clear": sure and (low > 0 or high < 0),
            "tasks": of_tasks,
        }

    def against_best(self, retention: Mapping[str, float]) -> dict[str, dict[str, Any]]:
        """Method -> its difference to the best of the others by ``retention`` (the first of equals)."""
        if len(retention) < 2:
            return {}
        return {
            method: self.difference(method, max((m for m in retention if m != method), key=lambda m: retention[m]))
            for method in retention
        }

    def _yardstick(self, task: str) -> float:
        own = self.own[task]
        return float(own) if isinstance(own, float | int) else self._values[task][_OWN]

    def _kept(self, task: str, method: str, rival: str) -> Array:
        """Differences in retention, not a number where the own expert of a draw has no point."""
        own = self.own[task]
        yardstick = float(own) if isinstance(own, float | int) else self._drawn[task][_OWN]
        with np.errstate(divide="ignore", invalid="ignore"):
            kept = (self._drawn[task][method] - self._drawn[task][rival]) / yardstick
        return np.where(np.asarray(yardstick) > 0, kept, np.nan)


def against_best_rival(
    methods: Mapping[str, Runs],
    own: Mapping[str, Answers | float],
    retention: Mapping[str, float],
    metrics: Mapping[str, str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Method -> its difference in retention to the best of the others: see :meth:`Resampled.difference`.

    Args:
        methods: see :class:`Resampled`.
        own: see :class:`Resampled`.
        retention: method -> its mean retention; may have others, which do not count.
        metrics: see :class:`Resampled`.
    """
    return Resampled(methods, own, metrics).against_best({method: retention[method] for method in methods})


# No label is so.
_OWN = "\0own"


def _rows(answers: Answers) -> Array:
    """``[items, counts]``."""
    rows = np.asarray(answers, dtype=np.float64)
    return rows[:, None] if rows.ndim == 1 else rows


def _differing(a: Array, b: Array) -> int:
    """On how many items two methods differ, in the mean over seeds."""
    return int((~np.isclose(a.mean(0), b.mean(0))).any(-1).sum())


def _bounds(draws: Array, confidence: float = CONFIDENCE) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _counts(generator: np.random.Generator, draws: int, n: int) -> Array:
    """``[draws, n]``: how often each of ``n`` is among ``n`` taken with replacement."""
    taken = generator.integers(n, size=(draws, n)) + n * np.arange(draws)[:, None]
    return np.bincount(taken.ravel(), minlength=draws * n).reshape(draws, n).astype(np.float64)
