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


def test_fused_on_prompts(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [part for name in ("hero", "coat", "ink") for part in ("--prompt", f"{name}={name}")]
    out = tmp_path / "fused.safetensors"
    assert main(["fuse", str(recipe), *prompts, "--steps", "1", "--rank", "2", "-o", str(out)]) == 0
    assert "rank 2" in capsys.readouterr().out
    assert main(["image", str(recipe), "--prompt", "hero", "--steps", "1", "-o", str(tmp_path / "out"),
                 f"experts={{fused: {out}}}", "--method", "merge"]) == 0  # fmt: skip
    assert main(["fuse", str(recipe), *prompts, "-o", str(out)]) == 2
    assert "exists" in capsys.readouterr().err
