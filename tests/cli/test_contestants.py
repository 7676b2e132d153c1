"""Contestants of a comparison: who learns for each task by itself, and who is refused before anything is trained."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import loraweave as lw
from loraweave.cli import building, main
from loraweave.cli.answering import Outcome, together
from loraweave.evaluation.cells import CELLS, Cost
from loraweave.evaluation.metrics import get_metric
from loraweave.evaluation.scoring import predict
from loraweave.recipe import Recipe, load_recipe

TASKS = ("colour", "size")


def compare(recipe: Path, out: Path, contestants: str, *more: str) -> dict[str, Any]:
    assert main(["compare", str(recipe), "-o", str(out), f"compare={contestants}", *more]) == 0
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    return found


def cell(out: Path, method: str, seed: int = 0) -> dict[str, Any]:
    found = [json.loads(path.read_text()) for path in (out / CELLS).glob("[!.]*.json")]
    (one,) = [c for c in found if (c["method"], c["seed"]) == (method, seed)]
    return dict(one)


class Bench:
    """The recipe's base, experts and data, for oracles that learn by hand."""

    def __init__(self, path: Path) -> None:
        self.recipe: Recipe = load_recipe(path)
        self.model, self.tokenizer = building.load_base(self.recipe.base)
        self.rows = building.training_by_task(self.recipe, 0)

    def attached(self, policy: Any) -> Any:
        return lw.attach(self.model, self.recipe.sources(), policy)

    def score(self, task: str) -> float:
        examples = self.rows[task]  # the tiny world asks what it teaches
        answers = predict(
            self.model, self.tokenizer, [e.input for e in examples], max_new_tokens=3, batch_size=32, progress=False
        )
        return get_metric("exact_match")(answers, [e.references for e in examples])


# ---------------------------------------------------------------- per task


