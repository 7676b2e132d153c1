"""Runs of training: what they learn, that they go on after an interruption, and what they refuse."""

from __future__ import annotations

import copy
import dataclasses
import pipes
import re
import signal
import time
from pathlib import Path
from typing import Any

import image_lessons as lessons
import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import loraweave as lw
from loraweave.integrations import diffusers_training as runs
from loraweave.integrations.diffusers import scheduler_named
from loraweave.policies.mole_standard import FLOOR, Standard
from loraweave.training.images import checkpoints
from loraweave.training.images import train as training
from loraweave.training.images.objectives import Draw, _Guided
from loraweave.training.standards import MEASURED_BATCHES


@pytest.mark.parametrize("mine", ["hero", "coat"])
def test_the_expert_whose_picture_it_is_gains_weight(
    mine: str, taught: Any, attach: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pipe, _ = taught("sd15")
    # So weak that pictures between the experts' lie between them.
    chosen = {p: m for p, m in pipes.targets(pipe, ("to_q", "to_v")).items() if p.startswith("unet")}
    files = {}
    for n, name in enumerate(("hero", "coat")):
        pairs = {path: (a, 0.05 * b) for path, (a, b) in pipes.factors(chosen, n, rank=2).items()}
        files[name] = pipes.write(tmp_path / f"{name}.safetensors", pairs)
    mixture = attach(pipe, files, lw.MoLE(granularity="network"))
    start, call = torch.Generator().manual_seed(0), lessons.SIZE | {"num_inference_steps": 2, "guidance_scale": 1.0}
    scheduler = scheduler_named(pipe, None)
    with mixture.only(mine):
        picture = runs.estimated_pictures(pipe, scheduler, ["a"], until=0.0, generators=[start], call=call)[0]
    shown = [(picture.detach().permute(1, 2, 0) * 255).round().byte().numpy()]
    # From the noise of the picture, so that the loss is 0 just where this expert is alone.
    monkeypatch.setattr(training, "draws_of", lambda *_: [Draw(0, 0, 0)])
    whole = dict.fromkeys(("hero", "coat"), (0.0, 0.0, 1.0, 1.0))
    options = lessons.guidance(
        concepts=dict.fromkeys(whole, shown), boxes=whole, steps=2, when=(0.0, 0.0), guidance=1.0, global_weight=0.0
    )
    result = lessons.train(mixture, ["a"], options, steps=10, learning_rate=0.1, balance=0.0)
    first, last = result.history[0], result.history[-1]
    assert first[f"load/{mine}"] == pytest.approx(0.5, abs=0.02)
    assert last[f"load/{mine}"] > 0.95
    assert last["task_loss"] < 0.2 * first["task_loss"]
    assert result.steps == 10


@pytest.mark.parametrize("mine", ["hero", "coat"])
@pytest.mark.parametrize("standardize", [True, False])
def test_the_expert_whose_pictures_are_shown_gains_weight(
    standardize: bool, mine: str, taught: Any, attach: Any, tmp_path: Path
) -> None:
    """Each expert is the one that removes noise from its own picture best."""
    pipe = copy.deepcopy(taught("sd15")[0])
    pipe.vae.register_to_config(scaling_factor=6.0)  # else this random VAE's latents are lost in the noise
    shown = {name: Image.new("RGB", (16, 16), c) for name, c in (("hero", (255, 230, 20)), ("coat", (0, 20, 255)))}
    files = {
        name: pipes.write(tmp_path / f"{name}.safetensors", lessons.best_last_layer(pipe, picture))
        for name, picture in shown.items()
    }
    mixture = attach(pipe, files, lw.MoLE(granularity="network", standardize=standardize))
    pairs = [(shown[mine], "a")]
    # What is learned does not depend on what is read: of standard scores, which tell pictures of one kind apart, that
    # is the bias, and the rest is noise.
    steps, least = (40, 0.7) if standardize else (8, 0.9)
    rate = None if standardize else 0.1
    found = lessons.train(mixture, pairs, lw.Denoising(), steps=steps, learning_rate=rate, batch_size=4, balance=0.0)
    loads = [entry[f"load/{mine}"] for entry in found.history]
    assert loads[0] == pytest.approx(0.5, abs=0.1)
    assert sum(loads[-4:]) / 4 > least


def test_checkpointing_and_no_checkpointing_learn_the_same(taught: Any, attach: Any) -> None:
    pipe, files = taught("sd15")
    found = []
    for checkpointing in (False, True):
        mixture = attach(pipe, files, lw.MoLE())
        lessons.train(mixture, steps=2, gradient_checkpointing=checkpointing)
        found.append(lessons.gates(mixture))
        mixture.detach()
        assert not pipe.unet.is_gradient_checkpointing
    for name, gate in found[0].items():
        assert_close(found[1][name], gate, atol=1e-5, rtol=1e-4)


def test_an_interrupted_run_goes_on_where_it_was(
    taught: Any, attach: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, files = taught("sd15")
    mixture = attach(pipe, files, lw.MoLE())
    whole = lessons.train(mixture, steps=4, output_dir=tmp_path / "whole", sample_every=4)
    expected = lessons.gates(mixture)
    assert (tmp_path / "whole" / "samples" / "step-000004.png").is_file()
    assert [step for step, _ in checkpoints.whole(tmp_path / "whole")] == [3, 4]
    mixture.policy = lw.MoLE()
    original, calls = _Guided.loss, []

    def loss(self: Any, draws: Any) -> Any:
        calls.append(draws)
        if len(calls) == MEASURED_BATCHES + 3:
            raise KeyboardInterrupt
        return original(self, draws)

    monkeypatch.setattr(_Guided, "loss", loss)
    began = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        lessons.train(mixture, steps=4, output_dir=tmp_path / "cut", save_every=4)
    spent = time.perf_counter() - began
    assert [step for step, _ in checkpoints.whole(tmp_path / "cut")] == [2]
    mixture.policy = lw.MoLE()
    again = lessons.train(mixture, steps=4, output_dir=tmp_path / "cut", resume=True)
    assert again.history == whole.history
    assert whole.earlier_seconds == 0
    assert spent / 2 < again.earlier_seconds < spent
    assert all(torch.equal(gate, expected[name]) for name, gate in lessons.gates(mixture).items())
    with pytest.raises(lw.LoraweaveError, match="this run had seed=0, got 1"):
        lessons.train(mixture, steps=4, output_dir=tmp_path / "cut", resume=True, seed=1)


def test_a_run_goes_on_under_its_own_objective_alone(taught: Any, attach: Any, tmp_path: Path) -> None:
    pipe, files = taught("sd15")
    mixture = attach(pipe, files, lw.MoLE(granularity="network"))
    boxes = {"coat": (0.0, 0.0, 0.5, 1.0)}
    first = {"steps": 2, "guidance": 2.0, "boxes": boxes, "concepts": {"hero": [lessons.picture()], "coat": "coat"}}
    run = {"steps": 1, "output_dir": tmp_path / "run"}
    lessons.train(mixture, None, lessons.guidance(**first), **run)
    pictures = [(lessons.picture(), prompt) for prompt in lessons.PROMPTS]
    assert lessons.train(mixture, None, lessons.guidance(**first), **run, resume=True).steps == 1
    changed = {
        "objective.guidance=2.0, got 7.5": {"guidance": 7.5},
        "objective.guidance=2.0, got None": {"guidance": None},
        "objective.steps=2, got 3": {"steps": 3},
        "objective.local_weight=1.0, got 0.5": {"local_weight": 0.5},
        "objective.global_weight=1.0, got 0": {"global_weight": 0},
        "objective.crops=2, got 3": {"crops": 3},
        "objective.when=[0.3, 0.9], got [0.0, 0.9]": {"when": (0.0, 0.9)},
        "objective.scheduler=None, got 'DDPMScheduler'": {"scheduler": "DDPMScheduler"},
        "objective.boxes.hero=nothing, got [0.0, 0.0, 0.5, 1.0]": {"boxes": boxes | {"hero": boxes["coat"]}},
        "objective.boxes.coat=[0.0, 0.0, 0.5, 1.0], got nothing": {"boxes": {}},
        "objective.concepts.coat='coat', got 'a coat'": {"concepts": first["concepts"] | {"coat": "a coat"}},
        "objective.concepts.hero=['Image ": {"concepts": first["concepts"] | {"hero": [lessons.picture(1)]}},
        "objective.call.eta=nothing, got 0.5": {"call": {"eta": 0.5}},
        "objective.clip='CLIP ": {"clip": lessons.clip(1)},
    }
    others: list[tuple[str, Any, Any]] = [
        (message, None, dataclasses.replace(lessons.guidance(**(first | options)), **clip))
        for message, options in changed.items()
        for clip in [{"clip": options.pop("clip")} if "clip" in options else {}]
    ]
    others.append(("objective='ClipGuidance', got 'Denoising'", pictures, lw.Denoising()))
    for message, data, objective in others:
        with pytest.raises(lw.LoraweaveError, match=re.escape(f"checkpoint-1: this run had {message}")) as caught:
            lessons.train(mixture, data, objective, **run, resume=True)
        assert "\n" not in str(caught.value)
    with pytest.raises(lw.LoraweaveError, match="this run had warmup_steps=1, got 5"):
        lessons.train(mixture, None, lessons.guidance(**first), **run, warmup_steps=5, resume=True)
    run["output_dir"] = tmp_path / "denoising"
    lessons.train(mixture, pictures, lw.Denoising(call={"eta": np.float64(0.5)}), **run)
    assert lessons.train(mixture, pictures, lw.Denoising(call={"eta": 0.5}), **run, resume=True).steps == 1
    with pytest.raises(lw.LoraweaveError, match=r"this run had objective\.size=None, got \[8, 8\]"):
        lessons.train(mixture, pictures, lw.Denoising((8, 8), {"eta": 0.5}), **run, resume=True)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("place", ["step", "zero_grad"])
def test_nothing_is_lost_when_a_step_itself_is_interrupted(
    place: str, taught: Any, attach: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while the optimiser works waits for the end of the step, which is then kept."""
    pipe, files = taught("sd15")
    mixture = attach(pipe, files, lw.MoLE())
    original, calls = getattr(torch.optim.AdamW, place), []

    def pressed(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(place)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, place, pressed)
    with pytest.raises(KeyboardInterrupt):
        lessons.train(mixture, steps=4, output_dir=tmp_path, save_every=4)
    assert [step for step, _ in checkpoints.whole(tmp_path)] == [2]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    after = lessons.gates(mixture)
    mixture.policy = lw.MoLE()
    assert checkpoints.read(tmp_path, mixture, {}) is not None
    assert all(torch.equal(gate, after[name]) for name, gate in lessons.gates(mixture).items())


def test_gates_first_measure_what_they_read(taught: Any, attach: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, files = taught("sd15")
    mixture = attach(pipe, files, lw.MoLE())
    seen: dict[int, list[torch.Tensor]] = {}
    note = Standard.note

    def watch(self: Standard, v: torch.Tensor, mask: torch.Tensor | None) -> None:
        seen.setdefault(id(self), []).append(v.flatten(0, 1) if mask is None else v[mask.bool()])
        note(self, v, mask)

    monkeypatch.setattr(Standard, "note", watch)
    lessons.train(mixture, steps=1)
    standards = [gate.standard for gate in mixture.gates.values()]
    assert len(seen) == len(standards) > 3
    for standard in standards:
        vectors = torch.cat(seen[id(standard)]).double()
        assert len(seen[id(standard)]) >= MEASURED_BATCHES
        spread = vectors.std(0, correction=0)
        floor = FLOOR * spread.square().mean().sqrt()
        assert_close(standard.center.double(), vectors.mean(0), atol=1e-6, rtol=1e-5)
        assert_close(standard.spread.double(), spread.clamp(min=floor), atol=1e-6, rtol=1e-4)
    seen.clear()
    lessons.train(mixture, steps=1)
    assert not seen


def test_fsdp_is_refused(taught: Any, attach: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, files = taught("sd15")
    mixture = attach(pipe, files, lw.MoLE())
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(lw.LoraweaveError, match="train_images: expected one process or DDP, got FSDP"):
        lessons.train(mixture)


def test_bad_input_is_one_line(taught: Any, attach: Any, tmp_path: Path) -> None:
    pipe, files = taught("sd15")
    mixture = attach(pipe, files, lw.MoLE())
    (tmp_path / "empty").mkdir()
    cases: list[tuple[Any, Any, str]] = [
        ([" "], lessons.guidance(), "prompts: expected a list of texts"),
        (["hero"], lessons.guidance(concepts={}), "concepts: none for expert 'hero'"),
        (["hero"], lessons.guidance(concepts={"heor": "x"}), "unknown expert 'heor'; did you mean 'hero'"),
        (["hero"], lw.ClipGuidance(str(tmp_path), {"hero": "a", "coat": "b"}), "no CLIP model of transformers there"),
        (["hero"], lessons.guidance(scheduler="DDPMSchedule"), "did you mean 'DDPMScheduler'"),
        ([("none.png", "hero")], lw.Denoising(), "cannot be read as a picture"),
        ({"hero": str(tmp_path / "empty")}, lw.Denoising(), "holds none"),
        ({"hero": str(tmp_path / "nowhere")}, lw.Denoising(), "no such folder"),
        (5, lw.Denoising(), "expected {prompt: folder} or pairs of picture and prompt, got int"),
        (5, lessons.guidance(), "prompts: expected a list of texts"),
        ([(Image.new("RGB", (16, 4)), "hero")], lw.Denoising(), "number 1 has 16 x 4 pixels, at least 8 x 8 expected"),
    ]
    for data, objective, message in cases:
        with pytest.raises(lw.LoraweaveError, match=message) as caught:
            lessons.train(mixture, data, objective)
        assert "\n" not in str(caught.value)
    with pytest.raises(lw.LoraweaveError, match="unknown mixed_precision 'bf61'; did you mean 'bf16'"):
        lessons.train(mixture, mixed_precision="bf61")
    (tmp_path / "taken").write_text("")
    with pytest.raises(lw.LoraweaveError, match="cannot write"):
        lessons.train(mixture, output_dir=tmp_path / "taken")
    with pytest.raises(lw.LoraweaveError, match=r"use lw\.train_images"):
        lw.train(mixture, [{"input": "a", "target": "b"}])
    mixture.policy = lw.Sum()
    with pytest.raises(lw.LoraweaveError, match="nothing to train: a 'sum' policy"):
        lessons.train(mixture)
    with pytest.raises(lw.LoraweaveError, match="two rising numbers"):
        lessons.guidance(when=(0.9, 0.3))
