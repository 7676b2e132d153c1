"""``loraweave testbed`` trains the gates of its contestants: once, as ``loraweave train`` does, and goes on from where
it was interrupted."""

from __future__ import annotations

import copy
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import image_lessons as lessons
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import loraweave as lw
from loraweave.cli import image_gates, main

DENOISING = {"objective": "denoising", "pictures": {"hero": "pictures"}, "size": [16, 16]}
TRAIN = {"steps": 2, "learning_rate": 0.05, "batch_size": 2, "balance": 0.5}
MOLE = {"name": "mole", "activation": "sigmoid", "train": {"steps": 3}}


@pytest.fixture(scope="module")
def place(taught: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipeline, pictures, three LoRAs and a recipe whose test bed has two of them."""
    pipe, files = taught("sd15")
    folder = tmp_path_factory.mktemp("bed")
    copy.deepcopy(pipe).to(torch.float32).save_pretrained(folder / "base")
    (folder / "pictures").mkdir()
    for n in range(2):
        lessons.picture(n).save(folder / "pictures" / f"{n}.png")
    elements = {"hero": {"triggers": ["hero"]}, "coat": {"triggers": ["coat"], "category": "clothing"}}
    said = {
        "base": "base",
        "experts": {"ink": str(files["coat"]), **{name: str(file) for name, file in files.items()}},
        "compare": {"merge": {"name": "sum"}, "gated": MOLE},
        "images": DENOISING,
        "train": {**TRAIN, "seeds": [5, 6]},
        "testbed": {"elements": elements, "sizes": [1, 2], "steps": 1, "size": [16, 16]},
    }
    (folder / "recipe.yaml").write_text(json.dumps(said))
    return folder


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every optimiser step."""
    step, calls = torch.optim.AdamW.step, []

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    return calls


def bed(place: Path, out: Path, *more: str) -> list[str]:
    return ["testbed", str(place / "recipe.yaml"), "-o", str(out), *more]


def pictures(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): Image.open(path).tobytes() for path in out.glob("*/*.png")}


