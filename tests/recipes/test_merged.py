"""Experts that a recipe makes by merging others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import loraweave as lw
from loraweave.recipe import Recipe, load_recipe

BOTH = {"method": "ties", "experts": {"a": "zoo:notice", "b": "zoo:polite"}, "density": 0.3, "weights": {"a": 0.5}}
LESS = {"arithmetic": "a - 0.4*b", "experts": {"a": "zoo:notice", "b": "zoo:polite"}, "space": "factors"}
CONTENT: dict[str, Any] = {
    "base": "zoo",
    "experts": {"days": "zoo:days_before"},
    "merged": {"both": BOTH, "less": LESS},
}


def written(folder: Path, **fields: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(CONTENT | fields, sort_keys=False))
    return path


def test_merged_experts_follow_the_others(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path))
    assert recipe.names == ["days", "both", "less"]
    sources = recipe.sources()
    assert list(sources) == recipe.names
    assert sources["days"] == "zoo:days_before"
    zoo = {"a": "zoo:notice", "b": "zoo:polite"}
    for name, expected in (
        ("both", lw.merge(zoo, "ties", density=0.3, weights={"a": 0.5})),
        ("less", lw.arithmetic("a - 0.4*b", zoo, space="factors")),
    ):
        merged = sources[name]
        assert isinstance(merged, lw.Expert)
        assert merged.name == name
        assert all(torch.equal(f.A, expected.factors[path].A) for path, f in merged.factors.items())


def test_a_recipe_of_merged_experts_alone(tmp_path: Path) -> None:
    tasks = {"both": {"test": "zoo:record/notice"}, "other": {"test": "zoo:record/polite", "expert": "less"}}
    recipe = load_recipe(written(tmp_path, experts={}, data={"tasks": tasks}))
    assert recipe.own_tasks() == {"both": "both", "other": "less"}
    assert Recipe.model_validate(recipe.to_dict()) == recipe


def test_sources_are_relative_to_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "loras" / "a").mkdir(parents=True)
    merged = {"both": {"method": "concat", "experts": {"a": "loras/a", "b": "someone/b"}}}
    recipe = load_recipe(written(tmp_path, merged=merged))
    assert recipe.merged["both"].experts == {"a": str(tmp_path / "loras/a"), "b": "someone/b"}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "merged.both.denisty=3",
            "merged.both: unknown option of merging method 'ties' 'denisty'; did you mean 'density'",
        ),
        ("merged.both.density=3", "merged.both: ties density: expected a share above 0"),
        ("merged.both.method=tise", "merged.both: unknown merging method 'tise'; did you mean 'ties'?"),
        ("merged.both.arithmetic=a", "merged.both: expected either 'method' or 'arithmetic'"),
        ("merged.both.experts={}", "merged.both: expected at least one expert, got none"),
        ("merged.both.weights.q=1", "merged.both: unknown expert 'q' (known: a, b)"),
        ("merged.both.weights.a=x", "merged.both.weights.a: expected a valid number"),
        ("merged.less.weights={a: 2}", "merged.less: weights: they go with a method"),
        ("merged.less.foo=1", "merged.less: unknown option of arithmetic 'foo' (known: space)"),
        ("merged.less.space=delt", "merged.less: unknown arithmetic space 'delt'; did you mean 'delta'?"),
        ("merged.less.arithmetic=a - q", "merged.less: unknown expert 'q'"),
        ("merged.less.arithmetic=a -", "merged.less: expression 'a -', character 4: not an expression"),
        ("merged.both.experts=3", "merged.both.experts: expected fields"),
        ("experts.both=zoo:notice", "merged: a merged expert has the name of another expert"),
        ("merged=3", "merged: expected fields"),
    ],
)
def test_refusals_name_the_field(tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(lw.LoraweaveError) as caught:
        load_recipe(written(tmp_path), [override])
    assert f"recipe.yaml: {said}" in str(caught.value)
    assert "\n" not in str(caught.value)
