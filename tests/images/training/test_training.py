"""Runs of training: what they learn, that they go on after an interruption, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import image_lessons as lessons
import pytest
import torch
from torch.testing import assert_close

import loraweave as lw
from loraweave.training.images import checkpoints
from loraweave.training.images.objectives import _Guided


def test_gates_learn_whose_picture_it_is(taught: Any, attach: Any) -> None:
    pipe, files = taught("sd15")
    mixture = attach(pipe, files, lw.MoLE())
    with mixture.only("hero"):
        shown = pipe("hero", num_inference_steps=2, generator=torch.Generator().manual_seed(0), **lessons.SIZE).images
    options = lessons.guidance(concepts={"hero": shown, "coat": shown}, steps=1, guidance=1.0, global_weight=0.0,
                               boxes=dict.fromkeys(("hero", "coat"), (0, 0, 1, 1)))  # fmt: skip
    result = lessons.train(mixture, ["hero"], options, steps=12, learning_rate=0.05, balance=0.0)
    losses = [entry["task_loss"] for entry in result.history]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert result.steps == 12


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
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, draws)

    monkeypatch.setattr(_Guided, "loss", loss)
    with pytest.raises(KeyboardInterrupt):
        lessons.train(mixture, steps=4, output_dir=tmp_path / "cut", save_every=4)
    assert [step for step, _ in checkpoints.whole(tmp_path / "cut")] == [2]
    mixture.policy = lw.MoLE()
    again = lessons.train(mixture, steps=4, output_dir=tmp_path / "cut", resume=True)
    assert again.history == whole.history
    assert all(torch.equal(gate, expected[name]) for name, gate in lessons.gates(mixture).items())
    with pytest.raises(lw.LoraweaveError, match="this run had seed=0, got 1"):
        lessons.train(mixture, steps=4, output_dir=tmp_path / "cut", resume=True, seed=1)


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
    ]
    for data, objective, message in cases:
        with pytest.raises(lw.LoraweaveError, match=message) as caught:
            lessons.train(mixture, data, objective)
        assert "\n" not in str(caught.value)
    with pytest.raises(lw.LoraweaveError, match=r"use lw\.train_images"):
        lw.train(mixture, [{"input": "a", "target": "b"}])
    mixture.policy = lw.Sum()
    with pytest.raises(lw.LoraweaveError, match="nothing to train: a 'sum' policy"):
        lessons.train(mixture)
    with pytest.raises(lw.LoraweaveError, match="two rising numbers"):
        lessons.guidance(when=(0.9, 0.3))
