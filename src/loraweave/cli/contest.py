"""The work of a comparison, cell by cell: the bare base, every expert alone, every method with every seed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import loraweave as lw
from loraweave.cli import building
from loraweave.cli.processes import Process
from loraweave.errors import LoraweaveError
from loraweave.evaluation.cells import FORMAT, Cell, Cells, Cost, hash_base, hash_examples, hash_expert
from loraweave.evaluation.comparison import retention, single
from loraweave.evaluation.data import Example
from loraweave.evaluation.environment import peak_memory
from loraweave.evaluation.metrics import get_metric
from loraweave.evaluation.scoring import predict
from loraweave.evaluation.yardsticks import YARDSTICKS, Setting
from loraweave.experts.resolve import resolve_experts
from loraweave.policies import Sum
from loraweave.recipe import Contender, Contestant, Recipe
from loraweave.training.learn import Learned, learn, learns

Gates = Mapping[str, Tensor]
BASE = "base"
# The weights that a search found, beside the gates that others learn.
_FOUND = "found"
# Seconds between looks at what other processes have done.
_LOOK = 0.5


@dataclass(frozen=True)
class Outcome:
    """What came out: what :class:`Cell` says, and what was learned."""

    scores: Mapping[str, float]
    items: Mapping[str, Sequence[float]]
    counts: Mapping[str, Sequence[Sequence[float]]]
    cost: Cost
    history: Sequence[Mapping[str, float]] = ()
    gates: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """A cell to be: what it hangs on, and how it is made."""

    method: str
    seed: int | None
    key: Mapping[str, Any]
    make: Callable[[], Outcome]


class Contest:
    """One comparison under way, in one of the processes that share it.

    Attributes:
        jobs: every cell of the recipe.
        kept: label of the first method that trains gates, or else of the first one.
        tests: task -> its test data.

    Raises:
        LoraweaveError: the recipe names no test data, or something that it names cannot be read or attached.
    """

    def __init__(self, recipe: Recipe, cells: Cells, process: Process) -> None:
        self.recipe, self.cells, self.process = recipe, cells, process
        self.contenders = dict(recipe.compare) or default_contenders(recipe)
        for label, contender in self.contenders.items():
            if contender.saved is not None:
                raise LoraweaveError(
                    f"compare.{label}.saved: is for pictures (loraweave testbed, loraweave image); a comparison trains "
                    "every method itself, and 'loraweave evaluate' measures a saved mixture"
                )
            if contender.kind is not None:
                raise LoraweaveError(
                    f"compare.{label}.{contender.kind}: is for pictures (loraweave testbed, loraweave image); remove it"
                )
            if label == BASE or label.startswith(single("")):
                raise LoraweaveError(f"compare.{label}: every comparison has such a row; choose another label")
        self.seeds = recipe.train.seeds or (recipe.train.seed,)
        self.tests = building.held_out(recipe)
        self.settings = recipe.generation.model_dump()
        self._rows: dict[int, list[Example]] = {}
        if building.names_training_data(recipe):
            # Now, so that bad data shows before hours of work rather than after them.
            self._training(self.seeds[0])
        self.experts = {expert.name: expert for expert in resolve_experts(recipe.sources())}
        self.model, self.tokenizer = building.load_base(recipe.base)
        self._attached: lw.Mixture | None = None
        self.kept = "sum"
        self.jobs = list(self._list_jobs())

    @property
    def mixture(self) -> lw.Mixture:
        """What methods take turns on."""
        if self._attached is None:
            self._attached = lw.attach(self.model, self.experts, Sum())
        return self._attached

    def work(self) -> list[Cell] | None:
        """Make every cell that is not there and that no other process makes.

        Returns:
            All cells, in the main process, which waits for the others; it takes over what a process leaves undone.
        """
        alone = [job for job in self.jobs if job.seed is None and job.method in map(single, self.experts)]
        for job in self.jobs:
            self._make(job)
            if alone and job is alone[-1] and all(self._found(one) for one in alone):
                # An own score of 0 is an error; better now than after all training.
                self.own()
        if not self.process.main:
            return None
        waiting = False
        while missing := [job for job in self.jobs if self._found(job) is None]:
            if not any(self._make(job) for job in missing):
                if not waiting:
                    print(f"waiting for {len(missing)} cells of other processes", flush=True)
                waiting = True
                time.sleep(_LOOK)
        return [cell for job in self.jobs if (cell := self._found(job)) is not None]

    def own(self) -> dict[str, float]:
        """What retention compares with: each task's score in :meth:`yardsticks`."""
        own = {task: cell.scores[task] for task, cell in self.yardsticks().items()}
        retention(own, own)
        return own

    def yardsticks(self) -> dict[str, Cell]:
        """Task -> the cell of its own expert or, if no task is anybody's, of the best expert there."""
        alone = {cell.method: cell for job in self.jobs if (cell := self._found(job)) is not None}
        owners = {task: expert for task, expert in self.recipe.own_tasks().items() if task in self.tests}
        if owners:
            return {task: alone[single(expert)] for task, expert in owners.items()}
        singles = [alone[single(expert)] for expert in self.experts]
        return {task: max(singles, key=lambda cell: cell.scores[task]) for task in self.tests}

    @torch.no_grad()
    def restore(self) -> lw.Mixture:
        """The mixture with the kept method, as after its first seed."""
        jobs = [job for job in self.jobs if job.method == self.kept]
        gates = self.cells.gates(self.kept, jobs[0].seed, jobs[0].key) if jobs else {}
        kept = self.contenders.get(self.kept)
        if _FOUND in gates:
            weights = dict(zip(self.mixture.experts, gates[_FOUND].tolist(), strict=True))
            self.mixture.policy = Sum(0.0, weights)
            return self.mixture
        self.mixture.policy = Sum() if kept is None else kept.method.policy()
        for name, parameter in self.mixture.gate_parameters():
            parameter.copy_(gates[name])
        return self.mixture

    # ------------------------------------------------------------ cells

    def _found(self, job: Job) -> Cell | None:
        return self.cells.find(job.method, job.seed, job.key)

    def _make(self, job: Job) -> bool:
        """Make a cell, unless it is there or another process is at it; whether it was made."""
        if self._found(job) is not None:
            return False
        with self.cells.claim(job.method, job.seed, job.key) as ours:
            if not ours:
                return False
            torch.manual_seed(job.seed or 0)
            with peak_memory() as peak:
                made = job.make()
            cost = replace(
                made.cost, peak_memory_gb=peak["peak_memory_gb"], peak_gpu_memory_gb=peak["peak_gpu_memory_gb"]
            )
            cell = Cell(
                job.method,
                job.seed,
                job.key,
                made.scores,
                made.items,
                cost,
                made.history,
                made.counts,
                self.process.rank,
            )
            # Gates of one seed only: for pictures, and to use the method afterwards.
            self.cells.save(cell, made.gates if job.seed == self.seeds[0] else {})
            return True

    def _list_jobs(self) -> Iterator[Job]:
        common = {
            "format": FORMAT,
            "loraweave": lw.__version__,
            "base": hash_base(self.model),
            "device": self.model.device.type,
            "generation": self.settings,
            "tests": {n: {"metric": t.metric, "data": hash_examples(t.examples)} for n, t in self.tests.items()},
        }
        yield Job(BASE, None, common, self._bare)
        experts = {name: hash_expert(expert) for name, expert in self.experts.items()}
        for name in self.mixture.experts:
            key = {**common, "experts": {name: experts[name]}}
            yield Job(single(name), None, key, partial(self._single, name))
        mixed = [label for label, c in self.contenders.items() if c.method.name not in YARDSTICKS]
        gated = []
        for label, contender in self.contenders.items():
            # The order is identity, and JSON keys have none.
            own = {"experts": experts, "order": list(experts), "method": contender.method.model_dump()}
            seeds: tuple[int | None, ...] = self.seeds
            if contender.method.name not in YARDSTICKS:
                self.mixture.policy = contender.method.policy()
                seeds = seeds if learns(self.mixture) else (None,)
                gated += [label] if any(True for _ in self.mixture.gate_parameters()) else []
            for seed in seeds:
                key = {**common, **own}
                if seed is not None:
                    key["examples"] = hash_examples(self._training(seed))
                    key["train"] = self._options(label, contender, seed)
                yield Job(label, seed, key, partial(self._contend, label, contender, seed))
        self.kept = next(iter([*gated, *mixed]), "sum")

    def _contend(self, label: str, contender: Contender, seed: int | None) -> Outcome:
        if contender.method.name in YARDSTICKS:
            assert seed is not None
            return self._measure(label, contender, seed)
        self.mixture.policy = contender.method.policy()  # fresh gates
        if seed is None:
            return self._score(label)
        rows, options = self._training(seed), self._options(label, contender, seed)
        name = f"{label}, seed {seed}"
        started = time.perf_counter()
        doing = f"{f'{name}: gates':<24}" if self.process.main else False
        learned = learn(self.mixture, rows, tokenizer=self.tokenizer, progress=doing, **options)
        seconds = time.perf_counter() - started
        gates = {name: p.detach().clone() for name, p in self.mixture.gate_parameters()}
        if isinstance(found := self.mixture.policy, Sum):
            weights = found.weights or {}
            gates = {_FOUND: torch.tensor([weights[e] for e in self.mixture.experts], dtype=torch.float64)}
        return replace(self._score(name, learned, seconds), gates=gates)

    def _measure(self, label: str, contender: Contender, seed: int) -> Outcome:
        """A yardstick: something else stands where the experts stood."""
        yardstick, options = contender.method.policy(), self._options(label, contender, seed)
        started = time.perf_counter()
        with self._detached():
            setting = Setting(self.model, self.tokenizer, self.experts, self._training(seed), options, seed)
            with yardstick.contest(setting) as ready:
                seconds = time.perf_counter() - started
                return self._score(f"{label}, seed {seed}", ready.learned, seconds, ready.model)

    def _single(self, expert: str) -> Outcome:
        self.mixture.policy = Sum()
        with self.mixture.only(expert):
            return self._score(single(expert))

    def _bare(self) -> Outcome:
        with self._detached():
            return self._score(BASE)

    def _score(self, name: str, learned: Learned | None = None, seconds: float = 0.0, model: Any = None) -> Outcome:
        """The scores on all tasks, whose inputs are answered together: that fills batches better.

        Args:
            name: for the progress bar.
            learned: what was learned before, if anything.
            seconds: how long that took.
            model: who answers; default: the base, with what is attached to it.
        """
        started = time.perf_counter()
        texts = [example.input for test in self.tests.values() for example in test.examples]
        found = predict(
            self.model if model is None else model,
            self.tokenizer,
            texts,
            description=f"{name:<24}",
            progress=self.process.main,
            **self.settings,
        )
        scoring = time.perf_counter() - started
        answers = iter(found)
        scores: dict[str, float] = {}
        items: dict[str, list[float]] = {}
        counts: dict[str, list[list[float]]] = {}
        for task, test in self.tests.items():
            metric = get_metric(test.metric)
            given, right = [next(answers) for _ in test.examples], [e.references for e in test.examples]
            items[task], scores[task] = metric.per_item(given, right), metric(given, right)
            if (counted := metric.item_counts(given, right)) is not None:
                counts[task] = counted
        if learned is None:
            return Outcome(scores, items, counts, Cost(score_seconds=scoring))
        cost = Cost(seconds, learned.evaluations, learned.examples_seen, scoring)
        return Outcome(scores, items, counts, cost, learned.history)

    @contextmanager
    def _detached(self) -> Iterator[None]:
        """The bare model for a while."""
        if self._attached is not None:
            self._attached.detach()
            self._attached = None
        yield

    def _options(self, label: str, contender: Contender, seed: int) -> dict[str, Any]:
        return {**self.recipe.training(label, contender).options(), "seed": seed}

    def _training(self, seed: int) -> list[Example]:
        if seed not in self._rows:
            self._rows[seed] = building.training_data(self.recipe, seed)
        return self._rows[seed]


def default_contenders(recipe: Recipe) -> dict[str, Contender]:
    """Where a recipe does not say what to compare: the sum, the average, and its own method."""
    plain = {name: Contender(method=Contestant(name=name)) for name in ("sum", "linear")}
    return plain | {recipe.method.name: Contender(method=Contestant(**recipe.method.model_dump()))}
