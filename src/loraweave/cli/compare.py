"""``loraweave compare``: several methods on the same data, in one table."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraweave.cli.verb import Verb

if TYPE_CHECKING:
    from loraweave.cli.building import Test
    from loraweave.evaluation.comparison import Run
    from loraweave.mixture import Mixture
    from loraweave.recipe import Contender, Recipe

RESULTS, PICTURE, MIXTURE = "results.json", "weights.png", "mixture"


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file; its 'compare' lists the methods")
    parser.add_argument("-o", "--out", metavar="DIR", required=True, help="where results, picture and mixture go")
    parser.add_argument(
        "overrides", metavar="FIELD=VALUE", nargs="*", help="recipe fields to set, e.g. train.seeds=[0,1]"
    )


def _run(options: argparse.Namespace) -> None:
    from loraweave.recipe import load_recipe

    compare(load_recipe(options.recipe, options.overrides), options.out)


def compare(recipe: Recipe, out: str | Path) -> dict[str, Any]:
    """Score the bare base, every expert alone and every method of ``recipe`` on its tests; the whole of it in ``out``.

    ``out`` gets ``results.json`` (see :func:`loraweave.evaluation.comparison.summarise`), ``weights.png`` (the weights
    of the first method that learns, on each task) and ``mixture`` (that method, trained with the first seed).

    Returns:
        What ``results.json`` holds.

    Raises:
        LoraweaveError: the recipe names no data, something cannot be read, or ``out`` holds files of others.
    """
    from rich.console import Console

    from loraweave.cli import building
    from loraweave.files import replace_folder_atomic, write_json_atomic
    from loraweave.reporting.plots import heat_maps
    from loraweave.reporting.tables import results_table

    ours = [RESULTS, PICTURE, MIXTURE]
    building.check_free(str(out), ours)
    outcome = _Comparison(recipe).run()
    with replace_folder_atomic(out, ours=ours) as folder:
        from loraweave import persistence

        write_json_atomic(folder / RESULTS, outcome.results)
        heat_maps(outcome.weights, outcome.mixture.experts, folder / PICTURE, f"weights of {outcome.kept}, per task")
        persistence.save(outcome.mixture, folder / MIXTURE, results=outcome.results)
    console = Console()
    console.print()
    console.print(results_table(outcome.results))
    console.print(
        f"{Path(out) / RESULTS}: every number\n{Path(out) / PICTURE}: what {outcome.kept} gives to each expert\n"
        f"{Path(out) / MIXTURE}: that mixture; try: loraweave generate {Path(out) / MIXTURE} --input '...'",
        highlight=False,
        soft_wrap=True,
    )
    return outcome.results


class _Comparison:
    """One comparison: what it runs on, and what it found."""

    def __init__(self, recipe: Recipe) -> None:
        from loraweave.cli import building

        self.recipe = recipe
        self.contenders = dict(recipe.compare) or _default_contenders(recipe)
        self.seeds = recipe.train.seeds or (recipe.train.seed,)
        self.tests: dict[str, Test] = building.test_data(recipe)
        self.settings = recipe.generation.model_dump()
        learners = [label for label, c in self.contenders.items() if building.learns(c.method.policy())]
        if learners:
            # Read now, so that bad data shows before anything has run.
            building.training_data(recipe, self.seeds[0])
        self.kept = next(iter(learners), next(iter(self.contenders)))
        self.runs: list[Run] = []
        self.mixture: Mixture
        self.weights: dict[str, dict[str, list[float]]]
        self.results: dict[str, Any]

    def run(self) -> _Comparison:
        import time

        import loraweave as lw
        from loraweave.cli import building
        from loraweave.evaluation.comparison import single, summarise
        from loraweave.policies import Sum

        started = time.perf_counter()
        self.model, self.tokenizer = building.load_base(self.recipe.base)
        self._score("base")
        self.mixture = lw.attach(self.model, self.recipe.experts, Sum())
        for expert in self.mixture.experts:
            with self.mixture.only(expert):
                self._score(single(expert))
        own = self._own()
        kept_state = None
        for label, contender in self.contenders.items():
            state = self._contend(label, contender)
            if label == self.kept:
                kept_state = state
        self._restore(kept_state)
        inputs = {name: [e.input for e in test.examples[:32]] for name, test in self.tests.items()}
        self.weights = building.average_weights(self.mixture, self.tokenizer, inputs, **self.settings)
        self.results = summarise(
            self.runs,
            own,
            seconds=time.perf_counter() - started,
            extra={
                "metrics": {name: test.metric for name, test in self.tests.items()},
                "items": {name: len(test.examples) for name, test in self.tests.items()},
                "recipe": self.recipe.to_dict(),
            },
        )
        return self

    def _contend(self, label: str, contender: Contender) -> Any:
        """Score one method, for every seed if it learns; returns its gates after the first."""
        import time

        from loraweave.cli import building
        from loraweave.training.train import train

        first = None
        policy = contender.method.policy()
        self.mixture.policy = policy
        if not self.mixture.gates:
            self._score(label)
            return None
        options = self.recipe.training(label, contender).options()
        for seed in self.seeds:
            started = time.perf_counter()
            self.mixture.policy = policy
            rows = building.training_data(self.recipe, seed)
            train(self.mixture, rows, tokenizer=self.tokenizer, **(options | {"seed": seed}))
            self._score(label, seed, started)
            if first is None:
                first = {name: p.detach().clone() for name, p in self.mixture.gate_parameters()}
        return first

    def _restore(self, state: Mapping[str, Any] | None) -> None:
        """Put back the method that is kept, as it was after its first seed."""
        import torch

        self.mixture.policy = self.contenders[self.kept].method.policy()
        with torch.no_grad():
            for name, parameter in self.mixture.gate_parameters():
                parameter.copy_((state or {})[name])

    def _score(self, label: str, seed: int | None = None, started: float | None = None) -> None:
        """Answer the tests of all tasks in one go, which wastes less than one by one, and note the scores."""
        import time

        from loraweave.evaluation.comparison import Run
        from loraweave.evaluation.metrics import get_metric
        from loraweave.evaluation.scoring import predict

        started = time.perf_counter() if started is None else started
        texts = [example.input for test in self.tests.values() for example in test.examples]
        name = label if seed is None else f"{label}, seed {seed}"
        answers = iter(predict(self.model, self.tokenizer, texts, description=f"{name:<24}", **self.settings))
        scores = {}
        for task, test in self.tests.items():
            references = [example.references for example in test.examples]
            predictions = [next(answers) for _ in test.examples]
            scores[task] = get_metric(test.metric)(predictions, references)
        self.runs.append(Run(label, scores, seed, time.perf_counter() - started))

    def _own(self) -> dict[str, float]:
        """Task -> the yardstick of retention: its own expert's score, or the best expert's where tasks have no owner."""
        from loraweave.evaluation.comparison import retention, single

        alone = {run.method: run.scores for run in self.runs}
        owners = {task: expert for task, expert in self.recipe.own_tasks().items() if task in self.tests}
        if owners:
            own = {task: alone[single(expert)][task] for task, expert in owners.items()}
        else:
            own = {task: max(alone[single(e)][task] for e in self.mixture.experts) for task in self.tests}
        # A yardstick of 0 is an error; better now than after all training.
        retention(own, own)
        return own


def _default_contenders(recipe: Recipe) -> dict[str, Contender]:
    """Where a recipe does not say what to compare: the sum, the average, and its own method."""
    from loraweave.recipe import Contender, Method

    plain = {name: Contender(method=Method(name=name)) for name in ("sum", "linear")}
    return plain | {recipe.method.name: Contender(method=recipe.method)}


VERB = Verb(
    name="compare",
    summary="several methods on the same data, in one table",
    details="Compare the bare base, every expert alone and several methods on the same test data, over several seeds.\n"
    "Leaves results.json, a heat map of the learned weights and the mixture of the first method that learns.\n"
    "Retention is a method's score on each expert's task divided by that expert's own, averaged.",
    examples=[
        ("loraweave compare examples/zoo.yaml -o out/zoo", "on the bundled model and LoRAs"),
        ("loraweave compare recipe.yaml -o out/mine train.seeds=[0,1,2] compare=[sum,linear,mole]", "your own"),
    ],
    arguments=_arguments,
    run=_run,
)
