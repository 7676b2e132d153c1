"""``loraweave merge`` on LoRAs that peft wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import loraweave as lw
from loraweave.cli import app, main
from loraweave.transforms import registry


@pytest.fixture
def here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder beside links to the two LoRAs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loras").symlink_to(world / "loras")
    return tmp_path


def same(written: str | Path, expected: lw.Expert) -> None:
    read = lw.read_expert(written)
    assert read.factors.keys() == expected.factors.keys()
    for path, factors in expected.factors.items():
        assert torch.equal(read.factors[path].A, factors.A)
        assert torch.equal(read.factors[path].B, factors.B)


LORAS = {"colour": "loras/colour", "size": "loras/size"}


def test_a_method_with_options_and_weights(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--set", "density=0.3", "--set", "rank=3", "--weight", "size=0.5"]
    assert main(["merge", "ties", "loras/colour", "loras/size", "-o", "merged", *options]) == 0
    same("merged", lw.merge(LORAS, "ties", density=0.3, rank=3, weights={"size": 0.5}))
    said = capsys.readouterr().out
    assert "ties of colour, size (density=0.3, space=delta, rank=3): 16 modules, rank 3" in said
    assert "written to merged" in said


def test_arithmetic(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", "colour - 0.4*size", "loras/colour", "loras/size", "-o", "less"]) == 0
    same("less", lw.arithmetic("colour - 0.4*size", LORAS))
    assert "colour - 0.4*size (space=delta): 16 modules, rank 8" in capsys.readouterr().out
    named = ["--expert", "a=loras/colour", "--expert", "b=loras/size", "--set", "space=factors"]
    assert main(["merge", "(a + b) / 2", *named, "-o", "mean"]) == 0
    same("mean", lw.arithmetic("(a + b) / 2", {"a": LORAS["colour"], "b": LORAS["size"]}, space="factors"))
    assert "space=factors" in capsys.readouterr().out
    assert main(["merge", "a", *named, "-o", "one"]) == 0


def test_loras_may_stand_behind_options(here: Path) -> None:
    assert main(["merge", "concat", "-o", "both", "loras/colour", "--weight", "size=2", "loras/size"]) == 0
    same("both", lw.merge(LORAS, "concat", weights={"size": 2.0}))


def test_overwriting_is_asked_for(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "out").mkdir()
    (here / "out" / "notes.txt").write_text("mine")
    command = ["merge", "concat", "loras/colour", "-o", "out"]
    assert main(command) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    assert sorted(path.name for path in (here / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "notes.txt",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("tise loras/colour -o out", "unknown merging method 'tise'; did you mean 'ties'?"),
        ("ties -o out", "no LoRA to merge; name some"),
        ("ties loras/colour", "the following arguments are required: -o/--out"),
        ("ties loras/nowhere -o out", "loras/nowhere: no such folder here"),
        ("ties loras/colour loras/colour -o out", "two LoRAs would be called 'colour'; give names: --expert"),
        ("ties --expert loras/colour -o out", "--expert loras/colour: expected NAME=LORA"),
        ("ties loras/colour -o out --set density", "--set density: expected OPTION=VALUE"),
        ("ties loras/colour -o out --set density=2", "ties density: expected a share above 0 and at most 1, got 2"),
        ("ties loras/colour -o out --set densty=1", "did you mean 'density'?"),
        ("ties loras/colour -o out --set rank=1 --set rank=2", "--set rank=2: 'rank' is set twice"),
        ("ties loras/colour -o out --weight size=1", "unknown expert 'size' (known: colour)"),
        ("ties loras/colour -o out --weight colour=x", "--weight colour=x: expected a number, got 'x'"),
        ("ties loras/colour -o out --weight colour=1 --weight colour=2", "'colour' is weighed twice"),
        ("ties loras/colour -o out --weight colour=nan", "expected a finite number, got nan"),
        ("colour-size loras/colour -o out", "unknown expert 'size' (known: colour)"),
        ("colour* loras/colour -o out", "expression 'colour*', character 8: not an expression"),
        ("2*colour loras/colour -o out --weight colour=2", "--weight goes with a method; write the weights into"),
        ("2*colour loras/colour -o out --set density=2", "--set density: an expression has the option 'space' alone"),
        ("ties loras/colour -o out --wieght colour=2", "argument '--wieght' is one too many"),
    ],
)
def test_misuse_is_one_line_and_leaves_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: str, said: str
) -> None:
    assert main(["merge", *arguments.split()]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert said in shown.err
    assert shown.err.count("\n") == 1
    assert [path.name for path in here.iterdir()] == ["loras"]


def test_a_recipe_with_merged_experts(world: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What ``train`` saves holds the merged experts, which are nowhere else."""
    recipe = here / "recipe.yaml"
    recipe.write_text(
        f"base: {world}/base\nexperts: {{}}\nmethod: sum\n"
        "merged: {both: {method: knots, experts: {colour: loras/colour, size: loras/size}, density: 0.5}}\n"
        f"data: {{tasks: {{both: {{test: {world}/size.jsonl}}}}}}\ngeneration: {{max_new_tokens: 3}}\n"
    )
    assert main(["evaluate", str(recipe)]) == 0
    assert main(["train", str(recipe), "-o", "mixture"]) == 0
    mixture = lw.load("mixture")
    assert mixture.experts == ("both",)
    same("mixture/experts/both", lw.merge(LORAS, "knots", density=0.5))


def test_help_names_every_method_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        app.main(["merge", "--help"])
    shown = capsys.readouterr().out.partition("methods (")[2]
    lines = {line.split()[0]: line for line in shown.splitlines()[1:] if line.strip()}
    assert sorted(lines) == sorted(registry.names())
    for name, line in lines.items():
        for option, default in registry.options(name).items():
            if option == "space" and name == "linear":
                assert "space=factors" in line
            else:
                assert f"{option}={'' if default is None else default}" in line
