"""Estimates and losses equal what diffusers and transformers say, and loops written by hand."""

from __future__ import annotations

import copy
import pipes
from typing import Any

import diffusers
import image_lessons as lessons
import pytest
import torch
from torch.testing import assert_close

import loraweave as lw
from loraweave.integrations import diffusers_training as runs
from loraweave.integrations.diffusers import scheduler_named
from loraweave.training.images.objectives import Draw

CPU = torch.device("cpu")
SCHEDULERS = {
    "ddpm": lambda **o: diffusers.DDPMScheduler(clip_sample=False, **o),
    "ddim": lambda **o: diffusers.DDIMScheduler(clip_sample=False, **o),
    "euler": diffusers.EulerDiscreteScheduler,
    "ancestral": diffusers.EulerAncestralDiscreteScheduler,
}


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_clean_estimate_equals_the_schedulers_own(name: str, kind: str) -> None:
    scheduler = SCHEDULERS[name](prediction_type=kind)
    scheduler.set_timesteps(5)
    sample = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    said = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    for t in scheduler.timesteps[:3]:
        scheduler.scale_model_input(sample, t)
        found = runs.clean_estimate(scheduler, said, t, sample)
        stepped = scheduler.step(said, t, sample)
        assert_close(found, stepped.pred_original_sample, atol=1e-5, rtol=1e-4)
        sample = stepped.prev_sample


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_clean_estimate_of_dpm_solver_equals_its_conversion(kind: str) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type=kind, algorithm_type="dpmsolver++")
    scheduler.set_timesteps(5)
    sample, said = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0)).unbind()
    for t in scheduler.timesteps[:3]:
        found = runs.clean_estimate(scheduler, said, t, sample)
        scheduler._init_step_index(t) if scheduler.step_index is None else None
        assert_close(found, scheduler.convert_model_output(said, sample=sample), atol=1e-5, rtol=1e-4)
        sample = scheduler.step(said, t, sample).prev_sample


def test_clean_estimate_of_a_flow_undoes_its_noise() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(5)
    clean, noise = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0)).unbind()
    t = scheduler.timesteps[2]
    noisy = scheduler.scale_noise(clean, t[None], noise)
    assert_close(runs.clean_estimate(scheduler, noise - clean, t, noisy), clean)


def test_another_scheduler_keeps_what_the_pipeline_has_set(taught: Any) -> None:
    pipe, _ = taught("sd15")
    assert pipe.scheduler.config.clip_sample is False  # by Stable Diffusion's pipeline; DDIM and DDPM clip by default
    for name in ("DDPMScheduler", "DDIMScheduler"):
        assert scheduler_named(pipe, name).config.clip_sample is False
    # What neither a file nor the pipeline has set is as the other class has it.
    assert pipe.scheduler.config.timestep_spacing == "leading"
    linspace = scheduler_named(pipe, "DPMSolverMultistepScheduler").config.timestep_spacing
    assert linspace == diffusers.DPMSolverMultistepScheduler().config.timestep_spacing == "linspace"


def test_noise_follows_what_the_pipeline_has_set(taught: Any) -> None:
    """Also where it was set after loading, which diffusers' own ``from_config`` forgets."""
    pipe = copy.deepcopy(taught("sd15")[0])
    pipe.scheduler.register_to_config(prediction_type="sample")
    latents, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    assert torch.equal(runs.noised(pipe, latents, noise, torch.zeros(1)).target, latents)


