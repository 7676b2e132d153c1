"""``loraweave image`` and ``loraweave testbed`` with contestants that are no mixtures."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import loraweave as lw
from loraweave.cli import main
from loraweave.errors import LoraweaveError
from loraweave.integrations.diffusers import load_pipeline
from loraweave.recipe import check_recipe, load_recipe
from loraweave.recipe.needs import needs

COMPARE = {
    "merge": {"name": "sum"},
    "words": {"textual_inversion": {"<hero>": "hero.safetensors"}, "words": {"a hero": "<hero>", "hero": "<hero>"}},
    "booth": {"dreambooth": "booth"},
    "shifts": {"svdiff": {"hero": "shifts.safetensors", "coat": "shifts.safetensors", "ink": "shifts.safetensors"}},
    "fused": {"fuse": {"prompts": {"hero": "hero", "coat": ["coat"]}, "weights": {"coat": 0.5}, "steps": 1}},
}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def recipe(sets: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipe, files, _ = sets("sd15")
    place = tmp_path_factory.mktemp("rivals")
    copy.deepcopy(pipe).to(torch.float32).save_pretrained(place / "base")
    other = copy.deepcopy(pipe).to(torch.float32)
    other.unet.conv_out.weight.data *= -1
    other.save_pretrained(place / "booth")
    save_file({"a": random(2, 16)}, place / "hero.safetensors")
    save_file({"conv_in.delta": random(8).abs()}, place / "shifts.safetensors")
    elements = {
        "hero": {"category": "character", "triggers": ["hero"]},
        "coat": {"category": "clothing", "triggers": ["coat"]},
        "ink": {"category": "style", "triggers": ["ink"]},
    }
    said = {
        "base": "base",
        "experts": {name: str(path) for name, path in files.items()},
        "compare": COMPARE,
        "testbed": {
            "elements": elements, "sizes": [2], "always": "character", "steps": 2, "size": [16, 16], "strength": 0.5
        },
    }  # fmt: skip
    (place / "recipe.yaml").write_text(json.dumps(said))
    return place / "recipe.yaml"


def by_hand(recipe: Path, label: str, prompt: str, experts: Any, seed: int) -> bytes:
    """The picture without this library's loaders and verbs."""
    pipe = load_pipeline(str(recipe.parent / "base"), "DiffusionPipeline")
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 2, "width": 16, "height": 16}
    if label == "words":
        pipe.load_textual_inversion(str(recipe.parent / "hero.safetensors"), token="<hero>")
        prompt = prompt.replace("hero", "<hero>")
    elif label == "booth":
        pipe.unet.conv_out.weight.data *= -1
    elif label == "shifts":
        weight = pipe.unet.conv_in.weight
        U, S, V = torch.linalg.svd(weight.data.flatten(1).double(), full_matrices=False)
        moved = U @ torch.diag(S + len(experts) * random(8).abs()) @ V
        weight.data = moved.view(weight.shape).float()
    elif label == "fused":
        prompts = {name: [name] for name in experts}
        more = {**call, "num_inference_steps": 1}
        fused = lw.fuse(pipe, experts, prompts, weights={"coat": 0.5} if "coat" in experts else {}, call=more)
        lw.attach(pipe, {"fused": fused}, lw.Sum())
    made: bytes = pipe(prompt, **call, generator=torch.Generator().manual_seed(seed)).images[0].tobytes()
    return made


def test_pictures_by_every_contestant(recipe: Path, sets: Any, tmp_path: Path) -> None:
    files = dict(list(sets("sd15").files.items())[:2])
    arguments = ["--prompt", "hero", "--seed", "3", "--steps", "2", "--size", "16", "16", "-o", str(tmp_path)]
    loras = f"experts={json.dumps({name: str(path) for name, path in files.items()})}"
    shifts = "compare.shifts.svdiff={hero: shifts.safetensors, coat: shifts.safetensors}"
    assert main(["image", str(recipe), *arguments, loras, shifts, "testbed=null"]) == 0
    told = json.loads((tmp_path / "image.json").read_text())
    assert [picture["method"] for picture in told["pictures"]] == list(COMPARE)
    assert told["methods"]["booth"] == {"dreambooth": str(recipe.parent / "booth")}
    for label in ("words", "booth", "shifts", "fused"):
        painted = Image.open(tmp_path / f"{label}-3.png").tobytes()
        assert painted == by_hand(recipe, label, "hero", files, 3)
    assert Image.open(tmp_path / "sheet.png").width > 5 * 16


