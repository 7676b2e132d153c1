"""A comparison: the bare base, every expert alone and several methods, on the tests of one recipe."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import loraweave as lw
from loraweave import persistence
from loraweave.cli import building
from loraweave.evaluation.comparison import Run, retention, single, summarise
from loraweave.evaluation.metrics import get_metric
from loraweave.evaluation.scoring import predict
from loraweave.evaluation.yardsticks import YARDSTICKS, Setting, Yardstick
from loraweave.experts.resolve import resolve_experts
from loraweave.files import check_replaceable, replace_folder_atomic, write_json_atomic
from loraweave.policies import Sum
from loraweave.recipe import Contender, Contestant, Recipe
from loraweave.reporting.plots import heat_maps
from loraweave.reporting.published import published_table
from loraweave.reporting.tables import results_table
from loraweave.training.learn import learn, learns

RESULTS, PICTURE, MIXTURE = "results.json", "weights.png", "mixture"
# Inputs per task for the picture: a mean over more looks the same.
_PICTURED = 32

Gates = Mapping[str, Tensor]


def compare(recipe: Recipe, out: str | Path) -> dict[str, Any]:
    """Compare as ``recipe`` says, write all of it to ``out`` and print the table.

    ``out`` gets ``results.json`` (see :func:`loraweave.evaluation.comparison.summarise`), and of the first method that
    learns, trained with the first seed, ``weights.png`` (its weights on each task) and the saved ``mixture``.

    Returns:
        What ``results.json`` holds.

    Raises:
        LoraweaveError: the recipe names no data, something cannot be read, or ``out`` holds files of others.
    """
    ours = [RESULTS, PICTURE, MIXTURE]
    check_replaceable(out, ours=ours)
    comparison = Comparison(recipe)
    results = comparison.run()
    kept, mixture = comparison.kept, comparison.mixture
    weights = comparison.weights()
    with replace_folder_atomic(out, ours=ours) as folder:
        write_json_atomic(folder / RESULTS, results)
        heat_maps(weights, mixture.experts, folder / PICTURE, f"weights of {kept} on each task")
        persistence.save(mixture, folder / MIXTURE, results=results, recipe=results["recipe"])
    console = Console()
    console.print()
    console.print(results_table(results))
    if (beside := published_table(results)) is not None:
        console.print(beside)
    said = (
        f"{Path(out) / RESULTS}: every number",
        f"{Path(out) / PICTURE}: what {kept} gives to each expert, at each site",
        f"{Path(out) / MIXTURE}: that mixture; try: loraweave generate {Path(out) / MIXTURE} --input TEXT",
    )
    console.print("\n".join(said), highlight=False, soft_wrap=True)
    return results


class Comparison:
    """One comparison under way.

    Attributes:
        mixture: what the methods take turns on; after :meth:`run` it has the kept method, as after its first seed.
        kept: label of the first method that learns, or of the first one if none does.
    """

    mixture: lw.Mixture
    kept: str

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.contenders = dict(recipe.compare) or default_contenders(recipe)
        self.seeds = recipe.train.seeds or (recipe.train.seed,)
        self.tests = building.held_out(recipe)
        self.settings = recipe.generation.model_dump()
        self.runs: list[Run] = []
        if building.names_training_data(recipe):
            # Read now and thrown away, so that bad data shows before hours of work rather than after them.
            building.training_data(recipe, self.seeds[0])

    def run(self) -> dict[str, Any]:
        """Score everything; returns what ``results.json`` holds."""
        started = time.perf_counter()
        self.experts = {expert.name: expert for expert in resolve_experts(self.recipe.sources())}
        self.model, self.tokenizer = building.load_base(self.recipe.base)
        self._score("base")
        self.mixture = lw.attach(self.model, self.experts, Sum())
        for expert in self.mixture.experts:
            with self.mixture.only(expert):
                self._score(single(expert))
        own = self._own()
        gates = {label: self._contend(label, contender) for label, contender in self.contenders.items()}
        learned = [label for label, found in gates.items() if found]
        mixed = [label for label, c in self.contenders.items() if c.method.name not in YARDSTICKS]
        self.kept = next(iter([*learned, *mixed]), "sum")
        self._restore(gates.get(self.kept, {}))
        extra = {
            "metrics": {name: test.metric for name, test in self.tests.items()},
            "items": {name: len(test.examples) for name, test in self.tests.items()},
            "recipe": self.recipe.to_dict(),
        }
        return summarise(self.runs, own, seconds=time.perf_counter() - started, extra=extra)

    def weights(self) -> dict[str, dict[str, list[float]]]:
        """Task -> site -> each expert's mean weight, of the kept method."""
        inputs = {name: [e.input for e in test.examples[:_PICTURED]] for name, test in self.tests.items()}
        return building.average_weights(self.mixture, self.tokenizer, inputs, progress=False, **self.settings)

    def _contend(self, label: str, contender: Contender) -> Gates:
        """Score a method, with every seed if it learns; returns its gates after the first."""
        policy = contender.method.policy()
        options = self.recipe.training(label, contender).options()
        if contender.method.name in YARDSTICKS:
            for seed in self.seeds:
                self._measure(label, policy, options, seed)
            return {}
        self.mixture.policy = policy
        if not learns(self.mixture):
            self._score(label)
            return {}
        first: Gates = {}
        for seed in self.seeds:
            started = time.perf_counter()
            self.mixture.policy = policy  # fresh gates
            rows = building.training_data(self.recipe, seed)
            doing = f"{f'{label}, seed {seed}: gates':<24}"
            learn(self.mixture, rows, tokenizer=self.tokenizer, progress=doing, **(options | {"seed": seed}))
            self._score(label, seed, started)
            first = first or {name: p.detach().clone() for name, p in self.mixture.gate_parameters()}
        return first

    def _measure(self, label: str, yardstick: Yardstick, options: dict[str, Any], seed: int) -> None:
        """Score a yardstick: other LoRAs stand where the experts stood."""
        started, options = time.perf_counter(), options | {"seed": seed}
        rows = building.training_data(self.recipe, seed)
        self.mixture.detach()
        try:
            setting = Setting(self.model, self.tokenizer, self.experts, rows, options, seed)
            stand_ins, policy = yardstick.stand_ins(setting)
            other = lw.attach(self.model, stand_ins, policy)
            try:
                if learns(other):
                    learn(other, rows, tokenizer=self.tokenizer, **options)
                self._score(label, seed, started)
            finally:
                other.detach()
        finally:
            self.mixture = lw.attach(self.model, self.experts, Sum())

    @torch.no_grad()
    def _restore(self, gates: Gates) -> None:
        kept = self.contenders.get(self.kept)
        self.mixture.policy = Sum() if kept is None else kept.method.policy()
        for name, parameter in self.mixture.gate_parameters():
            parameter.copy_(gates[name])

    def _score(self, label: str, seed: int | None = None, started: float | None = None) -> None:
        """Note the scores on all tasks, whose inputs are answered together: that fills batches better."""
        started = time.perf_counter() if started is None else started
        texts = [example.input for test in self.tests.values() for example in test.examples]
        name = label if seed is None else f"{label}, seed {seed}"
        answers = iter(predict(self.model, self.tokenizer, texts, description=f"{name:<24}", **self.settings))
        scores = {
            task: get_metric(test.metric)([next(answers) for _ in test.examples], [e.references for e in test.examples])
            for task, test in self.tests.items()
        }
        self.runs.append(Run(label, scores, seed, time.perf_counter() - started))

    def _own(self) -> dict[str, float]:
        """What retention compares with: each task's own expert or, if no task is anybody's, the best expert there."""
        alone = {run.method: run.scores for run in self.runs}
        owners = {task: expert for task, expert in self.recipe.own_tasks().items() if task in self.tests}
        own = {task: alone[single(expert)][task] for task, expert in owners.items()}
        if not own:
            own = {task: max(alone[single(e)][task] for e in self.mixture.experts) for task in self.tests}
        # An own score of 0 is an error; better now than after all training.
        retention(own, own)
        return own


def default_contenders(recipe: Recipe) -> dict[str, Contender]:
    """Where a recipe does not say what to compare: the sum, the average, and its own method."""
    plain = {name: Contender(method=Contestant(name=name)) for name in ("sum", "linear")}
    return plain | {recipe.method.name: Contender(method=Contestant(**recipe.method.model_dump()))}
