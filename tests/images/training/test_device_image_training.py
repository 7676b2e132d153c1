"""Gates and shifts of pictures are learned on a device other than the CPU, as on a GPU, and are the same."""

from __future__ import annotations

import pipes
from pathlib import Path
from typing import Any

import image_lessons as lessons
import pytest
import torch
from torch.testing import assert_close

import loraweave as lw
from elsewhere import DEVICE, accelerated
from loraweave.training.images.svdiff import train_shifts

SHOWN = [(lessons.picture(0), "hero"), (lessons.picture(1), "coat")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", pipes.KINDS)
@pytest.mark.parametrize("lesson", ["denoising", "guidance"])
def test_gates_of_pictures_learn_the_same_elsewhere(
    lesson: str, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def learned(device: torch.device) -> Any:
        pipe = lessons.pipeline(kind)
        mixture = lw.attach(pipe, lessons.files(pipe, tmp_path, text=kind == "sd15"), lw.MoLE())
        if lesson == "denoising":
            lessons.train(mixture, SHOWN, lw.Denoising(), gradient_checkpointing=True)
        else:
            lessons.train(mixture, objective=lessons.guidance(call=lessons.EXTRA[kind]))
        assert next(pipe.vae.parameters()).device.type == device.type
        return [gate.detach().cpu() for _, gate in mixture.gate_parameters()]

    here = learned(torch.device("cpu"))
    with accelerated(monkeypatch):
        there = learned(DEVICE)
    assert_close(there, here, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_shifts_learn_the_same_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def learned(device: torch.device) -> Any:
        return train_shifts(lessons.pipeline("sd15").to(device), SHOWN, steps=1, progress=False).shifts

    here = learned(torch.device("cpu"))
    with accelerated(monkeypatch):
        there = learned(DEVICE)
    assert_close(there, here, atol=1e-5, rtol=1e-4)