def test_gates_are_those_of_loraweave_train_and_are_trained_once(
    place: Path, tmp_path: Path, steps: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    out, own = tmp_path / "out", tmp_path / "own"
    assert main(bed(place, out)) == 0
    said = capsys.readouterr().out
    assert "gated: training gates (mole) over hero, coat\ngated: 3 steps in " in said
    assert f"its gates are in {out / 'gates' / 'gated'}" in said
    assert len(steps) == 3
    files = json.loads((place / "recipe.yaml").read_text())["experts"]
    experts = json.dumps({name: files[name] for name in ("hero", "coat")})
    alone = ["testbed=null", "compare={}", "method={name: mole, activation: sigmoid}", f"experts={experts}"]
    assert main(["train", str(place / "recipe.yaml"), "-o", str(own), *alone, "train.steps=3", "train.seed=5"]) == 0
    trained, expected = (load_file(folder / "gates.safetensors") for folder in (out / "gates" / "gated", own))
    assert trained.keys() == expected.keys()
    assert all(torch.equal(trained[name], expected[name]) for name in expected)
    # Painted as a saved mixture is, the experts that a set lacks masked.
    saved = f"compare={{gated: {{saved: {own}}}}}"
    assert main(bed(place, tmp_path / "saved", saved, "images=null", "train={}")) == 0
    ours, theirs = pictures(out), pictures(tmp_path / "saved")
    assert len(theirs) == 3
    assert all(ours[path] == theirs[path] for path in theirs)
    assert ours["gated/hero+coat--0.png"] != ours["merge/hero+coat--0.png"]
    # The same again does nothing; a lost picture is painted, and gates that no picture needs are not missed.
    done = len(steps)
    capsys.readouterr()
    (out / "gated" / "hero--0.png").unlink()
    assert main(bed(place, out)) == 0
    shutil.rmtree(out / "gates")
    assert main(bed(place, out)) == 0
    said = capsys.readouterr().out
    assert "6 pictures, 5 of them there already" in said
    assert "6 pictures, 6 of them there already" in said
    assert "training" not in said
    assert len(steps) == done
    assert pictures(out) == ours


@pytest.mark.slow
def test_what_gates_were_trained_by_is_noted_and_other_settings_are_refused(
    place: Path, tmp_path: Path, steps: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(bed(place, tmp_path, "--set", "hero")) == 0
    noted = json.loads((tmp_path / "testbed.json").read_text())["methods"]
    assert "trained" not in noted["merge"]
    assert noted["gated"]["activation"] == "sigmoid"
    told = noted["gated"]["trained"]
    assert told["experts"] == ["hero", "coat"]
    assert told["train"] == {"steps": 3, "learning_rate": 0.05, "batch_size": 2, "balance": 0.5, "seed": 5}
    assert told["images"]["objective"] == "denoising"
    others = ["train.balance=0.1", "train.seeds=[6]", "images.pictures={another: pictures}", "compare.gated.scale=2"]
    for other in [*others, "compare.gated={name: sum}", "images=null"]:
        assert main(bed(place, tmp_path, "--set", "hero", other)) == 2, other
        assert "its pictures were painted with other settings; choose another folder" in capsys.readouterr().err
    # Without pictures the gates themselves tell.
    for path in tmp_path.glob("*/*.png"):
        path.unlink()
    for other in others[:2]:
        assert main(bed(place, tmp_path, "--set", "hero", other)) == 2, other
        assert f"{tmp_path / 'gates' / 'gated'}: its gates were trained with other settings" in capsys.readouterr().err
    assert not list(tmp_path.glob("*/*.png"))
    assert len(steps) == 3


@pytest.mark.slow
@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_test_bed_goes_on(
    place: Path, tmp_path: Path, steps: list[int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main(bed(place, whole, "--set", "hero", "images.sample_every=3")) == 0
    assert (whole / "gates" / "gated.samples" / "step-000003.png").is_file()
    counted = torch.optim.AdamW.step

    def pressed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)
        return counted(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", pressed)
    assert main(bed(place, out, "--set", "hero")) == 130
    kept = out / "gates" / "gated.unfinished"
    assert f"kept step 1 in {kept}; the same command goes on from there" in capsys.readouterr().err
    others = {
        "train.seeds=[9]": "train.seed",
        "compare.gated.scale=2": "method.scale",
        "testbed.strength=0.5": "strength",
        "images.sample_every=2": "images.sample_every",
    }
    for other, name in others.items():
        assert main(bed(place, out, "--set", "hero", other)) == 2
        said = f"{kept}: this training was begun with other settings ({name}); go on with the same, or remove the"
        assert said in capsys.readouterr().err
    begun = json.loads((kept / "begun.json").read_text())
    (kept / "begun.json").write_text(json.dumps(begun | {"files": begun["files"] | {"hero": "another file's"}}))
    assert main(bed(place, out, "--set", "hero")) == 2
    assert "begun with other settings (files.hero); go on" in capsys.readouterr().err
    (kept / "begun.json").unlink()
    assert main(bed(place, out, "--set", "hero")) == 2
    assert f"{kept}: cannot read by what its training was begun" in capsys.readouterr().err
    (kept / "begun.json").write_text(json.dumps(begun))
    assert main(bed(place, out, "--set", "hero")) == 0
    assert len(steps) == 6
    assert pictures(out) == pictures(whole)
    assert sorted(path.name for path in (out / "gates").iterdir()) == ["gated", "gated.json"]


def test_a_kill_loses_what_came_after_the_last_checkpoint(
    place: Path, tmp_path: Path, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert image_gates._SAVE_EVERY <= 20
    monkeypatch.setattr(image_gates, "_SAVE_EVERY", 2)
    counted = torch.optim.AdamW.step

    def killed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(steps) == 3:
            steps.append(0)
            raise SystemExit(9)  # nothing is saved on its way out
        return counted(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", killed)
    with pytest.raises(SystemExit):
        main(bed(place, tmp_path, "--set", "hero", "compare.gated.train={steps: 4}"))
    assert main(bed(place, tmp_path, "--set", "hero", "compare.gated.train={steps: 4}")) == 0
    assert sum(steps) == 3 + 2
    took = json.loads((tmp_path / "gates" / "gated.json").read_text())
    assert took["steps"] == 4


def test_strength_holds_in_training_and_afterwards(place: Path, tmp_path: Path) -> None:
    """What is kept paints alone as it paints in the test bed; gates at another strength are others."""
    pictured = {}
    for strength in (1, 0.5):
        out = tmp_path / str(strength)
        assert main(bed(place, out, "--set", "hero+coat", f"testbed.strength={strength}")) == 0
        mixture = lw.load(out / "gates" / "gated")
        start = torch.Generator().manual_seed(0)
        call = {"num_inference_steps": 1, "height": 16, "width": 16}
        direct = mixture.pipeline("hero, coat", **call, generator=start).images[0]
        pictured[strength] = pictures(out)["gated/hero+coat--0.png"]
        assert pictured[strength] == direct.tobytes()
    assert pictured[1] != pictured[0.5]
    first, second = (load_file(tmp_path / s / "gates" / "gated" / "gates.safetensors") for s in ("1", "0.5"))
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_what_training_took_stands_beside_the_scores(place: Path, tmp_path: Path) -> None:
    clip = lessons.clip()
    clip.model.save_pretrained(tmp_path / "clip")
    clip.tokenizer.save_pretrained(tmp_path / "clip")
    from transformers import CLIPImageProcessorPil

    CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}).save_pretrained(
        tmp_path / "clip"
    )
    assert main(bed(place, tmp_path / "out", "--set", "hero", "--clip", str(tmp_path / "clip"))) == 0
    told = json.loads((tmp_path / "out" / "alignment.json").read_text())
    assert list(told["costs"]) == ["gated"]
    assert told["costs"]["gated"] == json.loads((tmp_path / "out" / "gates" / "gated.json").read_text())
    assert told["costs"]["gated"]["steps"] == 3
    assert told["costs"]["gated"]["train_seconds"] > 0


def test_the_recipes_own_method_is_trained_where_nothing_is_compared(place: Path, tmp_path: Path) -> None:
    assert main(bed(place, tmp_path, "--set", "hero", "compare={}", "method=cat")) == 0
    assert (tmp_path / "gates" / "cat" / "gates.safetensors").is_file()
    assert (tmp_path / "cat" / "hero--0.png").is_file()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "images=null",
            "compare.gated: mole learns, and nothing here trains it for pictures; say by what in a section",
        ),
        ("compare.gated={name: lorahub}", "compare.gated: lorahub does not learn from pictures; leave it out"),
        (
            "compare.gated={name: mole, mix: outputs, evidence: outputs, gate_form: full}",
            "compare.gated: mix='outputs'",
        ),
        ("compare.gated.train={steps: 2, seed: 1}", "compare.gated.train: every method takes the seeds of 'train'"),
        ("images.pictures={hero: nowhere}", "no such folder"),
        ("testbed.scheduler=DDIMShedule", "did you mean 'DDIMScheduler'"),
        ("testbed.vae=nowhere", "testbed.vae: "),
        ("compare.shifts={svdiff: {hero: nowhere.safetensors, coat: nowhere.safetensors}}", "compare.shifts: "),
        ("compare.gates={name: sum}", "compare.gates: the folder 'gates' is for gates; choose another label"),
        ("compare.gated?={name: sum}", "its pictures would go into the folder of"),
        ("compare={..: {name: sum}}", "compare: the label '..' makes no name of a folder; choose another"),
        ("compare={.: {name: sum}}", "compare: the label '.' makes no name of a folder"),
        ("compare={'': {name: sum}}", "compare: the label '' makes no name of a folder"),
    ],
)
def test_mistakes_show_before_anything_is_trained(
    override: str, said: str, place: Path, tmp_path: Path, steps: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    also = ["compare.gated-={name: sum}"] if "?" in override else []
    assert main(bed(place, tmp_path / "out", override, *also)) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert not steps
    assert not list(tmp_path.glob("out/*/*.png"))


def test_several_processes_are_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(bed(place, tmp_path)) == 2
    assert "compare.gated: a test bed trains in one process, got 2; let them share 'loraweave train'" in (
        capsys.readouterr().err
    )
