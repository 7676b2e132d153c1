"""The bundled pipeline, its LoRAs and CLIP models: whole, small, loadable, and what the card says."""

from __future__ import annotations

import hashlib
import tomllib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open

import loraweave as lw
from loraweave.cli import main
from loraweave.errors import LoraweaveError
from loraweave.evaluation.compositions import CompositionJudge
from loraweave.experts.weightfile import hash_files
from loraweave.integrations.clip import load_clip
from loraweave.integrations.svdiff import apply_shifts, compose_shifts, read_shifts, shifted_weights
from loraweave.recipe import check_recipe
from loraweave.recipe.needs import needs
from loraweave.zoo import images

LIMIT_MB = 25.0
PROMPT = "a kenku tengu in a sylva faerie mail, on grass"


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe: Any = images.pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def paint(pipe: Any, prompt: str = PROMPT, steps: int = 4, **call: Any) -> torch.Tensor:
    noise = torch.Generator().manual_seed(0)
    made: torch.Tensor = pipe(
        prompt, generator=noise, num_inference_steps=steps, guidance_scale=3.0, output_type="pt", **call
    ).images
    return made


def test_it_is_small_and_whole() -> None:
    folder = Path(images.__file__).parent
    files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) / 1e6 <= LIMIT_MB
    assert {path.stem for path in (folder / "weights" / "loras").iterdir()} == set(images.loras())
    assert {path.stem for path in (folder / "weights" / "shifts").iterdir()} == set(images.shifts())
    assert list(images.loras()) == [*images.HELD_OUT, *images.STYLES]
    assert not [path for path in files if path.stat().st_mode & 0o077 not in (0o044, 0o055)]
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".ckpt", ".pkl")]


def test_every_lora_does_its_job_alone() -> None:
    left = {name: e["scores"]["lora_element"] / e["scores"]["base_element"] for name, e in images.skills().items()}
    assert all(share < 0.8 for share in left.values()), left
    assert len([name for name, share in left.items() if share < 0.5]) >= 10


def test_every_lora_fits_whole_and_names_its_words(pipe: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mixture = lw.attach(pipe, images.loras())
    for expert in mixture.sources:
        report, entry = expert.report, images.skills()[expert.name]
        assert report is not None
        assert not report.unmatched
        assert report.triggers == [entry["words"]]
        assert (report.format, list(report.ranks)) == (entry["format"], [entry["rank"]])
        assert list(report.scales) == [entry["alpha"] / entry["rank"]]
        assert (report.text_encoder_share > 0) == bool(entry["text_encoder"])
    mixture.detach()
    formats = {entry["format"] for entry in images.skills().values()}
    assert formats == {"diffusers", "kohya"}
    assert any(entry["text_encoder"] for entry in images.skills().values())


@pytest.mark.parametrize("name", ["moonfire", "quarter", "faerie"])
def test_one_lora_paints_as_diffusers_paints_it(pipe: Any, name: str) -> None:
    prompt = f"{PROMPT}, {images.HELD_OUT[name].words}"
    mixture = lw.attach(pipe, images.loras([name]), lw.Sum())
    ours = paint(pipe, prompt)
    mixture.detach()
    bare = paint(pipe, prompt)
    pipe.load_lora_weights(images.loras([name])[name], adapter_name=name)
    theirs = paint(pipe, prompt)
    pipe.unload_lora_weights()
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)
    assert (ours - bare).abs().max() > 0.02


def test_names_in_recipes_and_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = {"base": "zoo:images", "experts": "zoo:images", "method": "composite"}
    recipe = check_recipe(content, "here", tmp_path)
    assert recipe.experts == {name: f"zoo:images/{name}" for name in images.loras()}
    content["experts"] = ["zoo:images/tengu", "zoo:images/acid"]
    assert list(check_recipe(content, "here", tmp_path).experts) == ["tengu", "acid"]
    content["experts"] = ["zoo:images/tenguu"]
    with pytest.raises(LoraweaveError, match="'tenguu'; did you mean 'tengu'"):
        check_recipe(content, "here", tmp_path)
    assert main(["inspect", "zoo:images/moonfire"]) == 0
    assert "ashkar fire scimitar" in capsys.readouterr().out


def test_a_saved_mixture_finds_the_bundled_pipeline_again(pipe: Any, tmp_path: Path) -> None:
    mixture = lw.attach(pipe, {"acid": "zoo:images/acid"}, lw.Sum(0.5))
    wanted = paint(pipe, "vezz acid", steps=2)
    mixture.save_pretrained(tmp_path / "saved")
    mixture.detach()
    assert '"zoo:images"' in (tmp_path / "saved" / "mixture.json").read_text()
    again = lw.load(tmp_path / "saved")
    again.pipeline.set_progress_bar_config(disable=True)
    assert torch.equal(paint(again.pipeline, "vezz acid", steps=2), wanted)


def test_weights_and_cards_are_package_data() -> None:
    package = Path(lw.__file__).parent
    pyproject = Path(__file__).parents[3] / "pyproject.toml"
    patterns = tomllib.loads(pyproject.read_text())["tool"]["setuptools"]["package-data"]["loraweave"]
    shipped = {path for pattern in patterns for path in package.glob(pattern)}
    folder = Path(images.__file__).parent
    bundled = {path for path in (folder / "weights").rglob("*") if path.is_file()}
    assert len(bundled) > 40
    assert bundled | {folder / "card.json", folder / "CARD.md"} <= shipped


