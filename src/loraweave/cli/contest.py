"""The work of a comparison, cell by cell: the bare base, every expert alone, every method with every seed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import loraweave as lw
from loraweave.cli import building
from loraweave.cli.answering import Outcome, answered, together
from loraweave.cli.building import TestSet
from loraweave.cli.contenders import PLAIN, contenders_of, is_one_mixture, takes_part
from loraweave.cli.processes import Process
from loraweave.evaluation.cells import FORMAT, Cell, Cells, hash_base, hash_examples, hash_expert
from loraweave.evaluation.comparison import retention, single
from loraweave.evaluation.data import Example
from loraweave.evaluation.environment import peak_memory
from loraweave.evaluation.yardsticks import YARDSTICKS, Setting
from loraweave.experts.resolve import resolve_experts
from loraweave.policies import Sum
from loraweave.recipe import Contender, Recipe
from loraweave.training.learn import Learned, learn, settled

Gates = Mapping[str, Tensor]
BASE = "base"
# The weights that a search found, beside the gates that others learn.
_FOUND = "found"
# Seconds between looks at what other processes have done.
_LOOK = 0.5
# Inputs, all tasks together, on which a learned mixture's weights are averaged.
_WEIGHED = 64


@dataclass(frozen=True)
class Job:
    """A cell to be: what it hangs on, and how it is made."""

    method: str
    seed: int | None
    key: Mapping[str, Any]
    make: Callable[[], Outcome]


@dataclass(frozen=True)
class Lesson:
    """What is learned from, and which tasks are then answered with what was learned."""

    name: str
    rows: list[Example]
    tests: Mapping[str, TestSet]


class Contest:
    """One comparison under way, in one of the processes that share it.

    Attributes:
        jobs: every cell of the recipe.
        kept: label of the first method that trains gates, or else of the first one; of those that are one mixture for
            all tasks.
        tests: task -> its test data.

    Raises:
        LoraweaveError: the recipe names no test data, something that it names cannot be read or attached, or a
            contestant cannot take part.
    """

    def __init__(self, recipe: Recipe, cells: Cells, process: Process) -> None:
        self.recipe, self.cells, self.process = recipe, cells, process
        self.contenders = contenders_of(recipe, reserved=(BASE,))
        self.seeds = recipe.train.seeds or (recipe.train.seed,)
        self.tests = building.held_out(recipe)
        self.settings = recipe.generation.model_dump()
        self._rows: dict[int, dict[str, list[Example]]] = {}
        if building.names_training_data(recipe):
            # Now, so that bad data shows before hours of work rather than after them.
            self._training(self.seeds[0])
        self.experts = {expert.name: expert for expert in resolve_experts(recipe.sources())}
        self.model, self.tokenizer = building.load_base(recipe.base)
        self._attached: lw.Mixture | None = None
        self.kept = PLAIN
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
                made.weights,
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
        mixed, gated = [], []
        for label, contender in self.contenders.items():
            # The order is identity, and JSON keys have none.
            own = {"experts": experts, "order": list(experts), "method": contender.method.model_dump()}
            seeded = takes_part(label, contender, self.mixture, self.experts, self.recipe)
            if is_one_mixture(contender):
                mixed.append(label)
                gated += [label] if any(True for _ in self.mixture.gate_parameters()) else []
            for seed in self.seeds if seeded else (None,):
                key = {**common, **own}
                if seed is not None:
                    key["train"] = self._options(label, contender, seed)
                    key["examples"] = hash_examples(self._training(seed))
                    if contender.per_task:
                        rows = self._training_by_task(seed)
                        key |= {"examples": {task: hash_examples(rows[task]) for task in self.tests}, "per_task": True}
                yield Job(label, seed, key, partial(self._contend, label, contender, seed))
        self.kept = next(iter([*gated, *mixed]), PLAIN)

    def _contend(self, label: str, contender: Contender, seed: int | None) -> Outcome:
        if seed is None:
            self.mixture.policy = contender.method.policy()
            return self._score(label)
        made = []
        for lesson in self._lessons(f"{label}, seed {seed}", contender, seed):
            # What is learned for one task must not hang on which others there are.
            torch.manual_seed(seed)
            make = self._measure if contender.method.name in YARDSTICKS else self._learn
            made.append(make(label, contender, seed, lesson))
        return together(made)

    def _lessons(self, name: str, contender: Contender, seed: int) -> list[Lesson]:
        if not contender.per_task:
            return [Lesson(name, self._training(seed), self.tests)]
        rows = self._training_by_task(seed)
        return [Lesson(f"{name}, {task}", rows[task], {task: test}) for task, test in self.tests.items()]

    def _learn(self, label: str, contender: Contender, seed: int, lesson: Lesson) -> Outcome:
        self.mixture.policy = contender.method.policy()  # fresh gates
        options = self._options(label, contender, seed)
        started = time.perf_counter()
        doing = f"{f'{lesson.name}: gates':<24}" if self.process.main else False
        learned = learn(self.mixture, lesson.rows, tokenizer=self.tokenizer, progress=doing, **options)
        seconds = time.perf_counter() - started
        gates = {name: p.detach().clone() for name, p in self.mixture.gate_parameters()}
        if learned.expert is not None:
            self._attached = settled(self.mixture, learned)
            try:
                return self._score(lesson.name, lesson.tests, learned, seconds)
            finally:
                self._bare_again()
        if isinstance(found := self.mixture.policy, Sum):
            weights = found.weights or {}
            gates = {_FOUND: torch.tensor([weights[e] for e in self.mixture.experts], dtype=torch.float64)}
        made = self._score(lesson.name, lesson.tests, learned, seconds)
        return replace(made, gates=gates, weights=self._weights(lesson.tests))

    def _weights(self, tests: Mapping[str, TestSet]) -> dict[str, dict[str, float]]:
        """Task -> each expert's weight in the mean over sites and over some of the task's inputs."""
        some = max(1, _WEIGHED // len(self.tests))
        inputs = {task: [example.input for example in test.examples[:some]] for task, test in tests.items()}
        panels = building.average_weights(self.mixture, self.tokenizer, inputs, progress=False, **self.settings)
        means = {task: torch.tensor(list(sites.values())).mean(0).tolist() for task, sites in panels.items()}
        return {task: dict(zip(self.mixture.experts, mean, strict=True)) for task, mean in means.items()}

    def _measure(self, label: str, contender: Contender, seed: int, lesson: Lesson) -> Outcome:
        """A yardstick: something else stands where the experts stood."""
        yardstick, options = contender.method.policy(), self._options(label, contender, seed)
        started = time.perf_counter()
        self._bare_again()
        setting = Setting(self.model, self.tokenizer, self.experts, lesson.rows, options, seed)
        with yardstick.contest(setting) as ready:
            seconds = time.perf_counter() - started
            return self._score(lesson.name, lesson.tests, ready.learned, seconds, ready.model)

    def _single(self, expert: str) -> Outcome:
        self.mixture.policy = Sum()
        with self.mixture.only(expert):
            return self._score(single(expert))

    def _bare(self) -> Outcome:
        self._bare_again()
        return self._score(BASE)

    def _score(
        self,
        name: str,
        tests: Mapping[str, TestSet] | None = None,
        learned: Learned | None = None,
        seconds: float = 0.0,
        model: Any = None,
    ) -> Outcome:
        """As :func:`answered`; by default all tests, by the base with what is attached to it."""
        return answered(
            self.model if model is None else model,
            self.tokenizer,
            self.tests if tests is None else tests,
            self.settings,
            name=name,
            progress=self.process.main,
            learned=learned,
            seconds=seconds,
        )

    def _bare_again(self) -> None:
        """Detach what is attached; :attr:`mixture` attaches it when it is needed."""
        if self._attached is not None:
            self._attached.detach()
            self._attached = None

    def _options(self, label: str, contender: Contender, seed: int) -> dict[str, Any]:
        return {**self.recipe.training(label, contender).options(), "seed": seed}

    def _training(self, seed: int) -> list[Example]:
        return [example for rows in self._training_by_task(seed).values() for example in rows]

    def _training_by_task(self, seed: int) -> dict[str, list[Example]]:
        if seed not in self._rows:
            self._rows[seed] = building.training_by_task(self.recipe, seed)
        return self._rows[seed]
