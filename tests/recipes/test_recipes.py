"""Every shipped recipe: right in every field, and what it says is what the papers say."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from pathlib import Path

import pytest

import loraweave as lw
from loraweave.cli import main
from loraweave.recipe import load_recipe
from loraweave.recipe.needs import needs

ROOT = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(ROOT.glob("**/*.yaml"))
SMALL = [path for path in RECIPES if "\nsmall:" in path.read_text()]
COMPOSLORA = {style: ROOT / "composlora" / f"{style}.yaml" for style in ("anime", "reality")}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_recipe_is_right(path: Path) -> None:
    recipe = load_recipe(path)
    found = needs(recipe, path.parent)
    # Whatever is not here comes from the hub, or the recipe says where from.
    assert not [need for need in found if need.state == "missing" and need.origin is None]
    for pattern in recipe.origins:
        assert any(need.origin == recipe.origins[pattern] for need in found), f"{pattern} is of no use"
    # Every command in the header parses to this very file.
    commands = re.findall(r"^#   (loraweave .*?)(?:  #.*)?$", path.read_text(), re.MULTILINE)
    assert commands
    assert all(command.split()[2] == f"recipes/{name(path)}" for command in commands if " judge " not in command)


@pytest.mark.parametrize("path", SMALL, ids=name)
def test_small_form_needs_nothing_that_is_not_bundled(path: Path) -> None:
    recipe = load_recipe(path, small=True)
    assert {need.state for need in needs(recipe, path.parent)} == {"bundled"}
    assert "small" not in recipe.to_dict()


def test_every_table_is_there() -> None:
    there = {path.relative_to(ROOT / "mole").parts[0].removesuffix(".yaml") for path in ROOT.glob("mole/**/*.yaml")}
    assert there == {*(f"table{n:02d}" for n in range(1, 11)), "figure05", "figure07"}
    counts = Counter(path.parent.name for path in ROOT.glob("mole/*/*.yaml"))
    assert counts == {"table01": 15, "table02": 4, "table03": 5, "table06": 4, "table10": 4}


# The paper's own: its averages are not the means of what it prints.
SLIPS = {"mole/table03/bbh.yaml": {"lorahub", "pem", "mole"}, "mole/table03/translation.yaml": {"pem"}}


def averaged() -> list[Path]:
    published = {path: load_recipe(path).published for path in RECIPES}
    return [path for path, table in published.items() if table and any("average" in s for s in table.scores.values())]


@pytest.mark.parametrize("path", averaged(), ids=name)
def test_printed_averages_are_near_the_mean_of_what_was_printed(path: Path) -> None:
    """Catches slips of copying."""
    published = load_recipe(path).published
    assert published is not None
    for method, scores in published.scores.items():
        figures = [value for column, value in scores.items() if column != "average"]
        if figures and method not in SLIPS.get(name(path), ()):
            assert scores["average"] == pytest.approx(sum(figures) / len(figures), abs=0.15), method


@pytest.mark.parametrize("style", COMPOSLORA)
def test_composlora_sets(style: str) -> None:
    """240 sets a style: a character of three, with one of two in 1 to 4 of four other categories."""
    testbed = load_recipe(COMPOSLORA[style]).testbed
    assert testbed is not None
    sets = testbed.sets()
    assert Counter(len(one.experts) for one in sets) == {2: 24, 3: 72, 4: 96, 5: 48}
    slow = {
        frozenset(chosen)
        for size in (2, 3, 4, 5)
        for chosen in itertools.combinations(testbed.elements, size)
        if sum(testbed.elements[name].category == "character" for name in chosen) == 1
        and len({testbed.elements[name].category for name in chosen}) == size
    }
    assert len(sets) == len(slow) == 240
    assert {frozenset(one.experts) for one in sets} == slow
    assert len({one.id for one in sets}) == 240


def test_composlora_as_a_whole() -> None:
    recipes = [load_recipe(path) for path in COMPOSLORA.values()]
    assert sum(len(recipe.experts) for recipe in recipes) == 22
    sets = [one for recipe in recipes if recipe.testbed for one in recipe.testbed.sets()]
    assert len(sets) == 480
    assert Counter(len(one.experts) for one in sets) == {2: 48, 3: 144, 4: 192, 5: 96}
    for recipe in recipes:
        categories = Counter(element.category for element in recipe.testbed.elements.values())  # type: ignore[union-attr]
        assert categories == {"character": 3, "clothing": 2, "style": 2, "background": 2, "object": 2}
        assert len(set(recipe.origins.values())) == 11
        assert all(place.startswith("https://civitai.com/models/") for place in recipe.origins.values())


def test_validate_says_what_is_missing_and_where_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(COMPOSLORA["anime"])
    assert main(["validate", path]) == 2
    said = capsys.readouterr()
    assert "240 (24 of 2, 72 of 3, 96 of 4, 48 of 5)" in said.out
    assert (
        "missing: loras/anime/character_1.safetensors (experts.character_1); "
        "from https://civitai.com/models/20346?modelVersionId=24191"
    ) in said.out
    assert "error: 11 files or folders are missing" in said.err
    assert main(["validate", path, "--fields"]) == 0


def test_sets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["testbed", str(COMPOSLORA["anime"]), "--set", "character_3+object_2"]) == 0
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert row["prompts"] == [
        "masterpiece, best quality, son goku, spiked hair, muscular male, wristband, toast, toast in mouth"
    ]
    assert row["elements"][1] == {"name": "object (toast in the mouth)", "features": ["toast", "toast in mouth"]}
    assert main(["testbed", str(COMPOSLORA["anime"]), "--limit", "10"]) == 0
    rows = list(map(json.loads, capsys.readouterr().out.splitlines()))
    assert Counter(len(row["experts"]) for row in rows) == {2: 1, 3: 3, 4: 4, 5: 2}
    assert main(["testbed", str(COMPOSLORA["anime"]), "--set", "character_3+object_9"]) == 2
    assert "did you mean" in capsys.readouterr().err


@pytest.mark.slow
def test_a_small_form_runs_with_the_papers_figures_beside_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    quick = ["train.steps=2", "train.seeds=[0]", "data.train_items=6", "data.test_items=3", "train.batch_size=6"]
    assert main(["compare", str(ROOT / "mole" / "table04.yaml"), "--small", "-o", str(tmp_path / "4"), *quick]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "MoLE, Table 4 (EM): figures of the paper, and ours on the bundled zoo" in said
    assert re.search(r"average\s+77\.6\s+[\d.]+\s+76\.5\s+[\d.]+", said)
    assert main(["compare", str(ROOT / "mole" / "figure05.yaml"), "--small", "-o", str(tmp_path / "5"), *quick]) == 0
    results = json.loads((tmp_path / "5" / "results.json").read_text())
    share = results["largest_weight"]["mole_without_balance"]["mean"]
    assert f"largest_weight 68.0 {share:.1f}" in " ".join(capsys.readouterr().out.split())
    assert {"mole", "mole_without_balance"} <= results["scores"].keys()


@pytest.mark.slow
@pytest.mark.parametrize("path", SMALL, ids=name)
def test_every_small_form_runs(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path, small=True)
    if recipe.testbed is not None:
        assert main(paint_small(path, tmp_path)) == 0
        scores = json.loads((tmp_path / "alignment.json").read_text())["scores"]
        assert list(scores) == list(recipe.compare)
        assert all(("image_alignment" in of_method) == (path in GATED) for of_method in scores.values())
        return
    quick = ["train.steps=2", "train.seeds=[0]", "data.train_items=8", "data.test_items=10"]
    assert main(["compare", str(path), "--small", "-o", str(tmp_path / "out"), *quick]) == 0


def paint_small(path: Path, out: Path) -> list[str]:
    """The smallest run of a test bed's small form."""
    quick = ["--limit", "1", "testbed.steps=1", "testbed.seeds=[0]"]
    if load_recipe(path, small=True).images is not None:
        quick += ["train.steps=1", "train.batch_size=1", "images.steps=1"]
    return ["testbed", str(path), "--small", "-o", str(out), "--clip", "zoo:images/clip-metrics", *quick]


