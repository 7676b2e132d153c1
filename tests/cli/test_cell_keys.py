"""What a cell hangs on, part by part, and rows that answer with nothing but what their name says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import loraweave as lw
from loraweave.cli import building, main
from loraweave.cli.contest import Contest
from loraweave.cli.processes import Process
from loraweave.evaluation.cells import FORMAT, Cells, fingerprint
from loraweave.evaluation.metrics import get_metric
from loraweave.evaluation.scoring import predict
from loraweave.recipe import load_recipe

LEARNERS = {"mole", "lorahub", "fresh_lora"}
METHODS = {"sum", *LEARNERS}
ALL = {"base", "only:colour", "only:size", *METHODS}


def compare(sums: str = "{}", evaluations: int = 3, mole: str = "") -> str:
    return f"compare={{sum: {sums}, mole: {{{mole}}}, lorahub: {{evaluations: {evaluations}}}, fresh_lora: {{}}}}"


def keys(recipe: Path, place: Path, *overrides: str) -> dict[str, Any]:
    contest = Contest(load_recipe(recipe, [compare(), *overrides]), Cells(place), Process())
    return {job.method: job.key for job in contest.jobs}


def changed(weights: Path) -> None:
    """One number of a file is another one."""
    found = load_file(weights)
    name = sorted(found)[0]
    found[name].view(-1)[0] += 1
    save_file(found, weights, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def other(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world, with a base, an expert, and an answer that differ a little."""
    place = tmp_path_factory.mktemp("other")
    for name in ("base", "loras"):
        shutil.copytree(world / name, place / name)
    changed(place / "base" / "model.safetensors")
    changed(place / "loras" / "size" / "adapter_model.safetensors")
    rows = (world / "size.jsonl").read_text()
    (place / "size.jsonl").write_text(rows.replace('"large"', '"red"', 1))
    return place


@pytest.mark.parametrize(
    ("change", "touched"),
    [
        ("generation.max_new_tokens=2", ALL),
        ("data.test_items=3", ALL),
        ("data.tasks.colour.metric=exact_match_loose", ALL),
        ("data.tasks.size.test=OTHER/size.jsonl", ALL),
        ("base=OTHER/base", ALL),
        ("experts.size=OTHER/loras/size", {"only:size", *METHODS}),
        ("experts={size: loras/size, colour: loras/colour}", METHODS),
        ("data.train_items=3", LEARNERS),
        ("data.tasks.size.train=OTHER/size.jsonl", LEARNERS),
        ("train.steps=4", LEARNERS),
        ("train.seed=1", LEARNERS),
        (compare(sums="{weights: {size: 0.5}}"), {"sum"}),
        (compare(evaluations=4), {"lorahub"}),
        (compare(mole="scale: 2"), {"mole"}),
        (compare(mole="train: {learning_rate: 0.5}"), {"mole"}),
        (compare(mole="per_task: true"), {"mole"}),
        ("train.seeds=[0]", set()),
    ],
)
def test_every_part_of_a_key(recipe: Path, other: Path, tmp_path: Path, change: str, touched: set[str]) -> None:
    before = keys(recipe, tmp_path)
    after = keys(recipe, tmp_path, change.replace("OTHER", str(other)))
    assert before.keys() == after.keys() == ALL
    assert {method for method in ALL if fingerprint(before[method]) != fingerprint(after[method])} == touched
    for key in after.values():
        assert (key["format"], key["loraweave"], key["device"]) == (FORMAT, lw.__version__, "cpu")


def test_the_base_answers_without_experts(recipe: Path, tmp_path: Path) -> None:
    """Whatever was attached when the contestants were looked at."""
    out = tmp_path / "out"
    strong = "compare={sum: {weights: {size: 1.0, colour: 0.0}}}"
    assert main(["compare", str(recipe), "-o", str(out), strong]) == 0
    found = json.loads((out / "results.json").read_text())
    made = load_recipe(recipe)
    model, tokenizer = building.load_base(made.base)
    for task, rows in building.training_by_task(made, 0).items():
        texts, right = [row.input for row in rows], [row.references for row in rows]
        answers = predict(model, tokenizer, texts, max_new_tokens=3, batch_size=32, progress=False)
        assert found["scores"]["base"][task]["mean"] == get_metric("exact_match")(answers, right)
    assert found["scores"]["base"]["size"]["mean"] < found["scores"]["sum"]["size"]["mean"]


def test_retention_divides_by_the_tasks_own_expert_and_not_by_the_best(
    recipe: Path, world: Path, tmp_path: Path
) -> None:
    """Three rows of colour and one of size, said to be size's: it knows a quarter, and the other expert three."""
    colour, size = ((world / f"{name}.jsonl").read_text().splitlines() for name in ("colour", "size"))
    mixed, out = tmp_path / "mixed.jsonl", tmp_path / "out"
    mixed.write_text("\n".join([*colour[:3], size[0]]))
    data = f"data={{tasks: {{mixed: {{test: {mixed}, expert: size}}}}}}"
    assert main(["compare", str(recipe), "-o", str(out), data, "compare=[sum]"]) == 0
    found = json.loads((out / "results.json").read_text())
    assert found["own"] == {"mixed": 25.0}
    assert found["retention"]["only:colour"]["mean"] == 3.0


def test_examples_seen_count_those_of_every_accumulated_batch(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["compare", str(recipe), "-o", str(out), "compare=[mole, fresh_lora]"]
    assert main([*command, "train.gradient_accumulation_steps=2"]) == 0
    costs = json.loads((out / "results.json").read_text())["costs"]
    # 3 steps of 2 batches of 4.
    assert [costs[method]["examples_seen"] for method in ("mole", "fresh_lora")] == [24, 24]
