"""``loraweave train`` of an image recipe, and ``loraweave image`` by what it saved."""

from __future__ import annotations

import copy
import json
import signal
from pathlib import Path
from typing import Any

import image_lessons as lessons
import pytest
import torch
import yaml
from PIL import Image

import loraweave as lw
from loraweave.cli import main
from loraweave.errors import LoraweaveError
from loraweave.recipe import check_recipe, load_recipe
from loraweave.recipe.needs import needs

CLIP = {"objective": "clip", "clip": "clip", "prompts": lessons.PROMPTS, "concepts": {"hero": "hero"},
        "references": {"coat": "pictures"}, "size": [16, 16], "steps": 2, "crops": 2, "guidance": 2.0}  # fmt: skip
DENOISING = {"objective": "denoising", "pictures": {"hero": "pictures"}, "size": [16, 16]}


@pytest.fixture(scope="module")
def place(taught: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipeline, a CLIP, pictures and recipes of both objectives."""
    pipe, files = taught("sd15")
    folder = tmp_path_factory.mktemp("recipes")
    copy.deepcopy(pipe).to(torch.float32).save_pretrained(folder / "base")
    judge = lessons.clip()
    judge.model.save_pretrained(folder / "clip")
    judge.tokenizer.save_pretrained(folder / "clip")
    (folder / "pictures").mkdir()
    for n in range(2):
        lessons.picture(n).save(folder / "pictures" / f"{n}.png")
    for name, images in (("clip", CLIP), ("denoising", DENOISING)):
        write(folder / f"{name}.yaml", files, images)
    return folder


def write(path: Path, files: Any, images: Any, **more: Any) -> Path:
    experts = {name: str(file) for name, file in files.items()}
    train = {"steps": 2, "learning_rate": 0.05, "batch_size": 2, "balance": 0.5}
    said = {"base": "base", "experts": experts, "method": {"name": "mole", "scale": 1.5}, "images": images}
    path.write_text(yaml.safe_dump(said | {"train": train} | more, sort_keys=False))
    return path


def painted(out: Path) -> dict[str, bytes]:
    told = json.loads((out / "image.json").read_text())
    return {p["method"]: Image.open(out / p["file"]).tobytes() for p in told["pictures"]}


@pytest.mark.filterwarnings("always::loraweave.errors.LoraweaveWarning")
@pytest.mark.parametrize("objective", ["clip", "denoising"])
def test_a_recipe_becomes_a_mixture_that_paints(
    objective: str, place: Path, taught: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    recipe, gated = place / f"{objective}.yaml", tmp_path / "gated"
    monkeypatch.chdir(place)  # what is saved must not hang on where it was made
    run = ["--checkpoints", str(tmp_path / "run"), "images.sample_every=2"]
    assert main(["train", recipe.name, "-o", str(gated), *run]) == 0
    assert "2 steps in" in capsys.readouterr().out
    assert (tmp_path / "run" / "samples" / "step-000002.png").is_file()

    pipe, files = taught("sd15")
    single = copy.deepcopy(pipe).to(torch.float32)
    mixture = lw.attach(single, files, lw.MoLE(scale=1.5))
    data, options = load_recipe(recipe).images.lesson()  # type: ignore[union-attr]
    lessons.train(mixture, data, options, learning_rate=0.05, batch_size=2, balance=0.5)
    expected = lessons.gates(mixture)
    mixture.detach()
    monkeypatch.chdir(tmp_path)
    again = lw.load(gated)
    assert again.policy == lw.MoLE(scale=1.5)
    for name, gate in lessons.gates(again).items():
        torch.testing.assert_close(gate, expected[name], atol=1e-6, rtol=1e-4)

    call = ["--prompt", "hero coat", "--steps", "2", "--size", "16", "16", "-o", "out"]
    assert main(["image", str(recipe), *call, "--method", "gated", "--method", "mole", "--method", "nla"]) == 0
    said = capsys.readouterr().err
    assert said.count("fresh gates") == 1
    assert "warning: mole: nothing was learned" in said
    found = painted(tmp_path / "out")
    generator = torch.Generator().manual_seed(0)
    shown = again.pipeline("hero coat", num_inference_steps=2, height=16, width=16, generator=generator).images[0]
    assert found["gated"] == shown.tobytes()
    assert found["gated"] != found["mole"]
    told = json.loads((tmp_path / "out" / "image.json").read_text())["methods"]
    assert (told["gated"]["saved"], told["gated"]["scale"]) == ("gated", 1.5)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_command_goes_on_and_leaves_nothing_behind(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = str(place / "denoising.yaml"), tmp_path / "gated"
    step, calls = torch.optim.AdamW.step, []

    def pressed(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGINT)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", pressed)
    assert main(["train", recipe, "-o", str(out)]) == 130
    said = capsys.readouterr().err
    assert f"kept step 1 in {out}.unfinished; the same command goes on from there\ninterrupted\n" in said
    assert not out.exists()
    assert main(["train", recipe, "-o", str(out), "train.seed=9"]) == 2
    assert "this run had seed=0, got 9; go on with the same, or remove the folder" in capsys.readouterr().err
    other = "images.pictures={another prompt: " + str(place / "pictures") + "}"
    assert main(["train", recipe, "-o", str(out), other]) == 2
    assert "this run had prompts=" in capsys.readouterr().err
    assert main(["train", recipe, "-o", str(out)]) == 0
    assert len(calls) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["gated"]


def test_a_mixture_of_other_experts_is_refused(
    place: Path, taught: Any, attach: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe, files = taught("sd15")
    attach(pipe, files, lw.MoLE()).save_pretrained(tmp_path / "gated")
    call = ["--prompt", "hero", "--steps", "1", "--size", "16", "16", "-o", str(tmp_path / "out")]
    swapped = write(place / "swapped.yaml", dict(reversed(files.items())), CLIP)
    assert main(["image", str(swapped), *call, "--method", str(tmp_path / "gated")]) == 2
    assert "it mixes the experts hero, coat, these are coat, hero" in capsys.readouterr().err
    other = write(place / "other.yaml", {"hero": files["hero"], "coat": files["hero"]}, CLIP)
    assert main(["image", str(other), *call, "--method", str(tmp_path / "gated")]) == 2
    assert "trained with another file of the expert 'coat'" in capsys.readouterr().err
    assert main(["image", str(swapped), *call, "--method", str(place / "pictures")]) == 2
    assert "not a saved mixture" in capsys.readouterr().err


def test_what_is_missing_shows_before_anything_is_loaded(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["-o", str(tmp_path / "out"), "base=nowhere"]
    assert main(["train", str(place / "denoising.yaml"), *out, "images.pictures.hero=nothing"]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main(["train", str(place / "clip.yaml"), *out, "images.sample_every=1"]) == 2
    assert capsys.readouterr().err == (
        "error: images.sample_every: samples go beside checkpoints; give --checkpoints DIR\n"
    )


def recipe(images: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"base": "b", "experts": {"hero": "a/hero", "coat": "a/coat"}, "images": images, **more}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (recipe(CLIP | {"objective": "clop"}), "images.objective: expected 'clip' or 'denoising', got 'clop'"),
        (recipe(CLIP | {"prompt": "x"}), "images.prompt: unknown field 'prompt'; did you mean 'prompts'"),
        (recipe({"objective": "clip", "clip": "c"}), "images: the objective 'clip' needs the field 'prompts'"),
        (recipe({"objective": "denoising"}), "images: the objective 'denoising' needs the field 'pictures'"),
        (recipe(DENOISING | {"crops": 2}), "images: the objective 'denoising' has no field 'crops'"),
        (recipe(CLIP | {"pictures": {"x": "y"}}), "images: the objective 'clip' has no field 'pictures'"),
        (recipe(CLIP | {"size": [12, 16]}), "images: size: expected width and height in multiples of 8"),
        (recipe(CLIP | {"concepts": {"coat": "x"}}), "expert 'coat' has both a phrase and pictures"),
        (recipe(CLIP | {"boxes": {"haro": [0, 0, 1, 1]}}), "images.boxes: unknown expert 'haro'"),
        (recipe(CLIP | {"when": [0.9, 0.1]}), "images: clip guidance when: expected two rising numbers"),
        (recipe(CLIP, data={"train": "x.jsonl"}), "data: is for language models"),
        (recipe(CLIP, train={"max_input_length": 9}), "train.max_input_length: is for language models"),
    ],
)
def test_mistakes_are_named(content: dict[str, Any], said: str) -> None:
    with pytest.raises(LoraweaveError) as raised:
        check_recipe(content, "r.yaml", Path())
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_needs_of_an_image_recipe(place: Path) -> None:
    found = {need.what: (need.source, need.state) for need in needs(load_recipe(place / "clip.yaml"), place)}
    assert found["images.clip"] == (str(place / "clip"), "here")
    assert found["images.references.coat"] == (str(place / "pictures"), "here")
    hub = check_recipe(recipe(CLIP | {"clip": "someone/clip", "references": {"coat": "no"}}), "r", Path("x"))
    assert {n.what: n.state for n in needs(hub)} | {"images.clip": "hub", "images.references.coat": "missing"} == {
        n.what: n.state for n in needs(hub)
    }