@pytest.mark.slow
def test_a_table_of_pictures_runs_in_its_small_form(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    path = ROOT / "mole" / "table02" / "n3.yaml"
    assert main([*paint_small(path, tmp_path), 'testbed.prompts=["a {tengu} in a {faerie}, with a {quarter}"]']) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "1 sets by nla, sum, svdiff, mole, mole_ours: 5 pictures" in said
    assert "MoLE, Table 2: 3 concepts (CLIP): figures of the paper, and ours on the bundled zoo" in said
    told = json.loads((tmp_path / "alignment.json").read_text())
    ours = told["scores"]
    assert list(told["costs"]) == ["mole", "mole_ours"]
    assert len(ours["mole"]) == 5  # text, three elements, and their mean
    for column, nla, mole in (("text_alignment", "0.678", "0.759"), ("image_alignment", "0.694", "0.757")):
        first, last = (f"{ours[method][column]:.3f}" for method in ("nla", "mole"))
        assert re.search(f"{column} {nla} {first} .* {mole} {last} ", said), column
    (row,) = map(json.loads, (tmp_path / "pictures.jsonl").read_text().splitlines())
    assert row["prompt"] == "a kenku tengu in a sylva faerie mail, with a mirel quartered shield"


PICTURED = [path for path in SMALL if "base: zoo:images" in path.read_text()]
GATED = [path for path in PICTURED if path.is_relative_to(ROOT / "mole")]


@pytest.mark.parametrize("path", GATED, ids=name)
def test_tables_of_pictures_train_and_paint_mole(path: Path) -> None:
    """In the paper's form beside the library's own, on prompts that are not painted; scored by texts and pictures."""
    full, small = load_recipe(path), load_recipe(path, small=True)
    levels = ["m_mole", "l_mole", "b_mole", "n_mole"] if path.stem == "table09" else ["mole"]
    assert list(full.compare) == ["nla", "sum", *levels, "mole_ours"]
    assert list(small.compare) == ["nla", "sum", *([] if path.stem == "table09" else ["svdiff"]), *levels, "mole_ours"]
    assert full.published is not None
    assert set(levels) <= set(full.published.scores)
    for recipe in (full, small):
        policies = [recipe.compare[level].method.policy() for level in levels]
        grains = ["matrix", "layer", "block", "network"] if len(levels) > 1 else ["block"]
        assert policies == [lw.MoLE.paper(granularity=grain) for grain in grains]
        assert recipe.compare["mole_ours"].method.policy() == lw.MoLE(activation="sigmoid")
        assert recipe.images is not None
        assert recipe.testbed is not None
        (chosen,) = recipe.testbed.sets()
        painted = recipe.testbed.prompts_of(chosen)
        assert len(recipe.images.prompts) >= 5
        assert not set(recipe.images.prompts) & set(painted)
        words = [word for element in recipe.testbed.elements.values() for word in element.triggers]
        assert all(word in prompt for prompt in recipe.images.prompts for word in words)
        assert recipe.images.guidance == recipe.testbed.guidance
        assert recipe.images.steps == recipe.testbed.steps
    trained = full.training(levels[0], full.compare[levels[0]])
    assert (trained.steps, trained.learning_rate, trained.batch_size) == (400, 1e-5, 2)
    assert full.training("mole_ours", full.compare["mole_ours"]).learning_rate is None
    assert full.images is not None
    assert set(full.images.concepts) == set(full.names)
    assert small.images is not None
    assert small.images.clip == "zoo:images/clip-objective"
    assert small.testbed is not None
    assert {n: e.references for n, e in small.testbed.elements.items()} == small.experts
    assert small.experts == {n: f"zoo:images/{n}" for n in small.names}
    if "svdiff" in small.compare:
        assert small.compare["svdiff"].svdiff == {n: f"zoo:images/shifts/{n}" for n in small.names}


@pytest.mark.parametrize("path", PICTURED, ids=name)
def test_small_test_beds_name_their_loras_by_the_words_that_call_them(path: Path) -> None:
    from loraweave.zoo import images

    small, full = load_recipe(path, small=True), load_recipe(path)
    assert small.testbed is not None
    assert full.testbed is not None
    known = images.skills()
    assert {n: e.triggers for n, e in small.testbed.elements.items()} == {n: (known[n]["words"],) for n in small.names}
    assert [len(one.experts) for one in small.testbed.sets()] == [len(one.experts) for one in full.testbed.sets()]
    layers = [known[name]["layer"] for one in small.testbed.sets() for name in one.experts if not full.testbed.sizes]
    assert len(set(layers)) == len(layers)
    assert len({one for chosen in small.testbed.sets() for one in small.testbed.prompts_of(chosen)}) >= 5


def test_no_small_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "recipe.yaml"
    place.write_text("base: someone/base\nexperts: [someone/lora]\n")
    assert main(["compare", str(place), "--small", "-o", str(tmp_path / "out")]) == 2
    assert "has no small form (section 'small')" in capsys.readouterr().err
