"""What the tables share: the data files, a comparison without needless rows, and the results as JSON and Markdown.

A comparison is that of ``loraweave compare``: its recipe, its cells (so every table goes on where it was cut off), its
scores and intervals. Single experts are scored on their own tasks alone, or not at all.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from loraweave.cli.answering import Outcome, together
from loraweave.cli.contest import Contest, Job
from loraweave.cli.processes import Process
from loraweave.evaluation.bootstrap import Answers, Resampled
from loraweave.evaluation.cells import CELLS, Cell, Cells, Cost
from loraweave.evaluation.comparison import SINGLE, Run, costs, retention, summarise
from loraweave.files import write_json_atomic, write_text_atomic
from loraweave.policies import Sum
from loraweave.recipe import check_recipe
from loraweave.recipe.reading import override
from loraweave.reporting.tables import SUMMARY, summary_rows, to_markdown
from loraweave.zoo.tasks import Task

Split = Literal["test", "validation"]
RESULTS = Path(__file__).parent / "results"
OWN = "own expert"
RIVALS = {"nla": 2.0, "lorahub": 2.0, "pem": 3.0}
"""What MoLE is to lead, and by how many points."""

STRENGTHS = [0.1, 0.2, 0.4, 1.0]
GENERATION = {"max_new_tokens": 64, "batch_size": 64}
LORAHUB_PER_TASK = {"name": "lorahub", "examples": 5, "per_task": True}
"""As published: a search for each task, on five of its examples; it is told which task it will be asked."""
PAPER = {"name": "mole", "evidence": "outputs", "normalization": "l2", "gate_form": "full", "balance": 0.5}


def merged(method: str, **options: Any) -> dict[str, Any]:
    """A merge as a contestant; its strength is found on the training examples."""
    return {"name": "merged", "transform": {"name": method, **options}, "strengths": STRENGTHS}


# ---------------------------------------------------------------- data

TRAINED_ON, ASKED, LENT = 1_000, 400, 500


def generated(task: Task, folder: Path, split: Split) -> dict[str, str]:
    """Files with a generated task's rows, as a recipe's task has them; small tasks give what they have."""
    found = {"metric": task.metric}
    for part, n in (("train", TRAINED_ON), (split, ASKED)):
        path = folder / f"{task.family}_{task.variant}.{part}.jsonl"
        if not path.exists():
            _leave(path, [f"{json.dumps(row)}\n" for row in _draw(task, n, part)])
        found["train" if part == "train" else "test"] = str(path)
    return found


def _draw(task: Task, n: int, split: Any) -> list[dict[str, str]]:
    while True:
        try:
            return task.sample(n, 1234, split)
        except ValueError:
            n //= 2


def real(folder: Path, scratch: Path, split: Split, metric: str = "bleu") -> dict[str, str]:
    """The files of a real set. Where its training rows are packed, the first of them go to ``scratch``; where it has
    none, its first validation rows are lent to learn from.
    """
    train, packed = folder / "train.jsonl", folder / "train.jsonl.gz"
    asked, name = folder / f"{split}.jsonl", "_".join(folder.parts[-2:])
    if packed.exists():
        lines = gzip.decompress(packed.read_bytes()).decode().splitlines(keepends=True)
        train = _leave(scratch / f"{name}.train.jsonl", lines[:TRAINED_ON])
    elif not train.exists():
        lines = (folder / "validation.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        train = _leave(scratch / f"{name}.train.jsonl", lines[:LENT])
        if split == "validation":
            asked = _leave(scratch / f"{name}.validation.jsonl", lines[LENT:])
    return {"train": str(train), "test": str(asked), "metric": metric}


def _leave(path: Path, lines: Sequence[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, "".join(lines))
    return path


# ---------------------------------------------------------------- comparisons


@dataclass(frozen=True)
class Measured:
    """Every cell of one comparison.

    Attributes:
        cells: each method with each seed.
        own: task -> what its own expert scores, or 100 where a task is nobody's.
        answers: task -> what its own expert answered, item by item, or 100.
        metrics: task -> metric.
        items: task -> how many were asked.
    """

    cells: Sequence[Cell]
    own: Mapping[str, float]
    answers: Mapping[str, Answers | float]
    metrics: Mapping[str, str]
    items: Mapping[str, int]


class _Lean(Contest):
    """A comparison that asks each expert its own task only; a task that is nobody's counts in points of 100."""

    def _list_jobs(self) -> Iterator[Job]:
        base, *jobs = super()._list_jobs()
        yield base
        if owners := self._owners():
            alone = {SINGLE + expert for expert in owners.values()}
            experts = {name: value for job in jobs if job.method in alone for name, value in job.key["experts"].items()}
            yield Job(OWN, None, {**base.key, "experts": experts, "owners": owners}, self._owned)
        yield from (job for job in jobs if not job.method.startswith(SINGLE))

    def own(self) -> dict[str, float]:
        return dict.fromkeys(self.tests, 100.0) | {task: cell.scores[task] for task, cell in self.yardsticks().items()}

    def yardsticks(self) -> dict[str, Cell]:
        cells = [cell for job in self.jobs if job.method == OWN and (cell := self._found(job)) is not None]
        return {task: cell for cell in cells for task in cell.scores}

    def _owners(self) -> dict[str, str]:
        return {task: expert for task, expert in self.recipe.own_tasks().items() if task in self.tests}

    def _owned(self) -> Outcome:
        self.mixture.policy = Sum()
        found = []
        for task, expert in self._owners().items():
            with self.mixture.only(expert):
                found.append(self._score(f"{expert} alone", {task: self.tests[task]}))
        made = together(found)
        retention(made.scores, made.scores)  # an own score of 0 is an error; better now than after all training
        return made


