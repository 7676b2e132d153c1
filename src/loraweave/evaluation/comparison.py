"""The numbers behind a comparison of methods: retention, means and spreads over seeds, and intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loraweave.errors import LoraweaveError
from loraweave.evaluation.cells import Cell, Cost
from loraweave.evaluation.environment import environment, peak_gpu_memory_gb, peak_memory_gb

SINGLE = "only:"


@dataclass(frozen=True)
class Run:
    """One method, run with one seed, scored on every task.

    Attributes:
        method: its name in tables: ``"base"``, ``"sum"``, ``"mole"``, or :func:`single` for an expert by itself.
        scores: task -> score, 0 to 100.
        seed: what the run's chance hung on; None for a method without any, which is run once.
        seconds: wall-clock time of training (if any) and scoring.
    """

    method: str
    scores: Mapping[str, float]
    seed: int | None = None
    seconds: float = 0.0


def single(expert: str) -> str:
    """How the method "this expert by itself on every task" is called; tables show such rows apart."""
    return f"{SINGLE}{expert}"


def retention(scores: Mapping[str, float], own: Mapping[str, float]) -> float:
    """How much of each expert's skill is kept: ``mean over tasks of scores[task] / own[task]``. 1 is all of it.

    Args:
        scores: task -> a method's score; may have further tasks, which do not count.
        own: task -> the score of that task's own expert by itself. Its tasks are those that count.

    Raises:
        LoraweaveError: no tasks, a task without a score, or an own score that is not a positive number.
    """
    if not own:
        raise LoraweaveError("retention: no task has an expert's own score to compare with")
    for task, reference in own.items():
        if not (math.isfinite(reference) and reference > 0):
            raise LoraweaveError(
                f"retention: the own expert of {task!r} scores {reference:g}, so nothing can be compared with it; "
                "expected a score above 0: leave that task out or take a better expert"
            )
    _check_tasks("retention", scores, own)
    return statistics.fmean(scores[task] / reference for task, reference in own.items())


def summarise(
    runs: Sequence[Run],
    own: Mapping[str, float],
    *,
    seconds: float | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of ``results.json``.

    Keys: ``retention`` (method -> spread), ``scores`` (method -> task -> spread), ``own`` (task -> its own expert's
    score), ``seeds``, ``seconds`` (all in all), ``seconds_per_run`` (method -> spread), ``peak_memory_gb``,
    ``peak_gpu_memory_gb`` (None without a GPU), ``versions``, ``machine``. A spread is ``mean``, ``std`` (the sample
    standard deviation over seeds, divisor n - 1) and ``per_seed`` (the values in the order of ``seeds``). A method that
    ran once, because nothing in it hangs on a seed, has one value and ``std`` 0.0. Methods and tasks keep the order in
    which they came. All scores are percentages; retention is a ratio, 1.0 means that everything was kept.

    Args:
        runs: every method with every seed; methods without chance once, with ``seed=None``.
        own: task -> score of its own expert by itself, the yardstick of retention.
        seconds: wall-clock time of the whole comparison; default: the sum over the runs.
        extra: further keys, e.g. ``{"metrics": {...}}``.

    Raises:
        LoraweaveError: no runs, a run missing or twice, methods with unequal seeds or tasks, or as :func:`retention`.
    """
    if not runs:
        raise LoraweaveError("nothing to summarise: expected at least one run")
    methods = _by_method(runs)
    seeds = sorted({run.seed for run in runs if run.seed is not None})
    tasks = list(runs[0].scores)
    for name, of_method in methods.items():
        _check_seeds(name, [run.seed for run in of_method], seeds)
        for run in of_method:
            _check_tasks(f"method {name!r}", run.scores, tasks)
            _check_tasks("the first run", runs[0].scores, run.scores)
    results = {
        "retention": {m: spread(retention(run.scores, own) for run in rs) for m, rs in methods.items()},
        "scores": {m: {task: spread(run.scores[task] for run in rs) for task in tasks} for m, rs in methods.items()},
        "own": dict(own),
        "seeds": seeds,
        "seconds": sum(run.seconds for run in runs) if seconds is None else seconds,
        "seconds_per_run": {m: spread(run.seconds for run in rs) for m, rs in methods.items()},
        "peak_memory_gb": peak_memory_gb(),
        "peak_gpu_memory_gb": peak_gpu_memory_gb(),
        **environment(),
    }
    clash = sorted(results.keys() & (extra or {}).keys())
    if clash:
        raise LoraweaveError(f"extra results must not be called {clash[0]!r}: the summary has that key")
    return {**results, **(extra or {})}