def test_sets_of_a_test_bed(recipe: Path, sets: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fusion and shifts are of the set's own experts; what is painted already stays, other files are other settings."""
    files = sets("sd15").files
    assert main(["testbed", str(recipe), "-o", str(tmp_path)]) == 0
    told = capsys.readouterr()
    assert "2 sets by merge, words, booth, shifts, fused: 10 pictures, 0 of them" in told.out
    assert "warning" not in told.err
    pipe = load_pipeline(str(recipe.parent / "base"), "DiffusionPipeline")
    mixture = lw.attach(pipe, {name: str(path) for name, path in files.items()}, lw.Sum())
    halves = {}
    for n, name in enumerate(mixture.experts):
        found = {path: layer.bank.factors(n) for path, layer in mixture.layers.items()}
        halves[name] = lw.Expert(name, {path: f for path, f in found.items() if f is not None}).scaled(0.5)
    for other, labels in (("coat", ("words", "booth", "shifts")), ("ink", ("words", "fused"))):
        own = {name: halves[name] for name in ("hero", other)}
        for label in labels:
            painted = Image.open(tmp_path / label / f"hero+{other}--0.png").tobytes()
            assert painted == by_hand(recipe, label, f"hero, {other}", own, 0), (label, other)
    row = json.loads((tmp_path / "pictures.jsonl").read_text().splitlines()[0])
    assert row["prompt"] == "hero, coat"  # what all of them are judged by
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.png")}
    (tmp_path / "shifts" / "hero+ink--0.png").unlink()
    assert main(["testbed", str(recipe), "-o", str(tmp_path)]) == 0
    assert sum(path.stat().st_mtime_ns != time for path, time in before.items()) == 1
    save_file({"a": random(2, 16, seed=5)}, tmp_path / "hero.safetensors")
    other = f"compare.words.textual_inversion.<hero>={tmp_path / 'hero.safetensors'}"
    assert main(["testbed", str(recipe), "-o", str(tmp_path), other]) == 2
    assert "painted with other settings" in capsys.readouterr().err


def test_what_does_not_fit_shows_before_anything_is_painted(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"a": random(2, 24)}, tmp_path / "hero.safetensors")
    wide = f"compare.words.textual_inversion.<hero>={tmp_path / 'hero.safetensors'}"
    none = "compare={fused: {fuse: {prompts: {hero: hero}}}}"
    image = ["image", str(recipe), "--prompt", "hero", "-o", str(tmp_path / "out")]
    bed = ["testbed", str(recipe), "-o", str(tmp_path / "out")]
    for command, said in (
        ([*image, wide], "tensor 'a' is F32 [2, 24], expected [16]"),
        ([*bed, wide], "tensor 'a' is F32 [2, 24], expected [16]"),
        ([*image, none, "testbed=null"], "compare.fused: fuse.prompts: none for expert 'coat'"),
        ([*bed, "compare={s: {svdiff: {hero: shifts.safetensors}}}"], "compare.s: svdiff: no shifts for expert 'coat'"),
    ):
        assert main(command) == 2
        told = capsys.readouterr()
        assert said in told.err
        assert told.err.count("\n") == 1
        assert not list((tmp_path / "out").glob("**/*.png"))


@pytest.mark.filterwarnings("always::loraweave.errors.LoraweaveWarning")
def test_a_prompt_without_the_new_words(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "compare={new: {textual_inversion: {<hero>: hero.safetensors}}}"
    assert main(["image", str(recipe), words, "--prompt", "hero", "--steps", "1", "-o", str(tmp_path)]) == 0
    assert "warning: new: 1 of 1 prompts have none of its words" in capsys.readouterr().err


def test_recipes_say_what_is_wrong(recipe: Path) -> None:
    read = load_recipe(recipe)
    assert read.compare["words"].prompt("a hero and a hero") == "<hero> and <hero>"
    assert {need.what for need in needs(read, recipe.parent)} >= {
        "compare.words.textual_inversion.<hero>", "compare.booth.dreambooth", "compare.shifts.svdiff.hero"
    }  # fmt: skip
    assert {need.state for need in needs(read, recipe.parent)} == {"here"}
    rebuilt = check_recipe({**read.to_dict(), "base": read.base}, "again", recipe.parent)
    assert rebuilt.compare == read.compare
    said = json.loads(recipe.read_text())
    for entry, problem in {
        "{dreambooth: a, scale: 2}": "compare.x: unknown field 'scale'|compare.x.scale: unknown field 'scale'",
        "{dreambooth: a, method: {name: sum}}": "dreambooth: it is no mixture; remove 'method'",
        "{dreambooth: a, custom_diffusion: b}": "expected one of custom_diffusion, dreambooth; give each a label",
        "{textual_inversion: {}}": "textual_inversion: expected what it is made of, got nothing",
        "{fuse: null}": "fuse: expected what it is made of, got nothing",
        "{fuse: {weights: {hat: 1}}}": "compare.x.fuse.weights: unknown expert 'hat'",
        "{fuse: {wieghts: {hat: 1}}}": "did you mean 'weights'",
        "{fuse: {}, words: {a: b}}": "words: they go with",
        "{svdiff: {hat: a}}": "compare.x.svdiff: unknown expert 'hat'",
        "{saved: a, dreambooth: b}": "remove what stands beside 'saved'",
    }.items():
        with pytest.raises(LoraweaveError, match=problem):
            load_recipe(recipe, [f"compare={{x: {entry}}}"])
    assert said["compare"] == COMPARE


def test_comparisons_of_text_refuse_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = {"base": "zoo", "experts": ["zoo:notice"], "compare": {"x": {"dreambooth": "y"}},
            "data": {"test": "zoo:notice"}}  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(said))
    assert main(["compare", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out")]) == 2
    assert "compare.x.dreambooth: is for pictures" in capsys.readouterr().err
