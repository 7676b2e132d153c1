"""Interleaved timing: every task once per round, in a shuffled order, so that the machine's drift hits all alike."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Task:
    """Something to time.

    Attributes:
        run: the timed part; takes what ``prepare`` made.
        prepare: makes what one run uses up; untimed.
        rounds: take part in only the first few rounds; ``None`` for all.
    """

    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None
    rounds: int | None = None


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a sample."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, sample: Sequence[float]) -> Spread:
        if len(sample) == 1:
            return cls(sample[0], sample[0], sample[0])
        low, median, high = statistics.quantiles(sample, n=4, method="inclusive")
        return cls(median, low, high)


def interleave(
    tasks: Mapping[str, Task],
    *,
    rounds: int,
    calls: int = 1,
    seed: int = 0,
    warm: bool = True,
    progress: Callable[[str], None] = lambda _: None,
    wait: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Time every task once per round, after one untimed warm-up each.

    Args:
        tasks: name -> task.
        rounds: how many rounds.
        calls: runs of a task per round; their mean is the round's figure.
        seed: of the order within each round.
        warm: ``False`` where every task was run before.
        progress: told what runs next.
        wait: until all that a run has asked of a device is done.

    Returns:
        Task name -> seconds per run, one figure a round; the figures of two tasks at the same place are of one round.
    """
    for name, task in tasks.items() if warm else ():
        progress(f"{name}, warm-up")
        task.run(task.prepare())
    order = random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(rounds):
        names = [name for name, task in tasks.items() if task.rounds is None or number < task.rounds]
        order.shuffle(names)
        progress(f"round {number + 1} of {rounds}")
        for name in names:
            seconds[name].append(_time(tasks[name], calls, wait))
    return seconds


def _time(task: Task, calls: int, wait: Callable[[], None]) -> float:
    total = 0.0
    for _ in range(calls):
        prepared = task.prepare()
        gc.collect()
        gc.disable()
        try:
            wait()
            start = time.perf_counter()
            task.run(prepared)
            wait()
            total += time.perf_counter() - start
        finally:
            gc.enable()
    return total / calls


def ratios(seconds: Sequence[float], baseline: Sequence[float]) -> Spread:
    """``seconds / baseline``, taken round by round, so that a slow spell cancels out."""
    return Spread.of([mine / theirs for mine, theirs in zip(seconds, baseline, strict=False)])
