"""``loraweave fuse`` on LoRAs that peft wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import loraweave as lw
from loraweave.cli import main
from loraweave.cli.building import load_base


def test_it_writes_what_the_library_fuses(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {name: str(world / f"{name}.jsonl") for name in ("colour", "size")}
    given = [part for name, file in data.items() for part in ("--data", f"{name}={file}")]
    out = tmp_path / "fused"
    assert (
        main(["fuse", str(world / "recipe.yaml"), *given, "-o", str(out), "--rank", "3", "--weight", "size=0.5"]) == 0
    )
    assert "fused: 16 modules, rank 3" in capsys.readouterr().out
    model, tokenizer = load_base(str(world / "base"))
    loras = {name: world / "loras" / name for name in data}
    expected = lw.fuse(model, loras, data, rank=3, weights={"size": 0.5}, tokenizer=tokenizer, progress=False)
    read = lw.read_expert(out)
    assert all(torch.equal(f.A, expected.factors[path].A) for path, f in read.factors.items())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "give --data NAME=FILE for each expert"),
        (["--data", "a=b", "--prompt", "a=b"], "give --data NAME=FILE for each expert"),
        (["--data", "colour"], "--data colour: expected NAME=FILE"),
        (["--data", "colour=a", "--data", "colour=b"], "'colour' is given twice"),
        (["--prompt", "colour="], "--prompt colour=: expected NAME=TEXT"),
        (["--prompt", "colour=red"], "expected a name that ends in .safetensors"),
        (["--data", "colour=a.jsonl", "--weight", "size=x"], "--weight size=x: expected a number"),
        (["--data", "colour=a.jsonl"], "data: none for expert 'size'"),
    ],
)
def test_refusals(
    options: list[str], said: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fuse", str(recipe), *options, "-o", str(tmp_path / "out")]) != 0
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