def changed(recipe: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The recipe with fields set as on the command line."""
    content = deepcopy(dict(recipe))
    for assignment in overrides:
        override(content, assignment)
    return content


def measure(recipe: Mapping[str, Any], out: Path) -> Measured:
    """Make what is missing of a comparison in ``out/cells``."""
    contest = _Lean(check_recipe(recipe, out.name, Path.cwd()), Cells(out / CELLS), Process())
    cells = contest.work()
    assert cells is not None
    metrics = {name: test.metric for name, test in contest.tests.items()}
    yardsticks = {task: cell.answers()[task] for task, cell in contest.yardsticks().items()}
    answers = {**dict.fromkeys(metrics, 100.0), **yardsticks}
    return Measured(cells, contest.own(), answers, metrics, {n: len(t.examples) for n, t in contest.tests.items()})


def joined(parts: Sequence[Measured]) -> Measured:
    """Comparisons of the same methods and seeds on different tasks as if they were one."""
    cells: dict[tuple[str, int | None], Cell] = {}
    for part in parts:
        for cell in part.cells:
            known = cells.get(at := (cell.method, cell.seed))
            cells[at] = cell if known is None else _both(known, cell)

    def merge(field: str) -> dict[str, Any]:
        return {task: value for part in parts for task, value in getattr(part, field).items()}

    return Measured(list(cells.values()), merge("own"), merge("answers"), merge("metrics"), merge("items"))


def _both(a: Cell, b: Cell) -> Cell:
    cost = Cost(
        a.cost.train_seconds + b.cost.train_seconds,
        a.cost.evaluations + b.cost.evaluations,
        a.cost.examples_seen + b.cost.examples_seen,
        a.cost.score_seconds + b.cost.score_seconds,
        max(filter(None, (a.cost.peak_memory_gb, b.cost.peak_memory_gb)), default=None),
    )
    both = {name: {**getattr(a, name), **getattr(b, name)} for name in ("scores", "items", "counts")}
    return replace(a, cost=cost, history=(), **both)


# ---------------------------------------------------------------- results


def results(found: Measured, ours: Sequence[str] = ("mole",)) -> dict[str, Any]:
    """As ``results.json`` of ``loraweave compare``, with ``leads``: by how much ``ours`` are ahead of ``RIVALS``."""
    competing = [cell for cell in found.cells if cell.method != OWN]
    runs = [Run(cell.method, cell.scores, cell.seed, cell.seconds) for cell in competing]
    per_task = list(dict.fromkeys(cell.method for cell in competing if cell.key.get("per_task")))
    extra = {"metrics": dict(found.metrics), "items": dict(found.items), "costs": costs(competing)}
    extra["per_task"] = per_task
    made = summarise(runs, found.own, extra=extra)
    answers: dict[str, list[Any]] = {}
    for cell in competing:
        answers.setdefault(cell.method, []).append(cell.answers())
    kept = {method: spread["mean"] for method, spread in made["retention"].items()}
    drawn = Resampled(answers, found.answers, found.metrics)
    leads = {
        method: {
            rival: {key: one[key] for key in ("difference", "low", "high")}
            for rival in RIVALS
            if rival in answers
            for one in [drawn.difference(method, rival)]
        }
        for method in ours
        if method in answers
    }
    return made | {"differences": drawn.against_best(kept), "leads": leads}


def markdown(made: Mapping[str, Any], title: str) -> str:
    """The tables of :func:`results`: methods with their costs, leads, ``ceilings`` if any, the scores on every task."""
    header = ["method", *SUMMARY]
    lines = [f"## {title}\n", _table(header, summary_rows(made))]
    rows = [
        [method, rival, f"{100 * lead['difference']:+.1f}", f"{100 * lead['low']:+.1f} to {100 * lead['high']:+.1f}"]
        for method, of_rivals in made["leads"].items()
        for rival, lead in of_rivals.items()
    ]
    lines.append(_table(["method", "leads", "by points", "95 % interval"], rows))
    if ceilings := made.get("ceilings"):
        lines.append(
            "A LoRA of all rows of the target: " + ", ".join(f"{k} {v:.1f}" for k, v in ceilings.items()) + "\n"
        )
    return "\n".join([*lines, to_markdown(made, deviations=False)])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def settings(recipe: Mapping[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Everything that was set, for whoever repeats it; of the data, its limits."""
    limits = {name: value for name, value in recipe["data"].items() if name != "tasks"}
    kept = {name: recipe[name] for name in ("compare", "train", "generation")}
    return {**kept, "data": limits, "split": options.split, "threads": options.threads}


def leave(parts: Mapping[str, Mapping[str, Any]], setting: Mapping[str, Any], out: Path, commit: str | None) -> None:
    """Write the results of a table to ``out`` and, with a name, to ``results/NAME.json`` and ``.md``.

    Args:
        parts: title -> :func:`results`.
        setting: :func:`settings`.
        out: a folder.
        commit: the name under ``results/``.
    """
    text = "\n".join(markdown(made, title) for title, made in parts.items())
    places = [out / "results"] + ([RESULTS / commit] if commit else [])
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(place.with_suffix(".json"), {"settings": setting, "tables": parts})
        write_text_atomic(place.with_suffix(".md"), text)
    print(text)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every table has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", type=Path, required=True, help="folder of the real data sets, see README.md")
    made.add_argument("-o", "--out", type=Path, required=True)
    made.add_argument("--split", choices=("test", "validation"), default="test", help="'validation' for trials")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--commit", metavar="NAME", help="also keep the figures under results/")
    made.add_argument("overrides", nargs="*", metavar="FIELD=VALUE", help="fields of the recipe, e.g. train.steps=50")
    return made


def chosen(known: Sequence[str]) -> Callable[[str], list[str]]:
    """For argparse: some of the known names, with commas between."""

    def read(text: str) -> list[str]:
        names = text.split(",")
        if wrong := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{wrong[0]!r} is none of: {', '.join(known)}")
        return names

    return read


def numbers(text: str) -> list[int]:
    """For argparse: whole numbers, with commas between."""
    return [int(number) for number in text.split(",")]


def begin(options: argparse.Namespace) -> None:
    """What holds for the whole run."""
    torch.set_num_threads(options.threads)
