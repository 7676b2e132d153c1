"""SVDiff's training, against a slow loop from the equation."""

from __future__ import annotations

import copy
import math
import pipes
from pathlib import Path
from typing import Any

import image_lessons as lessons
import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn
from torch.testing import assert_close

import loraweave as lw
from loraweave.integrations.svdiff import apply_shifts, read_shifts, write_shifts
from loraweave.training.images import svdiff
from loraweave.training.images.svdiff import train_shifts
from loraweave.training.images.train import draws_of

DATA = [(lessons.picture(0), "hero"), (lessons.picture(1), "hero in a coat")]
KINDS = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)


def train(pipe: Any, data: Any = DATA, **options: Any) -> svdiff.TrainedShifts:
    return train_shifts(pipe, data, **({"progress": False, "gradient_checkpointing": False, "steps": 1} | options))


def slow_weight(weight: Tensor, delta: Tensor) -> Tensor:
    matrix = weight.reshape(1, -1) if weight.ndim == 1 else weight.reshape(weight.shape[0], -1)
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return sum((S[k] + delta[k]).clamp(min=0) * torch.outer(U[:, k], Vh[k]) for k in range(len(S))).reshape(
        weight.shape
    )  # type: ignore[union-attr]


def slow_loss(pipe: Any, deltas: dict[str, Tensor], step: int, seed: int, rows: int) -> Tensor:
    """The mean squared error of the predicted noise, one picture after the other."""
    weights = {f"{n}.weight": slow_weight(pipe.unet.get_submodule(n).weight.detach(), d) for n, d in deltas.items()}
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    losses = []
    for draw in draws_of(seed, step, rows, len(DATA)):
        image, prompt = DATA[draw.item]
        shown = torch.tensor(list(image.convert("RGB").tobytes()), dtype=torch.float32)
        shown = (shown.view(pipes.SIZE, pipes.SIZE, 3).permute(2, 0, 1)[None] / 255 * 2 - 1).double()
        with torch.no_grad():
            z = pipe.vae.encode(shown).latent_dist.mean * pipe.vae.config.scaling_factor
            ids = pipe.tokenizer(prompt, padding="max_length", max_length=12, truncation=True, return_tensors="pt")
            words = pipe.text_encoder(ids.input_ids)[0]
        generator = torch.Generator().manual_seed(draw.seed)
        noise = torch.randn(z.shape[1:], generator=generator)[None].double()
        u = float(torch.randn((), generator=generator))
        t = torch.tensor([int(1000 * 0.5 * (1 + math.erf(u / 2**0.5)))])
        a = scheduler.alphas_cumprod[t].double().view(1, 1, 1, 1)
        x = a.sqrt() * z + (1 - a).sqrt() * noise
        said = torch.func.functional_call(pipe.unet, weights, (x, t, words)).sample
        losses.append(((said - noise) ** 2).mean())
    return torch.stack(losses).mean()


def test_steps_are_those_of_a_slow_loop() -> None:
    pipe = lessons.pipeline("sd15")
    result = train(copy.deepcopy(pipe), steps=2, batch_size=2, seed=3, learning_rate=0.05, norm_learning_rate=0.02)
    deltas = {}
    for name, module in pipe.unet.named_modules():
        if isinstance(module, KINDS):
            size = 1 if module.weight.ndim == 1 else min(module.weight.flatten(1).shape)
            deltas[name] = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    assert result.shifts["unet"].keys() == deltas.keys()
    first = {n: torch.zeros_like(d) for n, d in deltas.items()}
    second = {n: torch.zeros_like(d) for n, d in deltas.items()}
    for step in (0, 1):
        loss = slow_loss(pipe, deltas, step, 3, 2)
        assert float(loss) == pytest.approx(result.losses[step], rel=1e-5)
        gradients = dict(zip(deltas, torch.autograd.grad(loss, list(deltas.values())), strict=True))
        for name, delta in deltas.items():  # Adam (Kingma and Ba, algorithm 1)
            g = gradients[name]
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g**2
            m, v = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.999 ** (step + 1))
            rate = 0.02 if pipe.unet.get_submodule(name).weight.ndim == 1 else 0.05
            delta.data -= rate * m / (v.sqrt() + 1e-8)
    for name, delta in deltas.items():
        assert_close(result.shifts["unet"][name].double(), delta.detach(), atol=1e-5, rtol=1e-4)


def test_the_loss_falls_and_a_written_file_carries_it(tmp_path: Path) -> None:
    pipe = lessons.pipeline("sd15")
    data = DATA[:1]
    result = train(pipe, data, steps=12, learning_rate=0.05)
    assert sum(result.losses[-4:]) < 0.8 * sum(result.losses[:4])
    file = write_shifts(result.shifts["unet"], tmp_path / "hero.safetensors")
    shifts = read_shifts(file)
    assert all(torch.equal(shifts[name], delta) for name, delta in result.shifts["unet"].items())
    lesson = lw.Denoising().lesson_of(pipe, data, pipe.device)
    draws = list(draws_of(7, 0, 4, 1))
    with torch.no_grad():
        bare = float(lesson.loss(draws))
        with apply_shifts(pipe.unet, shifts):
            assert float(lesson.loss(draws)) < 0.9 * bare


def test_gradients_are_in_the_shifts_alone_and_the_pipeline_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = lessons.pipeline("sd15")
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    parameters = [(name, id(p), p.requires_grad) for name, p in pipe.unet.named_parameters()]
    asked: list[bool] = []
    original = svdiff.Spectral.put

    def put(self: svdiff.Spectral) -> None:
        original(self)
        models = (pipe.unet, pipe.vae, pipe.text_encoder)
        asked.append(any(p.requires_grad or p.grad is not None for m in models for p in m.parameters()))

    monkeypatch.setattr(svdiff.Spectral, "put", put)
    result = train(pipe, steps=1, parts=("unet", "text_encoder"), learning_rate=0.1, gradient_checkpointing=True)
    assert asked
    assert not any(asked)
    assert all(delta.abs().max() > 0 for n, delta in result.shifts["unet"].items() if n.endswith("to_v"))
    assert all(delta.abs().max() > 0 for n, delta in result.shifts["text_encoder"].items() if n.endswith("v_proj"))
    assert [(name, id(p), p.requires_grad) for name, p in pipe.unet.named_parameters()] == parameters
    assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())


def test_refusals(tmp_path: Path) -> None:
    pipe = lessons.pipeline("sd15")
    for options, said in (
        ({"parts": ("unett",)}, "did you mean 'unet'"),
        ({"parts": ()}, "parts: there is nothing to train"),
        ({"steps": 0}, "svdiff steps: expected a whole number"),
        ({"learning_rate": 0.0}, "svdiff learning_rate: expected a finite number larger than 0"),
        ({"data": []}, "pictures: got none"),
    ):
        with pytest.raises(lw.LoraweaveError, match=said):
            train(pipe, **options)  # type: ignore[arg-type]
    mixture = lw.attach(pipe, lessons.files(pipe, tmp_path), lw.Sum())
    with pytest.raises(lw.LoraweaveError, match="experts are attached to 'unet'"):
        train(pipe)
    mixture.detach()
    with pytest.raises(lw.LoraweaveError, match="no shifts to write"):
        write_shifts({}, tmp_path / "x.safetensors")
    file = write_shifts({"conv_in": torch.ones(8)}, tmp_path / "x.safetensors")
    with pytest.raises(lw.LoraweaveError, match="exists"):
        write_shifts({"conv_in": torch.ones(8)}, file)
