"""``loraweave testbed`` paints sets with a tiny pipeline, and paints nothing twice."""

from __future__ import annotations

import copy
import json
import pipes
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

import loraweave as lw
from loraweave.cli import main
from loraweave.cli.testbed_painting import _pipeline
from loraweave.evaluation.image_metrics import Clip, image_alignment, text_alignment
from loraweave.evaluation.judges.pictures import read_pictures
from loraweave.integrations.diffusers import load_pipeline
from loraweave.recipe import load_recipe
from loraweave.recipe.needs import needs
from loraweave.zoo import images


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
    assert [row.id for row in rows] == [f"{first}+{second}--0", f"{first}+{third}--0"]
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


def test_other_seeds_make_other_pictures_and_more_keep_those_there(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def rows(seeds: str, there: str) -> dict[int, bytes]:
        assert main(["testbed", str(recipe), "-o", str(tmp_path), "--limit", "1", "compare=[sum]", seeds]) == 0
        assert f"{there} of them there already" in capsys.readouterr().out
        found = [json.loads(line) for line in (tmp_path / "pictures.jsonl").read_text().splitlines()]
        return {row["seed"]: (tmp_path / row["pictures"]["sum"]).read_bytes() for row in found}

    five = rows("testbed.seeds=[5]", "1 pictures, 0")
    seven = rows("testbed.seeds=[7]", "1 pictures, 0")
    assert five[5] != seven[7]
    assert rows("testbed.seeds=[5,7]", "2 pictures, 2") == five | seven


def test_a_picture_is_what_the_library_paints(recipe: Path, sets: Any, tmp_path: Path) -> None:
    """Strength 0.5 on both experts of a sum: the same as the sum at weight 0.5."""
    from diffusers import DDIMScheduler

    files = sets("sd15").files
    first, second, _ = files
    assert main(["testbed", str(recipe), "-o", str(tmp_path), "--set", f"{first}+{second}", "compare=[sum]"]) == 0
    painted = Image.open(tmp_path / "sum" / f"{first}+{second}--0.png")
    pipe = load_pipeline(str(recipe.parent / "base"), "DiffusionPipeline")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    lw.attach(pipe, {name: str(files[name]) for name in (first, second)}, lw.Sum(0.5))
    generator = torch.Generator().manual_seed(0)
    direct = pipe("hero, coat", num_inference_steps=2, width=16, height=16, generator=generator).images[0]
    assert painted.tobytes() == direct.tobytes()


def test_another_scheduler_keeps_what_the_pipeline_has_set(recipe: Path, tmp_path: Path) -> None:
    """Files of Stable Diffusion do not say ``clip_sample``; its pipeline turns it off, DDIM and DDPM have it on."""
    shutil.copytree(recipe.parent / "base", tmp_path / "base")
    place = tmp_path / "base" / "scheduler" / "scheduler_config.json"
    config = json.loads(place.read_text())
    assert config.pop("clip_sample") is False
    place.write_text(json.dumps(config))
    options = ["testbed.scheduler=DDPMScheduler", "testbed.scheduler_options={thresholding: true}"]
    bed = load_recipe(recipe, options).testbed
    assert bed is not None
    read = load_recipe(recipe, [f"base={tmp_path / 'base'}"])
    found = _pipeline(read, bed).scheduler
    assert type(found).__name__ == "DDPMScheduler"
    assert (found.config.clip_sample, found.config.thresholding) == (False, True)
    # Options alone change the base's own scheduler.
    found = _pipeline(read, bed.model_copy(update={"scheduler": None})).scheduler
    assert (type(found).__name__, found.config.clip_sample, found.config.thresholding) == ("DDIMScheduler", False, True)


def test_methods_that_would_have_to_learn_are_refused(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["testbed", str(recipe), "-o", str(tmp_path), "compare=[switch,mole]"]) == 2
    said = "compare.mole: mole learns, and nothing here trains it for pictures; say by what in a section 'images'"
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("**/*.png"))
    assert main(["testbed", str(recipe), "-o", str(tmp_path / "b"), "testbed.scheduler=DDIMShedule"]) == 2
    assert "did you mean 'DDIMScheduler'" in capsys.readouterr().err
    assert main(["testbed", str(recipe), "-o", str(tmp_path / "b"), "testbed.scheduler_options={clip: 1}"]) == 2
    assert "unknown option of DDIMScheduler 'clip'" in capsys.readouterr().err


