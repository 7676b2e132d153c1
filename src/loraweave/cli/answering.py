"""What a model answers to the tests of a comparison, and how good that is; answers to several tasks put together."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from loraweave.cli.building import TestSet
from loraweave.evaluation.cells import Cost
from loraweave.evaluation.metrics import get_metric
from loraweave.evaluation.scoring import predict
from loraweave.training.learn import Learned


@dataclass(frozen=True)
class Outcome:
    """What came out: what :class:`~loraweave.evaluation.cells.Cell` says, and what was learned."""

    scores: Mapping[str, float]
    items: Mapping[str, Sequence[float]]
    counts: Mapping[str, Sequence[Sequence[float]]]
    cost: Cost
    history: Sequence[Mapping[str, float]] = ()
    gates: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def answered(
    model: Any,
    tokenizer: Any,
    tests: Mapping[str, TestSet],
    settings: Mapping[str, Any],
    *,
    name: str,
    progress: bool = False,
    learned: Learned | None = None,
    seconds: float = 0.0,
) -> Outcome:
    """The scores on all tasks, whose inputs are answered together: that fills batches better.

    Args:
        model: who answers.
        tokenizer: the model's.
        tests: task -> its test data.
        settings: of generation.
        name: for the progress bar.
        progress: whether there is one.
        learned: what was learned before, if anything.
        seconds: how long it took to make the model ready.
    """
    started = time.perf_counter()
    texts = [example.input for test in tests.values() for example in test.examples]
    found = predict(model, tokenizer, texts, description=f"{name:<24}", progress=progress, **settings)
    scoring = time.perf_counter() - started
    answers = iter(found)
    scores: dict[str, float] = {}
    items: dict[str, list[float]] = {}
    counts: dict[str, list[list[float]]] = {}
    for task, test in tests.items():
        metric = get_metric(test.metric)
        given, right = [next(answers) for _ in test.examples], [e.references for e in test.examples]
        items[task], scores[task] = metric.per_item(given, right), metric(given, right)
        if (counted := metric.item_counts(given, right)) is not None:
            counts[task] = counted
    if learned is None:
        return Outcome(scores, items, counts, Cost(train_seconds=seconds, score_seconds=scoring))
    cost = Cost(seconds, learned.evaluations, learned.examples_seen, scoring)
    return Outcome(scores, items, counts, cost, learned.history)


def together(parts: Sequence[Outcome]) -> Outcome:
    """Outcomes on different tasks as one: costs add up, and one training follows the other."""
    history: list[Mapping[str, float]] = []
    for part in parts:
        done = max((record.get("step", 0.0) for record in history), default=0.0)
        history += [
            {**record, "step": record["step"] + done} if "step" in record else record for record in part.history
        ]

    def merged(name: str) -> dict[str, Any]:
        return {task: value for part in parts for task, value in getattr(part, name).items()}

    cost = Cost(
        sum(part.cost.train_seconds for part in parts),
        sum(part.cost.evaluations for part in parts),
        sum(part.cost.examples_seen for part in parts),
        sum(part.cost.score_seconds for part in parts),
    )
    return replace(
        parts[0],
        scores=merged("scores"),
        items=merged("items"),
        counts=merged("counts"),
        weights=merged("weights"),
        cost=cost,
        history=history,
        gates=parts[0].gates if len(parts) == 1 else {},
    )
