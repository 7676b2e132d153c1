"""Recipes: what they accept, what they refuse, and what they say then."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from loraweave.errors import LoraweaveError
from loraweave.policies import Linear, MoLE
from loraweave.recipe import Contender, Recipe, load_recipe, recipe_schema

MINIMAL = {"base": "someone/base", "experts": {"qa": "loras/qa", "nli": "someone/nli"}}
EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.yaml"))


def written(folder: Path, **fields: object) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | fields, sort_keys=False))
    return path


def refusal(folder: Path, *overrides: str, **fields: object) -> str:
    with pytest.raises(LoraweaveError) as caught:
        load_recipe(written(folder, **fields), overrides)
    return str(caught.value)


def test_the_least_recipe_has_defaults(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path))
    assert recipe.method.policy() == MoLE()
    assert recipe.train.options() == {"seed": 0}
    assert recipe.generation.model_dump()["num_beams"] == 1
    assert list(recipe.experts) == ["qa", "nli"]


def test_method_options_reach_the_policy(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, method={"name": "mole", "granularity": "layer", "scale": 2, "balance": 0}))
    assert recipe.method.policy() == MoLE(granularity="layer", scale=2, balance=0)
    assert load_recipe(written(tmp_path, method="linear")).method.policy() == Linear()


def test_only_what_was_set_is_passed_to_training(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, train={"steps": 800, "learning_rate": 1e-2, "seeds": [3, 4]}))
    assert recipe.train.options() == {"steps": 800, "learning_rate": 0.01, "seed": 0}


def test_paths_are_relative_to_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "loras" / "qa").mkdir(parents=True)
    data = {"train": "train.jsonl", "test": "/elsewhere/test.jsonl"}
    recipe = load_recipe(written(tmp_path, data=data))
    assert recipe.experts == {"qa": str(tmp_path / "loras/qa"), "nli": "someone/nli"}
    assert recipe.data.train == str(tmp_path / "train.jsonl")
    assert recipe.data.test == "/elsewhere/test.jsonl"
    assert recipe.base == "someone/base"


def test_a_list_of_experts_takes_their_last_names(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, experts=["loras/qa/", "someone/nli"]))
    assert recipe.experts == {"qa": "loras/qa/", "nli": "someone/nli"}
    assert "same name" in refusal(tmp_path, experts=["a/qa", "b/qa"])


def test_generated_tasks_have_a_short_form(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, data={"tasks": {"qa": "zoo:sort/a_to_z"}}))
    task = recipe.data.by_task()["qa"]
    assert task.train == task.test == "zoo:sort/a_to_z"
    assert "did you mean 'sort/a_to_z'" in refusal(tmp_path, data={"tasks": {"qa": "zoo:sort/a_to_y"}})


def test_tasks_belong_to_the_expert_of_their_name_or_to_whom_they_say(tmp_path: Path) -> None:
    tasks = {"qa": {"test": "a"}, "nli_hard": {"test": "b", "expert": "nli"}, "other": {"test": "c"}}
    assert load_recipe(written(tmp_path, data={"tasks": tasks})).own_tasks() == {"qa": "qa", "nli_hard": "nli"}
    tasks["other"]["expert"] = "nly"
    assert "data.tasks.other.expert: unknown expert 'nly'; did you mean 'nli'?" in refusal(
        tmp_path, data={"tasks": tasks}
    )


def test_compare_lists_names_or_labels_methods(tmp_path: Path) -> None:
    plain = load_recipe(written(tmp_path, compare=["sum", {"name": "mole", "scale": 1}]))
    assert [c.method.name for c in plain.compare.values()] == ["sum", "mole"]
    form = {"evidence": "outputs", "normalization": "l2", "gate_form": "full", "balance": 0.5}
    paper = {"name": "mole", **form, "train": {"learning_rate": 1e-5}}
    recipe = load_recipe(written(tmp_path, compare={"sum": None, "paper": paper}, train={"steps": 7, "seeds": [1, 2]}))
    assert recipe.compare["paper"].method.policy() == MoLE.paper()
    training = recipe.training("paper", recipe.compare["paper"])
    assert training.options() == {"steps": 7, "learning_rate": 1e-5, "seed": 0}
    assert recipe.training("sum", recipe.compare["sum"]) is recipe.train
    assert isinstance(recipe.compare["sum"], Contender)
    assert "give labels" in refusal(tmp_path, compare=["mole", {"name": "mole", "scale": 1}])
    assert "compare.mole.train.steps: expected a number greater" in refusal(
        tmp_path, compare={"mole": {"train": {"steps": 0}}}
    )
    assert "compare.mole.train.stepz: unknown field 'stepz'" in refusal(
        tmp_path, compare={"mole": {"train": {"stepz": 1}}}
    )
    assert "every method takes the seeds" in refusal(tmp_path, compare={"mole": {"train": {"seeds": [1]}}})


def test_random_loras_say_how_they_are_mixed_in_every_form(tmp_path: Path) -> None:
    """Their option ``method`` is called like the field of a contestant's long form."""
    gates, train = {"name": "mole", "granularity": "layer"}, {"steps": 3}
    compare = {
        "random": {"method": gates},
        "a": {"name": "random", "method": gates, "train": train},
        "b": {"name": "random", "method": "linear"},
        "c": {"method": {"name": "random", "method": gates}, "train": train},
        "d": {"method": {"name": "linear"}},
    }
    recipe = load_recipe(written(tmp_path, compare=json.loads(json.dumps(compare))))
    found = {label: contender.method.policy() for label, contender in recipe.compare.items()}
    assert [found[label].method for label in ("random", "a", "c")] == [gates] * 3
    assert (found["b"].method, found["d"].name) == ({"name": "linear"}, "linear")
    assert [contender.train for contender in recipe.compare.values()] == [{}, train, {}, train, {}]
    again = load_recipe(written(tmp_path, compare=json.loads(json.dumps(recipe.to_dict()["compare"]))))
    assert again.compare == recipe.compare
    assert load_recipe(written(tmp_path, compare={"random": {"method": {"name": "random"}}})).compare["random"]