def test_trained_gates_paint_every_set_with_the_other_experts_masked(
    recipe: Path, sets: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = sets("sd15").files
    first, second, third = files
    pipe = load_pipeline(str(recipe.parent / "base"), "DiffusionPipeline")
    mixture = lw.attach(pipe, {name: str(path) for name, path in files.items()}, lw.MoLE())
    generator = torch.Generator().manual_seed(0)
    for _, parameter in mixture.gate_parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(generator=generator)
    mixture.save_pretrained(recipe.parent / "gated")
    compare = ["compare={mean: {name: mole}, gated: {saved: gated}}", "testbed.strength=1", "testbed.scheduler=null"]
    assert main(["testbed", str(recipe), "-o", str(tmp_path / "a"), *compare]) == 2
    assert "compare.mean: mole learns" in capsys.readouterr().err
    compare[0] = "compare={mean: {name: linear}, gated: {saved: gated}}"
    assert main(["testbed", str(recipe), "-o", str(tmp_path), *compare]) == 0
    painted = {}
    for one, prompt in (((first, second), "hero, coat"), ((first, third), "hero, hat")):
        painted[one] = Image.open(tmp_path / "gated" / f"{'+'.join(one)}--0.png").tobytes()
        with mixture.only(*one):
            start = torch.Generator().manual_seed(0)
            direct = pipe(prompt, num_inference_steps=2, width=16, height=16, generator=start).images[0]
        assert painted[one] == direct.tobytes()
        assert painted[one] != Image.open(tmp_path / "mean" / f"{'+'.join(one)}--0.png").tobytes()
    # Other gates in the same folder are another method.
    next(iter(mixture.gate_parameters()))[1].data.add_(1.0)
    mixture.save_pretrained(recipe.parent / "gated")
    assert main(["testbed", str(recipe), "-o", str(tmp_path), *compare]) == 2
    assert "painted with other settings" in capsys.readouterr().err
    mixture.detach()
    lw.attach(pipe, {name: str(files[name]) for name in (first, second)}, lw.MoLE()).save_pretrained(tmp_path / "two")
    wrong = {
        f"compare={{two: {{saved: {tmp_path / 'two'}}}}}": f"needs {third}, too; train gates over all experts",
        "compare={gone: {saved: nowhere}}": "compare.gone.saved: ",
        "compare={gated: {saved: gated, scale: 2}}": "remove what stands beside 'saved'",
        "compare={gated: {saved: gated, train: {steps: 2}}}": "remove what stands beside 'saved'",
    }
    for override, said in wrong.items():
        assert main(["testbed", str(recipe), "-o", str(tmp_path / "b"), override]) == 2
        assert said in capsys.readouterr().err


def test_painted_pictures_are_scored(
    recipe: Path, sets: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against one picture, one prompt and one reference at a time."""
    monkeypatch.setenv("COLUMNS", "140")
    first, second, third = sets("sd15").files
    clip = tmp_path / "clip"
    tiny_clip(clip)
    (tmp_path / "references").mkdir()
    for level in (50, 200):
        Image.new("RGB", (20, 20), (level, 0, 90)).save(tmp_path / "references" / f"{level}.png")
    content = json.loads(recipe.read_text())
    content["base"] = str(recipe.parent / "base")
    content["testbed"]["elements"][second]["references"] = "references"
    content["published"] = {"source": "Paper", "scores": {"merge": {"text_alignment": 0.7}, "svdiff": {"x": 0.5}}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(content))
    out = tmp_path / "out"
    assert main(["testbed", str(tmp_path / "recipe.yaml"), "-o", str(out), "--clip", str(clip)]) == 0
    said = capsys.readouterr().out
    found = json.loads((out / "alignment.json").read_text())
    looks = Clip(str(clip))
    names = {"hero, coat": f"{first}+{second}", "hero, hat": f"{first}+{third}"}
    references = [Image.open(path) for path in sorted((tmp_path / "references").iterdir())]
    for method in ("merge", "switch"):
        painted = {prompt: Image.open(out / method / f"{name}--0.png") for prompt, name in names.items()}
        texts = [text_alignment(looks, [picture], [prompt])[0] for prompt, picture in painted.items()]
        alike = [image_alignment(looks, [painted["hero, coat"]], [one])[0] for one in references]
        assert found["scores"][method] == {
            "text_alignment": pytest.approx(sum(texts) / 2, abs=1e-5),
            f"image_alignment_{second}": pytest.approx(sum(alike) / 2, abs=1e-5),
            "image_alignment": pytest.approx(sum(alike) / 2, abs=1e-5),
        }
        hits = []
        for prompt, wanted in (("hero, coat", {first, second}), ("hero, hat", {first, third})):
            cosines = {name: text_alignment(looks, [painted[prompt]], [name])[0] for name in (first, second, third)}
            best = set(sorted(cosines, key=lambda name: -cosines[name])[:2])
            hits += [name in best for name in wanted]
        assert found["distinctness"][method]["mean"] == pytest.approx(sum(hits) / 4)
    assert f"0.700  {found['scores']['merge']['text_alignment']:.3f}" in said
    assert main(["testbed", str(tmp_path / "recipe.yaml"), "--clip", str(clip)]) == 2
    assert "--clip goes with --out" in capsys.readouterr().err


def test_references_may_be_bundled(recipe: Path, sets: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What one CLIP saw says nothing to another, nor to DINO, and that shows before anything is painted."""
    first, second, third = sets("sd15").files
    bundled = [f"testbed.elements.{second}.references=zoo:images/faerie"]
    bundled += [f"testbed.elements.{third}.references=zoo:images/acid"]
    bed = ["testbed", str(recipe), "-o", str(tmp_path / "out"), "compare=[sum]", *bundled]
    tiny_clip(tmp_path / "clip")
    metrics = "zoo:images/clip-metrics"
    for options, said in (
        (["--clip", str(tmp_path / "clip")], f"says nothing in the space of --clip {tmp_path / 'clip'}; score with"),
        (["--clip", "zoo:images/clip-objective"], "in the space of --clip zoo:images/clip-objective; score with"),
        (["--clip", metrics, "--dino", "someone/dino"], "in the space of --dino someone/dino; score with"),
    ):
        assert main([*bed, *options]) == 2
        told = capsys.readouterr().err
        assert f"testbed.elements.{second}.references: zoo:images/faerie is what {metrics} saw" in told
        assert said in told
        assert told.count("\n") == 1
        assert not (tmp_path / "out").exists()
    wrong = f"testbed.elements.{second}.references=zoo:images/fairie"
    assert main([*bed, wrong, "--clip", metrics]) == 2
    assert "unknown bundled reference 'zoo:images/fairie'; did you mean 'zoo:images/faerie'" in capsys.readouterr().err
    assert main([*bed, "--clip", metrics]) == 0
    found = json.loads((tmp_path / "out" / "alignment.json").read_text())["scores"]["sum"]
    looks, own = Clip(metrics), {}
    for name, reference in ((second, "faerie"), (third, "acid")):
        seen = looks.pictures([Image.open(tmp_path / "out" / "sum" / f"{first}+{name}--0.png")])[0]
        own[name] = float(seen @ images.references()[reference])
        assert found[f"image_alignment_{name}"] == pytest.approx(own[name], abs=1e-6)
    assert found["image_alignment"] == pytest.approx(sum(own.values()) / 2, abs=1e-6)
    # The folder is the same model as its name; and no label is markup.
    label = "compare={'[/x]': {name: sum}}"
    assert main([*bed, label, "--clip", str(images.clip_path("clip-metrics"))]) == 0
    assert "[/x]" in capsys.readouterr().out
    read = load_recipe(recipe, bundled)
    assert {n.state for n in needs(read, recipe.parent) if n.what.endswith("references")} == {"bundled"}


def tiny_clip(folder: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = pipes.clip_tokenizer()
    text = {
        **sizes,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 16,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
