"""Published figures, origins, small forms and test beds of recipes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from loraweave.errors import LoraweaveError
from loraweave.recipe import check_recipe, load_recipe
from loraweave.recipe.needs import Need, needs
from loraweave.recipe.testbeds import small_form
from loraweave.reporting.published import published_rows, published_table

HERO = {"category": "character", "name": "a hero", "triggers": ["sks hero", "red hair"]}
COAT = {"category": "clothing", "triggers": ["coat"]}
HAT = {"category": "clothing", "triggers": ["hat"]}


def recipe(**more: Any) -> dict[str, Any]:
    return {"base": "base", "experts": {"hero": "a/hero", "coat": "a/coat", "hat": "a/hat"}, **more}


def bed(**more: Any) -> dict[str, Any]:
    return recipe(testbed={"elements": {"hero": HERO, "coat": COAT, "hat": HAT}} | more)


def stands_in(**tasks: str) -> dict[str, Any]:
    return recipe(data={"test": "a"}, published={"source": "x", "scores": {"mole": {"bbh": 1}}, "tasks": tasks})


def test_small_form_by_hand() -> None:
    content = {
        "base": "big",
        "train": {"steps": 800, "seed": 3},
        "data": {"train": "a"},
        "testbed": {},
        "small": {"base": "zoo", "train": {"steps": 2}, "data": {"test": "b"}, "testbed": None},
    }
    expected = {"base": "zoo", "train": {"steps": 2, "seed": 3}, "data": {"test": "b"}}
    assert small_form(content) == expected
    assert content["base"] == "big"
    with pytest.raises(LoraweaveError, match="no small form"):
        small_form({"base": "zoo"})


def test_overrides_change_the_small_form(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("base: big\nexperts: [a/b]\nsmall: {base: zoo, experts: [zoo:notice], train: {steps: 9}}\n")
    assert load_recipe(path).base == "big"
    small = load_recipe(path, ["train.steps=3"], small=True)
    assert (small.base, small.train.steps) == ("zoo", 3)
    path.write_text("base: big\nexperts: [a/b]\nsmall: {bass: zoo}\n")
    with pytest.raises(LoraweaveError, match="did you mean 'base'"):
        load_recipe(path, small=True)


def test_sets_and_prompts() -> None:
    testbed = check_recipe(bed(sizes=[2], always="character"), "r", Path()).testbed
    assert testbed is not None
    assert [one.id for one in testbed.sets()] == ["hero+coat", "hero+hat"]
    assert testbed.prompts_of(testbed.sets()[0]) == ["sks hero, red hair, coat"]
    assert testbed.described(testbed.sets()[1]) == [
        {"name": "character (a hero)", "features": ["sks hero", "red hair"]},
        {"name": "clothing (hat)", "features": ["hat"]},
    ]
    free = check_recipe(bed(sizes=[1, 2]), "r", Path()).testbed
    assert free is not None
    assert [one.id for one in free.sets()] == ["hero", "coat", "hat", "hero+coat", "hero+hat"]
    whole = check_recipe(bed(prompts=["a {hero} in a {coat} for $5"], seeds=3), "r", Path()).testbed
    assert whole is not None
    assert [one.experts for one in whole.sets()] == [("hero", "coat", "hat")]
    assert whole.prompts_of(whole.sets()[0]) == ["a sks hero in a coat for $5"]
    assert whole.seeds == (0, 1, 2)


def about(*names: str) -> dict[str, Any]:
    """What the recipe says of no text data but of a prompt about some of the experts."""
    return {"data": {}, "images": {"objective": "clip", "clip": "c", "prompts": [{"text": "it", "experts": names}]}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (bed(always="caracter", sizes=[2]), "unknown category 'caracter'; did you mean 'character'"),
        (bed(always="character"), "always: goes with 'sizes'"),
        (bed(sizes=[3]), "sizes: expected 1 to 2, as there are 2 categories, got 3"),
        (bed(sizes=[1], always="character"), "sizes: expected 2 to 2"),
        (bed(prompts=["{heros}"]), "unknown element in a prompt 'heros'; did you mean 'hero'"),
        (bed(prompts=["{hero}"], sizes=[1]), "not in every set"),
        (bed(prompts=["{"]), "write {triggers}"),
        (bed(seeds=[1, 1]), "one comes twice"),
        (
            bed(elements={"hero": HERO}) | about("coat"),
            "images.prompts: unknown element of the test bed 'coat' (known: hero)",
        ),
        (bed() | about("cape"), "images.prompts: unknown expert 'cape'"),
        (bed(elements={"hero+coat": COAT}), "elements.hero+coat: '+' and '--' join names here"),
        (bed(elements={"hero--1": COAT}), "elements.hero--1: '+' and '--' join names here"),
        (bed(elements={"a hat": HAT, "a_hat": COAT}), "pictures of 'a hat' and 'a_hat' would share files"),
        (recipe(testbed={"elements": {"cape": COAT}}), "testbed.elements: unknown expert 'cape'"),
        (recipe(testbed={"elements": {"hero": {"triggers": []}}}), "testbed.elements.hero.triggers"),
        (recipe(published={"source": "x", "scores": {}}), "published.scores: expected at least one method"),
        (recipe(published={"source": "x", "scores": {"mole": {"bbh": "good"}}}), "published.scores.mole.bbh"),
        (stands_in(bhb="test"), "published.tasks: unknown column 'bhb'; did you mean 'bbh'"),
        (stands_in(bbh="tset"), "published.tasks.bbh: unknown task 'tset'; did you mean 'test'"),
    ],
)
def test_mistakes_are_named(content: dict[str, Any], said: str) -> None:
    with pytest.raises(LoraweaveError) as raised:
        check_recipe(content, "r.yaml", Path())
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_needs_of_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "loras" / "coat").mkdir(parents=True)
    (tmp_path / "train.jsonl").touch()
    path = tmp_path / "r.yaml"
    path.write_text(
        "base: google/flan\n"
        "experts: {notice: zoo:notice, coat: loras/coat, hat: loras/hat, other: someone/other}\n"
        "data: {train: train.jsonl, test: test.jsonl}\n"
        "origins: {loras/*: a shop, '*.jsonl': a drawer}\n"
    )
    found = needs(load_recipe(path), tmp_path)
    assert found == [
        Need("base", "google/flan", "hub"),
        Need("experts.notice", "zoo:notice", "bundled"),
        Need("experts.coat", str(tmp_path / "loras/coat"), "here", "a shop"),
        Need("experts.hat", "loras/hat", "missing", "a shop"),
        Need("experts.other", "someone/other", "hub"),
        Need("data.train", str(tmp_path / "train.jsonl"), "here", "a drawer"),
        Need("data.test", str(tmp_path / "test.jsonl"), "missing", "a drawer"),
    ]


def spread(value: float) -> dict[str, Any]:
    return {"mean": value, "std": 0.0, "per_seed": [value]}


def test_published_figures_stand_beside_ours() -> None:
    printed = {"mole": {"qa": 30.0, "nli": 20.0}, "svdiff": {"qa": 10.0}, "each expert alone": {"average": 33.0}}
    results = {
        "scores": {
            "mole": {"qa": spread(28.0), "extra": spread(40.0)},
            "sum": {"qa": spread(1.0), "extra": spread(2.0)},
        },
        "own": {"qa": 50.0, "extra": 60.0},
        "retention": {},
        "recipe": {"base": "zoo", "published": {"source": "Paper, Table 1", "scores": printed}},
    }
    rows = {(row["column"], row["method"]): (row["paper"], row["here"]) for row in published_rows(results)}
    assert rows["qa", "mole"] == (30.0, 28.0)
    assert rows["nli", "mole"] == (20.0, None)
    assert rows["qa", "svdiff"] == (10.0, None)
    assert rows["average", "mole"] == (None, 34.0)
    assert rows["average", "each expert alone"] == (33.0, 55.0)
    table = published_table(results)
    assert table is not None
    assert table.title == "Paper, Table 1: figures of the paper, and ours on the bundled zoo"
    assert table.row_count == 3
    assert published_table({**results, "recipe": {}}) is None


def test_numbered_concepts_are_a_test_beds_elements_in_order() -> None:
    printed = {"mole": {"text_alignment": 0.7, "image_alignment_1": 0.5, "image_alignment_3": 0.6}}
    ours = {"text_alignment": 0.3, "image_alignment_hat": 0.1, "image_alignment_coat": 0.2, "image_alignment": 0.15}
    elements = {name: {"triggers": [name]} for name in ("coat", "hat")}
    results = {
        "scores": {"mole": ours},
        "recipe": {"published": {"source": "x", "scores": printed}, "testbed": {"elements": elements}},
    }
    rows = {row["column"]: row["here"] for row in published_rows(results)}
    assert rows == {"text_alignment": 0.3, "image_alignment_1": 0.2, "image_alignment_3": None, "average": None}


def printed_as(table: Any, width: int) -> list[list[str]]:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    return [line.split() for line in text.splitlines() if line.strip()]


def test_published_figures_of_tasks_that_others_stand_in_for() -> None:
    """And of what is no task: the largest weight; each line with the digits that its own figures call for."""
    scores = {"mole": {"qa": 81.65, "cosine": 0.7512, "largest_weight": 68}, "nla": {"qa": 32.0}}
    results = {
        "scores": {"mole": {"less": spread(50.04), "cosine": spread(0.5)}, "nla": {"less": spread(40.0)}},
        "retention": {},
        "largest_weight": {"mole": spread(41.26)},
        "recipe": {"published": {"source": "P", "scores": scores, "tasks": {"qa": "less"}}},
    }
    rows = {(row["column"], row["method"]): (row["paper"], row["here"]) for row in published_rows(results)}
    assert rows["qa", "mole"] == (81.65, 50.04)
    assert rows["largest_weight", "mole"] == (68, 41.26)
    assert rows["largest_weight", "nla"] == (None, None)
    wide = printed_as(published_table(results, width=80), 80)
    assert wide[4:] == [
        ["qa", "(here", "less)", "81.7", "50.0", "32.0", "40.0"],
        ["cosine", "0.751", "0.500", "-", "-"],
        ["largest_weight", "68.0", "41.3", "-", "-"],
        ["average", "-", "25.3", "-", "40.0"],
    ]
    long = printed_as(published_table(results, width=40), 40)
    assert long[3:] == [
        ["qa", "(here", "less)", "mole", "81.7", "50.0"],
        ["nla", "32.0", "40.0"],
        ["cosine", "mole", "0.751", "0.500"],
        ["largest_weight", "mole", "68.0", "41.3"],
        ["average", "mole", "-", "25.3"],
        ["nla", "-", "40.0"],
    ]
    del scores["mole"]["qa"], scores["mole"]["cosine"], scores["nla"]
    assert [row["column"] for row in published_rows(results)] == ["largest_weight"]


def test_a_weight_file_is_not_sought_on_the_hub(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("base: a/b\nexperts: {hero: loras/hero.safetensors, ink: someone/ink}\n")
    found = {need.what: need.state for need in needs(load_recipe(tmp_path / "r.yaml"), tmp_path)}
    assert found == {"base": "hub", "experts.hero": "missing", "experts.ink": "hub"}
