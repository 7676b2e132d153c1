"""``loraweave image`` on a tiny pipeline from a folder."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from loraweave.cli import main


@pytest.fixture(scope="module")
def recipe(sets: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipe, files, _ = sets("sd15")
    place = tmp_path_factory.mktemp("recipe")
    copy.deepcopy(pipe).to(torch.float32).save_pretrained(place / "base")
    experts = {name: str(path) for name, path in files.items()}
    said = {"base": "base", "experts": experts, "method": {"name": "switch", "every": 1}}
    (place / "recipe.yaml").write_text(json.dumps(said))
    return place / "recipe.yaml"


def test_pictures_sheet_and_settings(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods = [part for name in ("switch", "composite", "merge", "bare") for part in ("--method", name)]
    arguments = ["--prompt", "hero", "--seed", "3", "4", "--steps", "2", "--size", "16", "16", "-o", str(tmp_path)]
    assert main(["image", str(recipe), *arguments, *methods]) == 0
    said = capsys.readouterr().out
    assert "composite: the denoiser on 3 times the rows" in said
    assert Image.open(tmp_path / "sheet.png").size == (4 * 62, 16 + 2 * 36)
    told = json.loads((tmp_path / "image.json").read_text())
    assert told["methods"]["switch"] == {"name": "switch", "every": 1, "order": None, "start": 0.0, "stop": 1.0}
    assert (told["methods"]["bare"], told["methods"]["merge"]["name"]) == (None, "sum")
    assert [(p["method"], p["seed"]) for p in told["pictures"][:3]] == [("switch", 3), ("switch", 4), ("composite", 3)]
    shown = {p["file"]: Image.open(tmp_path / p["file"]).tobytes() for p in told["pictures"]}
    assert len(shown) == len(set(shown.values())) == 8
    assert {"diffusers", "torch", "loraweave"} <= told["versions"].keys()


def test_unknown_methods_are_refused(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["image", str(recipe), "--prompt", "x", "--method", "swich", "-o", str(tmp_path / "out")]) == 2
    assert "unknown method 'swich'; did you mean 'switch'?" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


WRONG = {
    "is named twice": ["--method", "merge", "--method", "merge"],
    "a seed is given twice": ["--seed", "1", "1"],
    "merge: StableDiffusionPipeline refuses these arguments (`height` and `width` have to be divisible by 8":
        ["--method", "merge", "--size", "17", "17"],
    "cannot be larger than `self.config.train_timesteps`": ["--steps", "5000"],
    "argument --guidance: expected a number, got 'nan'": ["--guidance", "nan"],
    "method 'regional': needs the option 'regions'": ["--method", "regional"],
    "experts.hero: no/such.safetensors: no such file": ["experts={hero: no/such.safetensors}"],
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_painted_is_one_line(
    message: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = WRONG[message] if "--size" in WRONG[message] else [*WRONG[message], "--size", "16", "16"]
    try:
        code = main(["image", str(recipe), "--prompt", "x", "--steps", "1", "-o", str(tmp_path / "out"), *arguments])
    except SystemExit as error:  # argparse's own
        code = error.code
    said = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert message in said[-1]
    assert not any("Traceback" in line for line in said)


def test_a_place_that_cannot_be_written_shows_before_anything_is_painted(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").write_text("")
    assert main(["image", str(recipe), "--prompt", "x", "-o", str(tmp_path / "taken" / "out")]) == 2
    told = capsys.readouterr()
    assert "cannot write" in told.err
    assert told.out == ""


def test_every_label_has_pictures_of_its_own(recipe: Path, tmp_path: Path) -> None:
    labels = "compare={größe: {name: sum}, 'a/b': {name: linear}, 'a b': {name: sum}, '../x': {name: sum}}"
    size = ["--size", "16", "16", "--steps", "1"]
    assert main(["image", str(recipe), "--prompt", "x", "-o", str(tmp_path / "out"), *size, labels]) == 0
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {
        "größe-0.png", "a-b-0.png", "a-b-2-0.png", "-x-0.png", "sheet.png",
    }  # fmt: skip


def test_fused_on_prompts(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [part for name in ("hero", "coat", "ink") for part in ("--prompt", f"{name}={name}")]
    out = tmp_path / "fused.safetensors"
    assert main(["fuse", str(recipe), *prompts, "--steps", "1", "--rank", "2", "-o", str(out)]) == 0
    assert "rank 2" in capsys.readouterr().out
    assert main(["image", str(recipe), "--prompt", "hero", "--steps", "1", "-o", str(tmp_path / "out"),
                 f"experts={{fused: {out}}}", "--method", "merge"]) == 0  # fmt: skip
    assert main(["fuse", str(recipe), *prompts, "-o", str(out)]) == 2
    assert "exists" in capsys.readouterr().err