def spread(values: Iterable[float]) -> dict[str, Any]:
    """``{"mean", "std", "per_seed"}`` of at least one value; ``std`` has the divisor n - 1 and is 0.0 for one value."""
    listed = [float(value) for value in values]
    deviation = statistics.stdev(listed) if len(listed) > 1 else 0.0
    return {"mean": statistics.fmean(listed), "std": deviation, "per_seed": listed}


def largest_weights(cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    """Method -> the share of all weight that the expert with most of it has, in percent, as a spread over seeds.

    Weights are means over gate sites, inputs and tasks, as in Fig. 5b of the MoLE paper; of negative ones the absolute
    value counts. Methods without learned weights are left out.
    """
    shares: dict[str, list[float]] = {}
    for cell in cells:
        if cell.weights:
            experts = list(next(iter(cell.weights.values())))
            means = [abs(statistics.fmean(of[expert] for of in cell.weights.values())) for expert in experts]
            # A search may end with no weight at all.
            shares.setdefault(cell.method, []).append(100 * max(means) / sum(means) if any(means) else 0.0)
    return {method: spread(found) for method, found in shares.items()}


def costs(cells: Sequence[Cell]) -> dict[str, dict[str, float | None]]:
    """Method -> what it takes: ``train_seconds``, ``evaluations`` (optimizer steps, or weightings that a search tried),
    ``examples_seen`` and ``seconds_per_item`` (answering one test item), means over seeds; ``peak_memory_gb`` and
    ``peak_gpu_memory_gb`` (of the process, the model included), the largest, None where unknown.
    """
    by_method: dict[str, list[Cell]] = {}
    for cell in cells:
        by_method.setdefault(cell.method, []).append(cell)
    return {method: _cost([cell.cost for cell in found], _items(found[0])) for method, found in by_method.items()}


def _items(cell: Cell) -> int:
    return sum(map(len, cell.items.values()))


def _cost(found: Sequence[Cost], items: int) -> dict[str, float | None]:
    return {
        "train_seconds": statistics.fmean(cost.train_seconds for cost in found),
        "evaluations": statistics.fmean(cost.evaluations for cost in found),
        "examples_seen": statistics.fmean(cost.examples_seen for cost in found),
        "seconds_per_item": statistics.fmean(cost.score_seconds for cost in found) / items,
        "peak_memory_gb": max((cost.peak_memory_gb for cost in found if cost.peak_memory_gb is not None), default=None),
        "peak_gpu_memory_gb": max(
            (cost.peak_gpu_memory_gb for cost in found if cost.peak_gpu_memory_gb is not None), default=None
        ),
    }


def _by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Method -> its runs, by seed."""
    methods: dict[str, list[Run]] = {}
    for run in runs:
        methods.setdefault(run.method, []).append(run)
    return {name: sorted(rs, key=lambda run: -1 if run.seed is None else run.seed) for name, rs in methods.items()}


def _check_seeds(method: str, came: Sequence[int | None], seeds: Sequence[int]) -> None:
    if list(came) not in ([None], list(seeds)):
        raise LoraweaveError(
            f"method {method!r} has runs with the seeds {list(came)}; expected each of {list(seeds)} once, "
            "or a single run with the seed None"
        )


def _check_tasks(what: str, scores: Mapping[str, float], tasks: Iterable[str]) -> None:
    missing = [task for task in tasks if task not in scores]
    if missing:
        raise LoraweaveError(f"{what}: no score for the task {missing[0]!r} (has: {', '.join(scores) or 'none'})")
