"""``loraweave testbed`` paints sets with a tiny pipeline, and paints nothing twice."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import loraweave as lw
from loraweave.cli import main
from loraweave.evaluation.judges.pictures import read_pictures
from loraweave.integrations.diffusers import load_pipeline


@pytest.fixture(scope="module")
def recipe(sets: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipe, files, _ = sets("sd15")
    place = tmp_path_factory.mktemp("bed")
    copy.deepcopy(pipe).to(torch.float32).save_pretrained(place / "base")
    first, second, third = files
    elements = {
        first: {"category": "character", "triggers": ["hero"]},
        second: {"category": "clothing", "triggers": ["coat"]},
        third: {"category": "clothing", "triggers": ["hat"]},
    }
    said = {
        "base": "base",
        "experts": {name: str(path) for name, path in files.items()},
        "compare": {"merge": {"name": "sum"}, "switch": {"name": "switch", "every": 1}},
        "testbed": {
            "elements": elements,
            "sizes": [2],
            "always": "character",
            "strength": 0.5,
            "steps": 2,
            "size": [16, 16],
            "scheduler": "DDIMScheduler",
        },
    }
    (place / "recipe.yaml").write_text(json.dumps(said))
    return place / "recipe.yaml"


def test_sets_are_painted_once(recipe: Path, sets: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third = sets("sd15").files
    assert main(["testbed", str(recipe), "-o", str(tmp_path)]) == 0
    assert "2 sets by merge, switch: 4 pictures, 0 of them there already" in capsys.readouterr().out
    rows = read_pictures(tmp_path / "pictures.jsonl")
    assert [row.id for row in rows] == [f"{first}+{second}", f"{first}+{third}"]
    assert rows[0].elements[1].features == ("coat",)
    shown = {path: path.read_bytes() for row in rows for path in row.pictures.values()}
    assert len(shown) == len(set(shown.values())) == 4
    # One is lost; only that is painted again, and comes out the same.
    lost = rows[1].pictures["switch"]
    lost.unlink()
    times = {path: path.stat().st_mtime_ns for path in shown if path != lost}
    assert main(["testbed", str(recipe), "-o", str(tmp_path)]) == 0
    assert "4 pictures, 3 of them there already" in capsys.readouterr().out
    assert lost.read_bytes() == shown[lost]
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert main(["testbed", str(recipe), "-o", str(tmp_path), "testbed.steps=3"]) == 2
    assert "painted with other settings" in capsys.readouterr().err


def test_a_picture_is_what_the_library_paints(recipe: Path, sets: Any, tmp_path: Path) -> None:
    """Strength 0.5 on both experts of a sum: the same as the sum at weight 0.5."""
    from diffusers import DDIMScheduler

    files = sets("sd15").files
    first, second, _ = files
    assert main(["testbed", str(recipe), "-o", str(tmp_path), "--set", f"{first}+{second}", "compare=[sum]"]) == 0
    painted = Image.open(tmp_path / "sum" / f"{first}+{second}.png")
    pipe = load_pipeline(str(recipe.parent / "base"), "DiffusionPipeline")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    lw.attach(pipe, {name: str(files[name]) for name in (first, second)}, lw.Sum(0.5))
    generator = torch.Generator().manual_seed(0)
    direct = pipe("hero, coat", num_inference_steps=2, width=16, height=16, generator=generator).images[0]
    assert painted.tobytes() == direct.tobytes()


def test_methods_that_would_have_to_learn_are_refused(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["testbed", str(recipe), "-o", str(tmp_path), "compare=[switch,mole]"]) == 2
    assert "compare.mole: mole learns, and nothing here trains it for pictures" in capsys.readouterr().err
    assert not list(tmp_path.glob("**/*.png"))
    assert main(["testbed", str(recipe), "-o", str(tmp_path / "b"), "testbed.scheduler=DDIMShedule"]) == 2
    assert "did you mean 'DDIMScheduler'" in capsys.readouterr().err
