"""A comparison: what there is already, the work, and what it leaves behind."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from loraweave import persistence
from loraweave.cli.contest import Contest
from loraweave.cli.processes import Process
from loraweave.cli.weighing import gate_weights
from loraweave.errors import LoraweaveError
from loraweave.evaluation.bootstrap import against_best_rival
from loraweave.evaluation.cells import CELLS, Cell, Cells
from loraweave.evaluation.comparison import SINGLE, Run, costs, largest_weights, summarise
from loraweave.files import check_replaceable, write_json_atomic
from loraweave.recipe import Recipe
from loraweave.reporting.plots import heat_maps
from loraweave.reporting.published import published_table
from loraweave.reporting.tables import results_table, summary_table

RESULTS, PICTURE, WEIGHTS, MIXTURE, REPORT = "results.json", "weights.png", "weights.json", "mixture", "report.html"
OURS = (RESULTS, PICTURE, WEIGHTS, MIXTURE, REPORT, CELLS)


def compare(
    recipe: Recipe, out: str | Path, *, fresh: bool = False, process: Process | None = None
) -> dict[str, Any] | None:
    """Compare as ``recipe`` says, write all of it to ``out`` and print the tables.

    ``out/cells`` gets a JSON file for each method and seed as soon as it is done; those that are there from the same
    recipe are not made again, and several processes may share the work. At the end the main process writes
    ``results.json`` (see :func:`loraweave.evaluation.comparison.summarise`; and ``differences``, see
    :func:`~loraweave.evaluation.bootstrap.against_best_rival`, ``costs`` and ``largest_weight``, see there, and
    ``per_task``, the methods that learned anew for each task), ``weights.json`` (what every other method's gates give
    to each expert, on each task, after the first seed), and of the first of those that trains gates ``weights.png``
    (the same, drawn) and the ``mixture``.

    Args:
        recipe: what to compare.
        out: a folder, new or from an earlier comparison.
        fresh: forget what an earlier comparison left in ``out``.
        process: which of several processes this is.

    Returns:
        What ``results.json`` holds; None in other processes than the main one.

    Raises:
        LoraweaveError: the recipe names no data, something cannot be read, or ``out`` holds files of others.
    """
    process, place = process or Process(), Path(out)
    check_replaceable(place, ours=OURS)
    if fresh and process.count > 1:
        raise LoraweaveError(
            f"--fresh with several processes: one would remove what another makes; empty {place} first"
        )
    if fresh:
        (place / WEIGHTS).unlink(missing_ok=True)
        if (place / CELLS).exists():
            shutil.rmtree(place / CELLS)
    started = time.perf_counter()
    contest = Contest(recipe, Cells(place / CELLS), process)
    if process.main:
        _tell(contest)
    cells = contest.work()
    if cells is None:
        return None
    results = _results(contest, cells, time.perf_counter() - started)
    with contest.cells.finishing():
        _leave(contest, results, place)
    console = Console()
    console.print()
    console.print(results_table(results))
    console.print(summary_table(results))
    if (beside := published_table(results)) is not None:
        console.print(beside)
    said = (
        f"{place / RESULTS}: every number; {place / CELLS}: every method and seed, item by item",
        f"{place / PICTURE}: what {contest.kept} gives to each expert, at each site",
        f"{place / MIXTURE}: that mixture; try: loraweave generate {place / MIXTURE} --input TEXT",
        f"all of it on one page: loraweave report {place}",
    )
    console.print("\n".join(said), highlight=False, soft_wrap=True)
    return results


def _tell(contest: Contest) -> None:
    """Say what is there already, and what is there but of another recipe."""
    found = [job for job in contest.jobs if contest.cells.find(job.method, job.seed, job.key) is not None]
    missing = [job for job in contest.jobs if job not in found]
    if found:
        print(f"{len(found)} of {len(contest.jobs)} cells are there already (--fresh makes all anew)", file=sys.stderr)
    others = [differing for job in missing if (differing := contest.cells.differing(job.method, job.seed, job.key))]
    if others:
        fields = sorted({name for differing in others for name in differing})
        shown = ", ".join(fields[:4]) + (", ..." if len(fields) > 4 else "")
        print(f"{len(others)} cells of an earlier recipe are not used: they differ in {shown}", file=sys.stderr)


def _results(contest: Contest, cells: Sequence[Cell], seconds: float) -> dict[str, Any]:
    runs = [Run(cell.method, cell.scores, cell.seed, cell.seconds) for cell in cells]
    # Cells that were made earlier or elsewhere took their time too.
    spent = max(seconds, sum(run.seconds for run in runs))
    own, metrics = contest.own(), {name: test.metric for name, test in contest.tests.items()}
    extra = {
        "metrics": metrics,
        "items": {name: len(test.examples) for name, test in contest.tests.items()},
        "recipe": contest.recipe.to_dict(),
        "kept": contest.kept,
        "per_task": [label for label, contender in contest.contenders.items() if contender.per_task],
        "costs": costs(cells),
        "largest_weight": largest_weights(cells),
        "cells": [contest.cells.path(cell.method, cell.seed, cell.key).name for cell in cells],
    }
    results = summarise(runs, own, seconds=spent, extra=extra)
    answers: dict[str, list[Any]] = {}
    for cell in cells:
        if not cell.method.startswith(SINGLE):
            answers.setdefault(cell.method, []).append(cell.answers())
    kept = {method: spread["mean"] for method, spread in results["retention"].items()}
    yardsticks = {task: cell.answers()[task] for task, cell in contest.yardsticks().items()}
    return results | {"differences": against_best_rival(answers, yardsticks, kept, metrics)}


def _leave(contest: Contest, results: dict[str, Any], place: Path) -> None:
    """Everything but the cells; ``results.json`` last, so that where it is all the rest is too."""
    weights = gate_weights(contest, place / WEIGHTS)
    write_json_atomic(place / WEIGHTS, weights)
    mixture, panels = contest.mixture, weights["methods"][contest.kept]["panels"]
    heat_maps(panels, mixture.experts, place / PICTURE, f"weights of {contest.kept} on each task")
    persistence.save(mixture, place / MIXTURE, results=results, recipe=results["recipe"])
    write_json_atomic(place / RESULTS, results)