def test_overrides(tmp_path: Path) -> None:
    path = written(tmp_path, method="mole", train={"steps": 800})
    recipe = load_recipe(path, ["train.steps=5", "train.learning_rate=1e-2", "method.scale=4", "compare=[sum, linear]"])
    assert (recipe.train.steps, recipe.train.learning_rate) == (5, 0.01)
    assert recipe.method.policy() == MoLE(scale=4)
    assert list(recipe.compare) == ["sum", "linear"]
    assert load_recipe(path, ["data.tasks.qa=zoo:sort/a_to_z"]).data.tasks.keys() == {"qa"}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.stepz=3", "recipe.yaml: train.stepz: unknown field 'stepz'; did you mean 'steps'?"),
        ("methd=mole", "methd: unknown field 'methd'; did you mean 'method'?"),
        ("method.name=mol", "method: unknown method 'mol'; did you mean 'mole'?"),
        ("method.scal=3", "method: unknown option of method 'mole' 'scal'; did you mean 'scale'?"),
        ("method.granularity=blok", "did you mean 'block'?"),
        ("data.metric=exact", "data.metric: unknown metric 'exact'"),
        ("data.tasks={qa: {trian: x}}", "data.tasks.qa.trian: unknown field 'trian'; did you mean 'train'?"),
        ("data={train: a, tasks: {qa: {test: b}}}", "data: expected either 'train' and 'test' or 'tasks'"),
        ("train.steps=-1", "train.steps: expected a number greater than or equal to 1, got -1"),
        ("train.learning_rate=.nan", "train.learning_rate: expected a finite number, got nan"),
        ("train.seeds=[1, 1]", "train.seeds: expected different numbers"),
        ("train=3", "train: expected fields, 'name: value', got 3"),
        ("base=null", "base: expected a valid string, got None"),
        ("experts={}", "experts: expected at least one expert, got none"),
        ("experts.qa=3", "experts.qa: expected a valid string, got 3"),
        ("experts.qa=zoo:nobody", "unknown bundled LoRA 'nobody'"),
        ("base.x=1", "override 'base.x=1': base is 'someone/base' and has no fields"),
        ("train.steps", "override 'train.steps': expected FIELD=VALUE"),
        ("train.steps=[", "override 'train.steps=[': the value is not YAML"),
    ],
)
def test_refusals_name_the_field_and_the_way_out(tmp_path: Path, override: str, said: str) -> None:
    message = refusal(tmp_path, override)
    assert said in message
    assert len(message.splitlines()) == 1


def test_every_problem_has_its_line(tmp_path: Path) -> None:
    lines = refusal(tmp_path, "train.stepz=1", "data.metric=nope", "generation.num_beams=0").splitlines()
    assert len(lines) == 3
    assert all(line.startswith(str(tmp_path / "recipe.yaml")) for line in lines)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\na: 2", "the field 'a' comes twice, line 2"),
        ("a: {b: 1, b: 2}", "the field 'b' comes twice"),
        ("- 1", "expected a recipe, 'base: ...' and so on, got [1]"),
        ("", "expected a recipe"),
        ("a: &x [1]\nb: *x", "references (*name) are not for recipes, line 2"),
        ("a: [", "not YAML"),
        ("a: !!python/object/apply:os.system [ls]", "not YAML: could not determine a constructor"),
        ("[" * 5000, "not YAML"),
        ("experts: {a: b}", "base: this field is missing"),
    ],
)
def test_files_that_are_no_recipes(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    with pytest.raises(LoraweaveError) as caught:
        load_recipe(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 500


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(LoraweaveError, match="no such recipe"):
        load_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(LoraweaveError, match="cannot read the recipe"):
        load_recipe(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"base: caf\xe9")
    with pytest.raises(LoraweaveError, match="not UTF-8"):
        load_recipe(tmp_path / "latin.yaml")
    (tmp_path / "large.yaml").write_bytes(b"#" * 1_000_001)
    with pytest.raises(LoraweaveError, match="larger than 1,000,000 bytes"):
        load_recipe(tmp_path / "large.yaml")


def test_what_was_set_survives_a_round_trip(tmp_path: Path) -> None:
    method = {"name": "mole", "granularity": "layer"}
    first = load_recipe(written(tmp_path, method=method, compare={"mine": {"name": "mole", "k": 3}}))
    content = json.loads(json.dumps(first.to_dict()))
    assert content["method"] == method
    assert Recipe.model_validate(content) == first


def test_the_schema_is_json_and_knows_every_field() -> None:
    schema = json.loads(recipe_schema())
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_valid_and_say_how_to_run_them(path: Path) -> None:
    recipe = load_recipe(path)
    assert len(recipe.experts) >= 2
    assert recipe.data.by_task() or recipe.images or len(recipe.compare) >= 3
    assert all(contender.method.policy().name for contender in recipe.compare.values())
    header = [line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#")]
    commands = [line for line in header if line.startswith("loraweave ")]
    assert commands
    assert all(f"examples/{path.name}" in command for command in commands)