def test_a_search_per_task_is_a_search_on_each_tasks_examples(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The oracle searches by hand, task by task, as LoRAHub is published: five examples of the task itself."""
    out = tmp_path / "out"
    search = "{evaluations: 9, examples: 5, per_task: true}"
    results = compare(recipe, out, f"{{lorahub: {search}, together: {{name: lorahub, evaluations: 9, examples: 5}}}}")
    said = capsys.readouterr().out
    assert "Learned anew for each task, from its examples alone: lorahub." in " ".join(said.split())
    assert results["per_task"] == ["lorahub"]
    assert results["recipe"]["compare"]["lorahub"]["per_task"] is True
    made = cell(out, "lorahub")
    bench = Bench(recipe)
    for task in TASKS:
        mixture = bench.attached(lw.Sum())
        found = lw.search(
            mixture,
            bench.rows[task],
            evaluations=9,
            examples=5,
            batch_size=4,
            tokenizer=bench.tokenizer,
            progress=False,
        )
        assert made["weights"][task] == pytest.approx(found.weights)
        assert made["scores"][task] == bench.score(task)
        mixture.detach()
    assert made["weights"]["colour"] != made["weights"]["size"]
    assert (made["cost"]["evaluations"], made["cost"]["examples_seen"]) == (2 * 9, 2 * 9 * 5)
    assert made["key"]["per_task"] is True
    assert set(made["key"]["examples"]) == set(TASKS)
    pooled = cell(out, "together")
    assert (pooled["cost"]["evaluations"], pooled["cost"]["examples_seen"]) == (9, 9 * 5)
    assert pooled["weights"]["colour"] == pooled["weights"]["size"]
    assert "per_task" not in pooled["key"]


def test_what_is_learned_for_a_task_hangs_on_it_alone(recipe: Path, tmp_path: Path) -> None:
    """Gates per task answer each task as those of a comparison that has this task only."""
    both = tmp_path / "both"
    results = compare(recipe, both, "{mole: {per_task: true, train: {steps: 6}}}")
    made = cell(both, "mole")
    steps = [record["step"] for record in made["history"] if "entropy" in record]
    assert steps == sorted(steps)
    assert max(steps) == 12, "one training behind the other"
    costs = 0.0
    for task in TASKS:
        content = (recipe.parent / "recipe.yaml").read_text()
        others = [line for line in content.splitlines() if not line.strip().startswith(f"{other(task)}: {{train")]
        single = recipe.parent / f"only_{task}.yaml"
        single.write_text("\n".join(others))
        compare(single, tmp_path / task, "{mole: {train: {steps: 6}}}")
        one = cell(tmp_path / task, "mole")
        assert made["items"][task] == one["items"][task]
        assert made["weights"][task] == pytest.approx(one["weights"][task])
        costs += one["cost"]["evaluations"]
    assert made["cost"]["evaluations"] == costs == 12
    # There is no one mixture to keep, so the one that is kept is the plain sum.
    assert results["kept"] == "sum"


def other(task: str) -> str:
    return TASKS[1 - TASKS.index(task)]


def test_yardsticks_learn_per_task_too(recipe: Path, tmp_path: Path) -> None:
    """The best single expert of each task is its own; of both together it is one that knows half."""
    out = tmp_path / "out"
    contestants = "{best: {name: best_single, per_task: true}, best_single: {}, fresh_lora: {per_task: true}}"
    results = compare(recipe, out, contestants)
    kept = {method: spread["mean"] for method, spread in results["retention"].items()}
    assert (kept["best"], kept["best_single"]) == (1.0, 0.5)
    assert results["costs"]["best"]["evaluations"] == 4
    assert results["costs"]["fresh_lora"]["evaluations"] == 6
    before = {path.name for path in (out / CELLS).glob("*.json")}
    compare(recipe, out, contestants)
    assert {path.name for path in (out / CELLS).glob("*.json")} == before


def test_outcomes_put_together() -> None:
    def outcome(task: str, steps: int, seconds: float) -> Outcome:
        log: list[Mapping[str, float]] = [{"step": float(step), "loss": seconds} for step in (1, steps)]
        cost = Cost(seconds, steps, 10 * steps, 2 * seconds)
        return Outcome({task: 1.0}, {task: [1.0]}, {task: [[2.0]]}, cost, log, {}, {task: {"a": 1.0}})

    made = together([outcome("x", 3, 1.0), outcome("y", 5, 2.0)])
    assert (made.scores, made.items, made.counts) == (
        {"x": 1.0, "y": 1.0},
        {"x": [1.0], "y": [1.0]},
        {"x": [[2.0]], "y": [[2.0]]},
    )
    assert made.weights == {"x": {"a": 1.0}, "y": {"a": 1.0}}
    assert made.cost == Cost(3.0, 8, 80, 6.0)
    assert [record["step"] for record in made.history] == [1, 3, 4, 8]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("compare={sum: {per_task: true}}", "compare.sum.per_task: 'sum' learns nothing, for one task or for all"),
        ("compare={m: {name: merged, per_task: true}}", "compare.m.per_task: 'merged' learns nothing"),
        ("compare={r: {name: random, per_task: true}}", "compare.r.per_task: 'random' learns nothing"),
        ("compare={sum: {name: cat, per_task: true}}", "compare.sum: this is what the plain sum is called"),
        ("compare={sum: {name: fresh_lora}}", "compare.sum: this is what the plain sum is called"),
        ("data.tasks.colour.train=null", "compare.mole.per_task: nothing to learn task 'colour' from"),
    ],
)
def test_what_cannot_be_learned_per_task(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, why: str
) -> None:
    out = tmp_path / "out"
    assert main(["compare", str(recipe), "-o", str(out), "compare={mole: {per_task: true}}", change]) == 2
    assert why in capsys.readouterr().err.splitlines()[-1]
    assert not (out / CELLS).exists()


# ---------------------------------------------------------------- LoRAHub in the space of factors


def test_lorahub_as_published_takes_part(recipe: Path, tmp_path: Path) -> None:
    """The oracle adds factors by hand: the LoRA that ``lw.search`` finds, alone on the base."""
    out = tmp_path / "out"
    options = "name: lorahub, evaluations: 6, examples: 5, start: 0.3"
    results = compare(recipe, out, f"{{factors: {{{options}, space: factors}}, sum: {{}}, delta: {{{options}}}}}")
    bench = Bench(recipe)
    mixture = bench.attached(lw.Sum())
    rows = [row for task in TASKS for row in bench.rows[task]]
    settings: dict[str, Any] = {"evaluations": 6, "examples": 5, "start": 0.3, "batch_size": 4}
    found = lw.search(mixture, rows, space="factors", tokenizer=bench.tokenizer, progress=False, **settings)
    mixture.detach()
    assert found.expert is not None
    mixture = lw.attach(bench.model, {"lorahub": found.expert}, lw.Sum())
    assert cell(out, "factors")["scores"] == {task: bench.score(task) for task in TASKS}
    mixture.detach()
    # Who comes after it stands on the experts again.
    alone = compare(recipe, tmp_path / "alone", f"{{delta: {{{options}}}, sum: {{}}}}")
    assert results["scores"]["sum"] == alone["scores"]["sum"]
    assert results["scores"]["delta"] == alone["scores"]["delta"]
    assert results["kept"] == "sum"


def test_a_search_in_factors_is_trained_and_saved_as_one_lora(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "hub"
    method = "method={name: lorahub, evaluations: 5, space: factors, start: 0.5}"
    assert main(["train", str(recipe), "-o", str(place), method]) == 0
    saved = json.loads((place / "mixture.json").read_text())
    assert [expert["name"] for expert in saved["experts"]] == ["lorahub"]
    assert main(["generate", str(place), "--input", "say size fig fig"]) == 0


# ---------------------------------------------------------------- weights


def test_the_largest_weight_is_that_of_the_gates_on_the_tests(recipe: Path, tmp_path: Path) -> None:
    """The oracle looks at every site of the mixture that was left, while it answers each task by itself."""
    out = tmp_path / "out"
    learning = ["train.steps=20", "train.learning_rate=0.05", "train.batch_size=16"]
    results = compare(recipe, out, "{mole: {scale: 1}, sum: {}}", *learning)
    bench = Bench(recipe)
    mixture = lw.load(out / "mixture", bench.model)
    seen: dict[str, list[list[float]]] = {task: [] for task in TASKS}
    for task in TASKS:
        with mixture.record() as recorded:
            bench.score(task)
        seen[task] = list(recorded.average().values())
    made = cell(out, "mole")["weights"]
    total = dict.fromkeys(TASKS, 0.0)
    for task, sites in seen.items():
        for n, expert in enumerate(mixture.experts):
            mean = sum(site[n] for site in sites) / len(sites)
            assert made[task][expert] == pytest.approx(mean, abs=1e-5)
            total[expert] += mean
    share = 100 * max(total.values()) / sum(total.values())
    assert results["largest_weight"]["mole"]["mean"] == pytest.approx(share, abs=1e-3)
    assert 50 < share < 100
    assert set(results["largest_weight"]) == {"mole"}


# ---------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def unequal(world: Path) -> Path:
    """The recipe with a third LoRA of another rank."""
    experts = {name: str(world / "loras" / name) for name in TASKS}
    wide = world / "loras" / "wide"
    if not wide.exists():
        lw.write_expert(lw.merge(experts, "concat", name="wide"), wide)
    path = world / "unequal.yaml"
    text = (world / "recipe.yaml").read_text().replace("size: loras/size}", "size: loras/size, wide: loras/wide}")
    path.write_text(text)
    return path


NO_NEVERGRAD = pytest.mark.skipif(importlib.util.find_spec("nevergrad") is not None, reason="nevergrad is here")
FACTORS = "{name: merged, transform: {name: linear, space: factors}}"


@pytest.mark.parametrize(
    ("contestant", "why"),
    [
        ("xlora: {}", "compare.xlora: xlora: peft's X-LoRA is for decoder-only models"),
        pytest.param(
            "hub: {name: lorahub, optimizer: ngopt}", "compare.hub: .*pip install 'loraweave", marks=NO_NEVERGRAD
        ),
        pytest.param(
            "random: {method: {name: lorahub, optimizer: ngopt}}", "compare.random: .*nevergrad", marks=NO_NEVERGRAD
        ),
        ("hub: {name: lorahub, space: factors}", "compare.hub: space='factors' .* need the same rank"),
        (f"pem: {FACTORS}", "compare.pem: space='factors' .* needs equal ranks"),
        ("chunks: {name: linear, weights: {red: 1}}", "compare.chunks: unknown expert 'red'"),
    ],
)
def test_refusals_come_before_anything_is_made(
    unequal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], contestant: str, why: str
) -> None:
    """Whoever stands before it in the recipe: no cell is made, and the last line says who and why."""
    out = tmp_path / "out"
    assert main(["compare", str(unequal), "-o", str(out), f"compare={{mole: {{}}, {contestant}}}"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert re.search(why, said[0])
    assert not (out / CELLS).exists()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (["data={tasks: {size: {test: size.jsonl}}}"], "names no training data"),
        (["train.seeds=[0, 4294967296]"], "train.seeds: expected different numbers of 0 to 4294967295"),
        (["train.seed=4294967296"], "train.seed: "),
        (["compare={sum: {}, mole: {scal: 2}}"], "'scal'"),
        (["compare={sum: {}, mole: {train: {stepps: 2}}}"], "'?stepps"),
        (["data.tasks.size.train=none.jsonl"], "none.jsonl"),
    ],
)
def test_so_do_missing_data_bad_seeds_and_unknown_options(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: list[str], why: str
) -> None:
    out = tmp_path / "out"
    assert main(["compare", str(recipe), "-o", str(out), "compare=[sum, mole]", *changes]) == 2
    assert re.search(why, capsys.readouterr().err)
    assert not (out / CELLS).exists()


def test_equal_ranks_are_not_refused(recipe: Path, tmp_path: Path) -> None:
    results = compare(recipe, tmp_path / "out", f"{{pem: {FACTORS}}}")
    assert results["costs"]["pem"]["evaluations"] == 0
    assert results["costs"]["pem"]["train_seconds"] > 0
