"""What every method with gates, the same for all tasks, gives to each expert, on each task of a comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from loraweave.cli.building import average_weights
from loraweave.cli.contest import Contest, Job
from loraweave.evaluation.yardsticks import YARDSTICKS
from loraweave.mixture import Mixture
from loraweave.recipe import Contender

_INPUTS = 32
"""Inputs per task: a mean over more looks the same."""


def gate_weights(contest: Contest, earlier: Path) -> dict[str, Any]:
    """The content of ``weights.json``; afterwards the kept method is on the mixture, as after its first seed.

    ``method`` is the kept one, ``experts`` are their names in order, and ``methods`` holds, for each method with gates
    and for the kept one, ``cell`` (whose gates these are) and ``panels``: task -> site -> the mean weight of each
    expert while a few test inputs of that task are answered.

    Args:
        contest: with all its cells.
        earlier: the file of an earlier run; what it has of the same cells is not measured again.
    """
    inputs = {name: [e.input for e in test.examples[:_INPUTS]] for name, test in contest.tests.items()}
    known, found = _known(earlier), {}
    jobs = {job.method: job for job in reversed(contest.jobs)}  # of each method the first seed's
    labels = list(dict.fromkeys([*contest.contenders, contest.kept]))
    # The kept one comes last, to be on the mixture in the end.
    for label in sorted(labels, key=lambda label: label == contest.kept):
        kept, job = label == contest.kept, jobs.get(label)
        mixture = contest.restore() if kept else _gated(contest, contest.contenders[label], job)
        if mixture is None:
            continue
        cell = None if job is None else contest.cells.path(job.method, job.seed, job.key).name
        panels = known.get(label, {}).get("panels") if cell and known.get(label, {}).get("cell") == cell else None
        if panels is None:
            panels = average_weights(mixture, contest.tokenizer, inputs, progress=False, **contest.settings)
        found[label] = {"cell": cell, "panels": panels}
    ordered = {label: found[label] for label in labels if label in found}
    return {"method": contest.kept, "experts": list(contest.mixture.experts), "methods": ordered}


@torch.no_grad()
def _gated(contest: Contest, contender: Contender, job: Job | None) -> Mixture | None:
    """The mixture with the gates of that cell; None if the method has none, or others for each task."""
    if job is None or contender.per_task or contender.method.name in YARDSTICKS:
        return None
    mixture = contest.mixture
    mixture.policy = contender.method.policy()
    if not mixture.gates:
        return None
    learned = contest.cells.gates(job.method, job.seed, job.key)
    for name, parameter in mixture.gate_parameters():
        parameter.copy_(learned[name])
    return mixture


def _known(path: Path) -> dict[str, Any]:
    """What an earlier run measured; nothing where it left no such file, which is written anew then."""
    try:
        methods = json.loads(path.read_text(encoding="utf-8"))["methods"]
        return {label: of for label, of in methods.items() if isinstance(of, dict)}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}
