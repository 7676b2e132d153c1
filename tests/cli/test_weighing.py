"""``weights.json`` says what every method's gates give, and measures nothing twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import loraweave as lw
from loraweave.cli import building, main, weighing
from loraweave.evaluation.data import read_examples

METHODS = {"mole": lw.MoLE(), "wide": lw.MoLE(granularity="network"), "cat": lw.CAT(), "logo": lw.LoGo()}
COMPARE = (
    "compare={sum: {}, mole: {}, wide: {name: mole, granularity: network}, cat: {}, logo: {}, fresh_lora: {}, "
    "each: {name: cat, per_task: true}}"
)
Panels = dict[str, dict[str, list[float]]]


def command(recipe: Path, out: Path, *more: str) -> list[str]:
    return ["compare", str(recipe), "-o", str(out), COMPARE, "train.seeds=[0, 1]", *more]


@pytest.fixture(scope="module")
def out(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("weighed") / "out"
    assert main(command(world / "recipe.yaml", out)) == 0
    return out


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The policies whose weights were measured."""
    names: list[str] = []
    average = building.average_weights

    def noted(mixture: lw.Mixture, *arguments: Any, **options: Any) -> Panels:
        names.append(mixture.policy.name)
        return average(mixture, *arguments, **options)

    monkeypatch.setattr(weighing, "average_weights", noted)
    return names


def test_every_method_with_gates_is_weighed_as_it_was_trained(out: Path, world: Path) -> None:
    """Against gates that are read from their file and put on a fresh mixture; input by input."""
    found = json.loads((out / "weights.json").read_text())
    assert (found["method"], found["experts"]) == ("mole", ["colour", "size"])
    assert list(found["methods"]) == ["mole", "wide", "cat", "logo"], "those with gates for all tasks, in order"
    model, tokenizer = building.load_base(str(world / "base"))
    mixture = lw.attach(model, {name: str(world / "loras" / name) for name in found["experts"]})
    for label, of in found["methods"].items():
        mixture.policy = METHODS[label]
        file = out / "cells" / Path(of["cell"]).with_suffix(".safetensors")
        assert of["cell"].startswith(f"{label}-")
        assert ("-0-" in of["cell"]) == file.exists() == (label != "logo")
        learned = load_file(file) if file.exists() else {}
        for name, parameter in mixture.gate_parameters():
            parameter.data.copy_(learned[name])
        sites = [site.name for site in mixture.sites]
        for task in found["experts"]:
            inputs = [example.input for example in read_examples(world / f"{task}.jsonl")]
            (expected,) = building.average_weights(
                mixture, tokenizer, {task: inputs}, progress=False, max_new_tokens=3
            ).values()
            assert list(of["panels"][task]) == sites
            for site in sites:
                assert of["panels"][task][site] == pytest.approx(expected[site], abs=1e-5)
    assert found["methods"]["mole"]["panels"] != found["methods"]["cat"]["panels"]


def test_the_mixture_that_is_left_is_the_kept_one(out: Path) -> None:
    saved = json.loads((out / "mixture" / "mixture.json").read_text())
    assert (saved["method"]["name"], saved["method"]["granularity"]) == ("mole", lw.MoLE().granularity)
    gates = load_file(out / "mixture" / "gates.safetensors")
    (cell,) = (out / "cells").glob("mole-*-0-*.safetensors")
    assert {name: tensor.tolist() for name, tensor in gates.items()} == {
        name: tensor.tolist() for name, tensor in load_file(cell).items()
    }


def test_only_what_is_new_is_measured(out: Path, recipe: Path, measured: list[str]) -> None:
    before = (out / "weights.json").read_text()
    assert main(command(recipe, out)) == 0
    assert measured == []
    assert (out / "weights.json").read_text() == before
    assert main(command(recipe, out, "compare.cat={name: cat, train: {steps: 1}}")) == 0
    assert measured == ["cat"]
    assert json.loads((out / "weights.json").read_text())["methods"]["mole"] == json.loads(before)["methods"]["mole"]
    (out / "weights.json").write_text("{}")
    assert main(command(recipe, out)) == 0
    assert measured == ["cat", "mole", "cat", "logo", "mole"]
    assert (out / "weights.json").read_text() == before


def test_fresh_cells_are_measured_anew(recipe: Path, tmp_path: Path) -> None:
    """The same cells by name, from gates that another version may have trained otherwise."""
    fit = ["compare", str(recipe), "-o", str(tmp_path / "out"), "compare={mole: {}}", "train.seeds=[0]"]
    assert main(fit) == 0
    path = tmp_path / "out" / "weights.json"
    found = json.loads(path.read_text())
    (task, *_) = panels = found["methods"]["mole"]["panels"]
    path.write_text(json.dumps(found | {"methods": {"mole": found["methods"]["mole"] | {"panels": {task: {}}}}}))
    assert main([*fit, "--fresh"]) == 0
    assert json.loads(path.read_text())["methods"]["mole"]["panels"].keys() == panels.keys()


def test_without_gates_the_kept_method_alone_is_shown(recipe: Path, tmp_path: Path) -> None:
    assert main(["compare", str(recipe), "-o", str(tmp_path / "out"), "compare={linear: {}, sum: {}}"]) == 0
    found = json.loads((tmp_path / "out" / "weights.json").read_text())
    assert list(found["methods"]) == ["linear"]
    assert {tuple(w) for sites in found["methods"]["linear"]["panels"].values() for w in sites.values()} == {(0.5, 0.5)}
    assert main(["compare", str(recipe), "-o", str(tmp_path / "none"), "compare={random: {}}"]) == 0
    found = json.loads((tmp_path / "none" / "weights.json").read_text())
    assert (found["method"], list(found["methods"]), found["methods"]["sum"]["cell"]) == ("sum", ["sum"], None)