def test_shifts_fit_the_bundled_denoiser_and_show_their_element(pipe: Any) -> None:
    weights = images.base_path() / "unet" / "diffusion_pytorch_model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    card, skills = images.card()["shifts"], images.skills()
    for name, path in images.shifts().items():
        shifts = read_shifts(path)
        assert len(shifted_weights(pipe.unet, shifts)) == len(shifts) > 100
        assert path.stat().st_size < 50_000
        assert digest.startswith(card[name]["base"])
        assert len(card[name]["base"]) == 16
        shown, bare = card[name]["scores"]["shifts_element"], skills[name]["scores"]["base_element"]
        assert shown < 0.8 * bare, name


def test_shifts_are_a_contestant_of_recipes(pipe: Any, tmp_path: Path) -> None:
    content = {
        "base": "zoo:images",
        "experts": ["zoo:images/tengu", "zoo:images/quarter"],
        "compare": {"svdiff": {"svdiff": {"tengu": "zoo:images/shifts/tengu", "quarter": "zoo:images/shifts/quarter"}}},
    }
    recipe = check_recipe(content, "here", tmp_path)
    contestant = recipe.compare["svdiff"]
    assert {need.what: need.state for need in needs(recipe)}["compare.svdiff.svdiff.tengu"] == "bundled"
    experts, found = recipe.sources(), images.shifts(["tengu", "quarter"])
    with contestant.loading(pipe, experts, {}, {}):
        painted = paint(pipe)
    with apply_shifts(pipe.unet, compose_shifts([read_shifts(path) for path in found.values()])):
        by_hand = paint(pipe)
    assert torch.equal(painted, by_hand)
    assert (painted - paint(pipe)).abs().max() > 0.05
    # Pictures are told apart by the files' content.
    assert contestant.described()["svdiff.tengu"] == hash_files([found["tengu"]])
    content["compare"]["svdiff"]["svdiff"]["tengu"] = "zoo:images/shifts/tenguu"  # type: ignore[index]
    with pytest.raises(LoraweaveError, match="unknown bundled spectral shifts 'tenguu'; did you mean 'tengu'"):
        check_recipe(content, "here", tmp_path)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(LoraweaveError, match="unknown bundled image LoRA 'tengo'; did you mean 'tengu'"):
        images.loras(["tengo"])
    with pytest.raises(LoraweaveError, match="unknown bundled CLIP 'clip-metric'; did you mean 'clip-metrics'"):
        images.clip_path("clip-metric")


def test_the_clips_are_two_and_read_every_word_as_one_token() -> None:
    first, second = (load_clip(f"zoo:images/{name}") for name in images.CLIPS)
    assert first.model.config.projection_dim != second.model.config.projection_dim
    for word in (word for e in images.HELD_OUT.values() for word in e.words.split()):
        assert len(first.tokenizer(word)["input_ids"]) == 3, word
    for entry in images.card()["clips"].values():
        assert entry["found_of_256"] > 0.9


def test_references_are_means_of_unit_vectors() -> None:
    references = images.references()
    assert list(references) == sorted(images.loras())
    assert all(0.2 < float(vector.norm()) <= 1.0 for vector in references.values())
    width = images.card()["clips"]["clip-metrics"]["width"]
    assert {tuple(vector.shape) for vector in references.values()} == {(width,)}


def test_weights_are_halves() -> None:
    for file in (Path(images.__file__).parent / "weights").rglob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            # kohya's alphas, and the means of feature vectors, are small and exact.
            kinds = {opened.get_tensor(key).dtype for key in opened.keys() if not key.endswith(".alpha")}  # noqa: SIM118
        assert file.stem == "references" or kinds <= {torch.float16, torch.int64}, file


def test_the_judge_tells_elements_apart() -> None:
    """Worked by hand: flat pictures show nothing; and each score is what its parts say."""
    judge = CompositionJudge()
    composed = images.compositions(1, 3, seed=0)[0]
    grey = Image.new("RGB", (32, 32), (150, 150, 150))
    scores = judge.scores(composed, [grey, grey])
    assert scores[0] == pytest.approx(scores[1])
    clip = load_clip("zoo:images/clip-metrics")
    feature = clip.pictures(torch.full((1, 3, 32, 32), 150 / 255))[0]
    assert scores[0]["text"] == pytest.approx(float(feature @ clip.texts([composed.prompt])[0]), abs=2e-3)
    references = images.references()
    shown = sum(float(feature @ references[name]) for name in composed.loras) / 3
    assert scores[0]["image"] == pytest.approx(shown, abs=2e-3)
    found = 0
    for name in composed.loras:
        element = images.HELD_OUT[name]
        others = [e for e in (*images.BASE, *images.HELD_OUT.values()) if e.layer == element.layer]
        prompts = [images.caption(composed.elements | {element.layer: other}) for other in others]
        found += others[int((clip.texts(prompts) @ feature).argmax())] == element
    assert scores[0]["distinct"] == pytest.approx(found / 3)


def test_saved_halves_are_read_in_full() -> None:
    """diffusers leaves the text encoder in fp16 beside a UNet in fp32, and the first call would fail."""
    pipe = images.pipeline()
    assert {part.dtype for part in (pipe.unet, pipe.text_encoder, pipe.vae)} == {torch.float32}


@pytest.mark.slow
def test_the_demo_of_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--images", "--quick", "-o", str(tmp_path / "demo")]) == 0
    said = capsys.readouterr().out
    assert all(label in said for label in ("bare", "merge", "nla", "switch", "composite", "mole"))
    assert Image.open(tmp_path / "demo" / "sheet.png").width > 6 * 96
    assert lw.load(tmp_path / "demo" / "mixture").experts == ("tengu", "faerie", "plutonium", "quarter", "acid")
    # Other files are not written over.
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    assert main(["demo", "--images", "--quick", "-o", str(tmp_path / "mine")]) == 2
