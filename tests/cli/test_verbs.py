"""Every verb on real tiny models, in this process."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraweave.cli import main

Run = Callable[..., str]

# What learns the tiny world's two tasks for certain.
LEARNER = "{name: mole, granularity: matrix, scale: 1}"
ENOUGH = ("steps=60", "learning_rate=0.05", "batch_size=16")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command that must succeed; returns what it printed."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        assert code == 0, said.err
        return said.out

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command that must be refused; returns the line that says why."""

    def refused(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 2
        said = capsys.readouterr().err.splitlines()
        assert said[-1].startswith("error: ")
        return said[-1]

    return refused


# ---------------------------------------------------------------- inspect


def test_inspect_tables_and_json(run: Run, world: Path) -> None:
    loras = [world / "loras" / name for name in ("colour", "size")]
    table = run("inspect", *loras)
    assert "colour" in table
    assert "size" in table
    assert "peft" in table
    reports = json.loads(run("inspect", *loras, "--json"))
    assert [report["source"] for report in reports] == [str(path) for path in loras]
    assert reports[0]["ranks"] == {"4": 16}
    assert reports[0]["mixable"] is True


def test_inspect_shows_what_it_can_and_then_refuses(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(world / "loras/size"), str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == 2
    said = capsys.readouterr()
    assert len(json.loads(said.out)) == 1
    assert [line.partition(":")[0] for line in said.err.splitlines()] == ["error", "error"]


# ---------------------------------------------------------------- train


def test_training_learns_which_expert_to_use(run: Run, recipe: Path, world: Path, tmp_path: Path) -> None:
    place = tmp_path / "mixture"
    out = run("train", recipe, "-o", place, f"method={LEARNER}", *(f"train.{name}" for name in ENOUGH))
    assert "60 steps on 32 examples" in out
    answers = run("generate", place, "--input", "say colour fig fig", "say size fig fig")
    assert answers == "red\nlarge\n"
    saved = json.loads((place / "mixture.json").read_text())
    assert saved["method"]["granularity"] == "matrix"


def test_the_seed_decides_training(run: Run, recipe: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("train", recipe, "-o", tmp_path / name, f"train.seed={seed}")
    gates = {name: (tmp_path / name / "gates.safetensors").read_bytes() for name in "abc"}
    assert gates["a"] == gates["b"] != gates["c"]


def test_a_mixture_finds_its_base_from_anywhere(
    run: Run, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    run("train", "recipe.yaml", "-o", tmp_path / "mixture", "train.steps=1")
    monkeypatch.chdir(tmp_path)
    assert run("generate", "mixture", "--input", "say size fig", "--only", "size") == "large\n"


def test_methods_without_gates_are_saved_as_they_are(run: Run, recipe: Path, tmp_path: Path) -> None:
    assert "'sum' has nothing to train" in run("train", recipe, "-o", tmp_path / "sum", "method={name: sum}")
    assert run("generate", tmp_path / "sum", "--input", "say size nut nut", "--only", "size") == "large\n"


def test_an_interrupted_training_goes_on(run: Run, recipe: Path, tmp_path: Path) -> None:
    settings = ("--checkpoints", tmp_path / "ckpt", "train.batch_size=16")
    run("train", recipe, "-o", tmp_path / "half", *settings, "train.steps=4")
    last = max((tmp_path / "ckpt").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    assert last.name == "checkpoint-4"
    assert "6 steps" in run("train", recipe, "-o", tmp_path / "whole", *settings, "train.steps=6")


def test_training_refuses_before_it_works(refused: Run, recipe: Path, world: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    assert "'thesis.tex'" in refused("train", recipe, "-o", tmp_path / "mine")
    out = tmp_path / "out"
    assert "no such data file" in refused("train", recipe, "-o", out, "data.tasks.size.train=nowhere.jsonl")
    assert "names no training data" in refused("train", recipe, "-o", out, "data={}")
    assert "base model 'nowhere'" in refused("train", recipe, "-o", out, "base=nowhere")
    assert "base model '/nowhere': no such folder" in refused("train", recipe, "-o", out, "base=/nowhere")
    assert "unknown field 'stepz'" in refused("train", recipe, "-o", out, "train.stepz=1")
    assert "no such folder" in refused("train", recipe, "-o", out, "experts.size=/nowhere/at/all")
    (tmp_path / "empty.jsonl").touch()
    assert "is empty" in refused("train", recipe, "-o", out, f"data.tasks.size.train={tmp_path / 'empty.jsonl'}")
    assert not out.exists()


# ---------------------------------------------------------------- generate


def test_generate_reads_texts_files_and_standard_input(
    run: Run, mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["say colour fig nut", "say size nut nut"]
    direct = run("generate", mixture, "--input", *texts)
    assert len(direct.splitlines()) == 2
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"input": text}) + "\n\n" for text in texts))
    (tmp_path / "in.txt").write_text("\n".join(texts))
    assert run("generate", mixture, "--file", tmp_path / "in.jsonl") == direct
    assert run("generate", mixture, "--file", tmp_path / "in.txt") == direct
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(texts)))
    assert run("generate", mixture) == direct
    rows = [json.loads(line) for line in run("generate", mixture, "--input", *texts, "--json").splitlines()]
    assert [row["input"] for row in rows] == texts
    assert [row["output"] for row in rows] == direct.splitlines()


def test_generate_masks_and_takes_settings(run: Run, mixture: Path) -> None:
    text = "say colour fig nut"
    assert run("generate", mixture, "--input", text, "--only", "colour") == "red\n"
    assert run("generate", mixture, "--input", text, "--without", "colour") == "large\n"
    assert run("generate", mixture, "--input", text, "--only", "colour", "--num-beams", "2") == "red\n"


def test_generate_refusals(refused: Run, mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = ("generate", mixture, "--input", "say size fig")
    assert "unknown expert 'colr'; did you mean 'colour'?" in refused(*ask, "--only", "colr")
    assert "every expert is masked" in refused(*ask, "--without", "colour", "size")
    assert "cannot read the inputs" in refused("generate", mixture, "--file", tmp_path / "nowhere.txt")
    (tmp_path / "bad.jsonl").write_text('{"input": "a"}\n{"text": "b"}\n')
    assert "bad.jsonl:2: expected an object with the text 'input'" in refused(
        "generate", mixture, "--file", tmp_path / "bad.jsonl"
    )
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert "standard input: no input" in refused("generate", mixture)
    assert "holds no mixture.json" in refused("generate", tmp_path, "--input", "x")


# ---------------------------------------------------------------- evaluate


def test_evaluate_scores_every_task(run: Run, mixture: Path, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    table = run("evaluate", mixture, "--data", recipe, "-o", out, "--limit", 5, "--only", "size", "--max-new-tokens", 3)
    assert "mean" in table
    result: dict[str, Any] = json.loads(out.read_text())
    assert {name: row["score"] for name, row in result["tasks"].items()} == {"colour": 0.0, "size": 100.0}
    assert result["only"] == ["size"]
    assert result["tasks"]["size"]["n"] == 5
    assert result["tasks"]["size"]["answers"][0]["output"] == "large"
    assert result["versions"]["loraweave"]


def test_evaluate_takes_a_file_or_a_recipe(run: Run, mixture: Path, recipe: Path, world: Path, tmp_path: Path) -> None:
    one = json.loads(run("evaluate", mixture, "--data", world / "size.jsonl", "--metric", "rouge1", "--json"))
    assert one["tasks"].keys() == {"size"}
    assert one["tasks"]["size"]["metric"] == "rouge1"
    named = f"{{'[/x]': {{test: {world / 'size.jsonl'}}}}}"
    odd = tmp_path / "odd.yaml"
    odd.write_text(recipe.read_text().split("data:")[0] + f"data: {{tasks: {named}}}\n")
    assert "[/x]" in run("evaluate", mixture, "--data", odd)
    whole = json.loads(run("evaluate", recipe, "--json"))
    assert whole["tasks"].keys() == {"colour", "size"}
    assert whole["generation"]["max_new_tokens"] == 3


# ---------------------------------------------------------------- plot


def test_plot_draws(run: Run, refused: Run, mixture: Path, recipe: Path, tmp_path: Path) -> None:
    run("plot", mixture, "-o", tmp_path / "one.png", "--input", "say size fig fig")
    run("plot", mixture, "-o", tmp_path / "tasks.png", "--data", recipe, "--title", "weights")
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "tasks.png").stat().st_size > (tmp_path / "one.png").stat().st_size
    assert "give --input TEXT or --data FILE" in refused("plot", mixture, "-o", tmp_path / "none.png")
    assert "ends in .png" in refused("plot", mixture, "-o", tmp_path / "none.doc", "--input", "say size fig")
    assert not (tmp_path / "none.png").exists()


def test_plot_of_weights_that_no_input_changes_needs_none(
    run: Run, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loraweave.reporting import plots

    drawn: list[Any] = []
    draw = plots.heat_maps
    monkeypatch.setattr(plots, "heat_maps", lambda panels, *rest: (drawn.append(panels), draw(panels, *rest)))
    told = (world / "recipe.yaml").read_text().partition("data:")[0].replace("mole", "cat")
    (world / "cat.yaml").write_text(told)
    run("plot", world / "cat.yaml", "-o", tmp_path / "cat.png")
    ((panel,),) = [list(panels.values()) for panels in drawn]
    assert len(panel) > 1
    for weights in panel.values():
        assert weights == pytest.approx([1 / len(weights)] * len(weights))


# ---------------------------------------------------------------- compare


def test_compare_leaves_results_picture_and_mixture(run: Run, recipe: Path, world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    few = f"compare={{sum: {{}}, mole: {LEARNER}, early: {{name: mole, train: {{steps: 2}}}}}}"
    table = run("compare", recipe, "-o", out, few, "train.seeds=[0, 1]", *(f"train.{name}" for name in ENOUGH))
    assert "retention" in table
    results = json.loads((out / "results.json").read_text())
    assert results["retention"].keys() == {"base", "only:colour", "only:size", "sum", "mole", "early"}
    assert results["own"] == {"colour": 100.0, "size": 100.0}
    assert results["retention"]["only:size"]["mean"] == 0.5
    assert min(results["retention"]["mole"]["per_seed"]) > 0.8
    assert results["retention"]["sum"]["mean"] < 0.8
    assert results["seeds"] == [0, 1]
    assert results["recipe"]["compare"]["early"]["train"] == {"steps": 2}
    assert {"seconds", "peak_memory_gb", "versions", "scores", "machine"} <= results.keys()
    assert (out / "weights.png").read_bytes().startswith(b"\x89PNG")
    assert run("generate", out / "mixture", "--input", "say size fig fig") == "large\n"
    assert "| mole |" in (out / "mixture" / "README.md").read_text()


def test_compare_without_owners_takes_the_best_expert_as_yardstick(
    run: Run, recipe: Path, world: Path, tmp_path: Path
) -> None:
    data = f"data={{train: {world / 'size.jsonl'}, test: {world / 'size.jsonl'}}}"
    run("compare", recipe, "-o", tmp_path / "out", data, "train.steps=1")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["own"] == {"test": 100.0}
    assert list(results["retention"]) == ["base", "only:colour", "only:size", "sum", "linear", "mole"]


def test_compare_refuses_what_is_not_its_own(refused: Run, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    assert "'thesis.tex'" in refused("compare", recipe, "-o", tmp_path)
    assert "names no test data" in refused("compare", recipe, "-o", tmp_path / "out", "data={}")


def test_compare_takes_every_rival(run: Run, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    names = ["lorahub", "cat", "lora_flow", "arrow", "logo", "fresh_lora", "random", "best_single"]
    rivals = "{lorahub: {evaluations: 12}, fresh_lora: {learning_rate: 0.03, train: {steps: 30}}, "
    rivals += "cat: {train: {steps: 4}}, lora_flow: {train: {steps: 4}}, arrow: {k: 1}, logo: {}, random: {}, "
    run("compare", recipe, "-o", out, f"compare={rivals}best_single: {{}}}}", "train.batch_size=16")
    results = json.loads((out / "results.json").read_text())
    assert set(results["retention"]) == {"base", "only:colour", "only:size", *names}
    assert results["retention"]["fresh_lora"]["mean"] > 0.9
    assert results["retention"]["best_single"]["mean"] == 0.5
    assert json.loads((out / "mixture" / "mixture.json").read_text())["method"]["name"] == "cat"
    assert results["recipe"]["compare"]["arrow"]["method"] == {"name": "arrow", "k": 1}


def test_a_search_is_trained_and_saved_as_a_sum(run: Run, recipe: Path, tmp_path: Path) -> None:
    out = run("train", recipe, "-o", tmp_path / "hub", "method={name: lorahub, evaluations: 5, examples: 7}")
    assert "5 evaluations on 7 examples" in out
    saved = json.loads((tmp_path / "hub" / "mixture.json").read_text())
    assert saved["method"]["name"] == "sum"
    assert set(saved["method"]["weights"]) == {"colour", "size"}


def test_compare_knows_its_contestants(refused: Run, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "did you mean 'fresh_lora'?" in refused("compare", recipe, "-o", out, "compare=[fresh_lor]")
    assert "unknown option of method 'fresh_lora' 'rnk'; did you mean 'rank'?" in refused(
        "compare", recipe, "-o", out, "compare={fresh_lora: {rnk: 3}}"
    )
    assert "unknown method 'random'" in refused("train", recipe, "-o", out, "method=random")