def test_a_run_without_guidance_by_hand(taught: Any, attach: Any) -> None:
    pipe, files = taught("sd15", True)
    attach(pipe, files, lw.MoLE())
    generator = torch.Generator().manual_seed(4)
    call = lessons.SIZE | {"num_inference_steps": 3, "guidance_scale": 1.0}
    found = runs.estimated_pictures(
        pipe, scheduler_named(pipe, None), ["hero"], until=0.5, generators=[generator], call=call
    )
    assert found.requires_grad
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(3)
    with torch.no_grad():
        ids = pipe.tokenizer("hero", padding="max_length", max_length=12, return_tensors="pt").input_ids
        told = pipe.text_encoder(ids)[0]
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        for n, t in enumerate(scheduler.timesteps[:2]):
            step = scheduler.step(pipe.unet(x, t, told).sample, t, x)
            x = step.prev_sample if n == 0 else step.pred_original_sample
        picture = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample
    assert_close(found, (picture / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=1e-5)


def test_clip_losses_by_hand(taught: Any, attach: Any) -> None:
    pipe, files = taught("sd15")
    mixture = attach(pipe, files, lw.MoLE())
    boxes = {"coat": (0.5, 0.0, 1.0, 0.5)}
    references = {"hero": [lessons.picture(1), lessons.picture(2)], "coat": "coat"}
    options = lessons.guidance(
        concepts=references, boxes=boxes, global_weight=0.7, local_weight=0.3, crop_size=(0.5, 0.5)
    )
    lesson = options.lesson(mixture, lessons.PROMPTS, CPU)
    draws = [Draw(5, 9, 1), Draw(6, 9, 0)]
    painted = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = lesson.judged(painted, draws)

    model, tokenizer = options.clip.model, options.clip.tokenizer
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)

    def see(picture: torch.Tensor) -> torch.Tensor:
        small = torch.nn.functional.interpolate(picture[None], (8, 8), mode="bicubic", antialias=True).clamp(0, 1)
        f = model.get_image_features(pixel_values=(small - mean) / std).pooler_output[0]
        return f / f.norm()

    def read(text: str) -> torch.Tensor:
        f = model.get_text_features(**tokenizer(text, return_tensors="pt")).pooler_output[0]
        return f / f.norm()

    hero = torch.zeros(8)
    for reference in references["hero"]:
        small = torch.tensor(list(reference.resize((8, 8), 3).tobytes())).view(8, 8, 3).permute(2, 0, 1) / 255
        hero += see(small)
    hero = hero / hero.norm()
    expected = 0.0
    for n, draw in enumerate(draws):
        whole = 1 - see(painted[n]) @ read(lessons.PROMPTS[draw.item])
        generator = torch.Generator().manual_seed(draw.seed)
        best = -2.0
        for _ in range(2):
            _, v, w = torch.rand(3, generator=generator).tolist()
            x, y = int(v * 0.5 * 16), int(w * 0.5 * 16)
            x1, y1 = round((v * 0.5 + 0.5) * 16), round((w * 0.5 + 0.5) * 16)
            best = max(best, float(see(painted[n, :, y:y1, x:x1]) @ hero))
        coat = 1 - see(painted[n, :, 0:8, 8:16]) @ read("coat")
        expected += 0.5 * (0.7 * float(whole) + 0.3 * (1 - best + float(coat)) / 2)
    assert_close(float(found), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_denoising_loss_by_hand(kind: str, prediction: str, taught: Any, attach: Any) -> None:
    pipe, files = taught(kind, True)
    mixture = attach(pipe, files, lw.MoLE())
    before = pipe.scheduler
    pipe.scheduler = type(before).from_config(before.config, prediction_type=prediction)
    try:
        lesson = lw.Denoising().lesson(mixture, [(lessons.picture(1), "hero"), (lessons.picture(2), "coat")], CPU)
        found = lesson.loss([Draw(3, 0, 1), Draw(4, 0, 0)])
    finally:
        pipe.scheduler = before
    ddpm = diffusers.DDPMScheduler.from_config(before.config, prediction_type=prediction)
    losses = []
    for seed, image, prompt in ((3, lessons.picture(2), "coat"), (4, lessons.picture(1), "hero")):
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.tensor(list(image.tobytes())).view(1, 16, 16, 3).permute(0, 3, 1, 2).double() / 127.5 - 1
        with torch.no_grad():
            x = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
            noise = torch.randn(4, 8, 8, generator=generator).double()[None]
            t = (torch.special.ndtr(torch.randn((), generator=generator)) * 1000).long()[None]
            if kind == "sd15":
                told = {"encoder_hidden_states": pipe.encode_prompt(prompt, "cpu", 1, False)[0]}
            else:
                text, _, pooled, _ = pipe.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
                ids = torch.tensor([[16, 16, 0, 0, 16, 16]]).double()
                told = {"encoder_hidden_states": text, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}
            said = pipe.unet(ddpm.add_noise(x, noise, t), t, **told).sample
            target = noise if prediction == "epsilon" else ddpm.get_velocity(x, noise, t)
        losses.append((said - target).square().mean())
    assert_close(found.double(), torch.stack(losses).mean(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_denoising_loss_of_flows_by_hand(kind: str, taught: Any, attach: Any) -> None:
    pipe, files = taught(kind)
    mixture = attach(pipe, files, lw.MoLE())
    lesson = lw.Denoising(call=lessons.EXTRA[kind]).lesson(mixture, [(lessons.picture(1), "hero")], CPU)
    found = lesson.loss([Draw(3, 0, 0)])
    generator = torch.Generator().manual_seed(3)
    x = lesson.latents[0][None]
    noise = torch.randn(x.shape[1:], generator=generator).double()[None]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    index = (torch.randn((), generator=generator).sigmoid() * 1000).long()
    s, t = scheduler.sigmas[index].double(), scheduler.timesteps[index][None].double()
    shown, target = (1 - s) * x + s * noise, noise - x
    with torch.no_grad():
        if kind == "sd3":
            text, _, pooled, _ = pipe.encode_prompt("hero", "hero", "hero", max_sequence_length=12)
            said = pipe.transformer(shown, text, pooled, t).sample
        else:
            text, pooled, text_ids = pipe.encode_prompt("hero", "hero", max_sequence_length=12)
            shown, target = (pipe._pack_latents(v, 1, 4, 8, 8) for v in (shown, target))
            ids = pipe._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float64)
            said = pipe.transformer(shown, text, pooled, t / 1000, ids, text_ids).sample
    assert_close(found.double(), (said - target).square().mean(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", pipes.KINDS)
def test_every_gate_and_nothing_else_gets_gradients(kind: str, taught: Any, attach: Any) -> None:
    pipe, files = taught(kind, True)
    mixture = attach(pipe, files, lw.MoLE())
    options = lessons.guidance(call=lessons.EXTRA[kind])
    with runs.prepared(pipe, False):
        options.lesson(mixture, ["hero"], CPU).loss([Draw(1, 1, 0)]).backward()
    missing = [name for name, p in mixture.gate_parameters() if p.requires_grad and p.ndim > 1 and p.grad is None]
    unread = ["text_encoder.encoder.layers.1/e"] if kind in ("sdxl", "flux") else []  # the layer behind the one read
    assert set(missing) <= set(unread)
    learned = {id(p) for _, p in mixture.gate_parameters()}
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert not [p for part in parts for p in part.parameters() if p.grad is not None and id(p) not in learned]
