"""Pipelines stay what they were to call: other tasks, batches, detaching, saving; what is refused."""

from __future__ import annotations

import copy
import pipes
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close

import loraweave as lw
from loraweave.policies import registry

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
METHODS = {
    "sum": lw.Sum(), "switch": lw.Switch(every=1), "composite": lw.Composite(), "regional": lw.Regional({"ink": None}),
}  # fmt: skip


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))


@pytest.mark.parametrize("task", ["StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"])
def test_pipelines_of_other_tasks_share_the_mixture(task: str, textless: Any, attach: Any) -> None:
    pipe, files, reference = textless("sd15")
    attach(pipe, files, lw.Composite())
    options = {"image": picture(), "strength": 0.7, "num_inference_steps": 3}
    if "Inpaint" in task:
        options |= {"mask_image": Image.new("L", (16, 16), 255), "height": 16, "width": 16}
    call = {"prompt": pipes.PROMPT, "output_type": "latent", **options}
    seed = torch.Generator().manual_seed
    mixed = getattr(diffusers, task).from_pipe(pipe, torch_dtype=torch.float64)
    slow = getattr(diffusers, task).from_pipe(reference, torch_dtype=torch.float64)
    slow.unet = pipes.Averaged(reference.unet, pipes.NAMES, [1 / 3] * 3)
    for one in (mixed, slow):
        one.set_progress_bar_config(disable=True)
    assert_close(mixed(**call, generator=seed(1)).images, slow(**call, generator=seed(1)).images, **CLOSE)


def test_controlnet_reads_the_prompt_as_each_expert_does(sets: Any, attach: Any) -> None:
    """With one step of DDIM the picture is linear in the estimates, so pictures average as estimates do."""
    pipe, files, _ = sets("sd15")
    torch.manual_seed(5)
    controlnet = diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 8)).double()
    for parameter in controlnet.parameters():  # its outputs start at zero
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.2)
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    guided = diffusers.StableDiffusionControlNetPipeline(
        **parts, controlnet=controlnet, requires_safety_checker=False
    )  # fmt: skip
    guided.scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    guided.set_progress_bar_config(disable=True)
    mixture = attach(guided, {name: files[name] for name in ("hero", "ink")}, lw.Composite())
    options = {"image": picture(), "num_inference_steps": 1, "latents": pipes.start()}
    both = pipes.latents(guided, **options)
    alone = []
    for name in ("hero", "ink"):
        with mixture.only(name):
            alone.append(pipes.latents(guided, **options))
    assert_close(both, (alone[0] + alone[1]) / 2, **CLOSE)
    assert (alone[0] - alone[1]).abs().max() > 0.05


def test_fresh_gates_at_scale_n_equal_merge(sets: Any, attach: Any) -> None:
    pipe, files, _ = sets("sd15")
    mixture = attach(pipe, files, lw.Sum())
    merged = pipes.latents(pipe)
    for granularity in ("matrix", "block"):
        mixture.policy = lw.MoLE(granularity=granularity, scale="experts")
        assert_close(pipes.latents(pipe), merged, **CLOSE)


@pytest.mark.parametrize("method", METHODS)
def test_batches_equal_single_pictures(method: str, sets: Any, attach: Any) -> None:
    pipe, files, _ = sets("sd15")
    attach(pipe, files, METHODS[method])
    prompts, noise = ["hero", "ink coat"], torch.cat([pipes.start(), -pipes.start()])
    both = pipes.latents(pipe, prompt=prompts, latents=noise)
    for n, prompt in enumerate(prompts):
        assert_close(both[n : n + 1], pipes.latents(pipe, prompt=prompt, latents=noise[n : n + 1]), **CLOSE)
    twice = pipes.latents(pipe, prompt=prompts[0], latents=noise, num_images_per_prompt=2)
    assert_close(twice[:1], both[:1], **CLOSE)


@pytest.mark.parametrize("method", METHODS)
def test_detach_gives_back_every_module_parameter_and_hook(method: str, sets: Any) -> None:
    pipe, files, _ = sets("sdxl")
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}

    def state() -> Any:
        return [
            (path, id(m), len(m._forward_hooks), len(m._forward_pre_hooks), [p.requires_grad for p in m.parameters()])
            for part in parts.values()
            for path, m in part.named_modules()
        ]

    bare, before = pipes.latents(pipe), state()  # in this order: transformers hangs hooks of its own at the first call
    mixture = lw.attach(pipe, files, METHODS[method])
    assert not torch.equal(pipes.latents(pipe), bare)
    assert mixture.detach() is pipe
    assert state() == before
    assert torch.equal(pipes.latents(pipe), bare)


def test_folded_merge_equals_the_forward_and_unfolds(sets: Any, attach: Any) -> None:
    pipe, files, _ = sets("sd15")
    mixture = attach(pipe, files, lw.Sum(0.4))
    mixed = pipes.latents(pipe)
    mixture.fold()
    assert_close(pipes.latents(pipe), mixed, **CLOSE)
    mixture.unfold()
    assert torch.equal(pipes.latents(pipe), mixed)


def test_masks_given_as_arrays_cannot_be_saved(sets: Any, attach: Any, tmp_path: Path) -> None:
    pipe, files, _ = sets("sd15")
    mixture = attach(pipe, files, lw.Regional({"ink": torch.ones(4, 4)}))
    with pytest.raises(lw.LoraweaveError, match="option 'regions' cannot be saved"):
        mixture.save_pretrained(tmp_path / "mixture")
    assert not (tmp_path / "mixture").exists()
    mixture.policy = lw.Regional({"ink": (0, 0, 0.5, 1)})
    mixture.save_pretrained(tmp_path / "mixture")


def test_given_embeddings_work_and_stale_ones_are_noticed(sets: Any, attach: Any) -> None:
    pipe, files, _ = sets("sd15")
    mixture = attach(pipe, files, lw.Composite())
    whole = pipes.latents(pipe)
    prompt, negative = pipe.encode_prompt(pipes.PROMPT, "cpu", 1, True)
    given = {"prompt": None, "prompt_embeds": prompt, "negative_prompt_embeds": negative}
    assert_close(pipes.latents(pipe, **given), whole, **CLOSE)
    mixture.policy = lw.Sum()
    with pytest.raises(lw.LoraweaveError, match="made under other experts, or another policy"):
        pipes.latents(pipe, **given)


def test_saved_mixtures_come_back(sets: Any, attach: Any, tmp_path: Path) -> None:
    made, files, _ = sets("sd15")
    pipe = copy.deepcopy(made).to(torch.float32)  # experts are stored in single precision or less
    for n, copied in enumerate((False, True)):
        mixture = attach(pipe, files, lw.Switch(every=1))
        mixed = pipes.latents(pipe)
        mixture.save_pretrained(tmp_path / str(n), copy_experts=copied)
        assert 'mixture.pipeline("a prompt").images[0]' in (tmp_path / str(n) / "README.md").read_text()
        mixture.detach()
        again = lw.load(tmp_path / str(n), pipe)
        try:
            assert torch.equal(pipes.latents(pipe), mixed)
        finally:
            again.detach()


WRONG = {
    "switch every: expected a whole number": lambda: lw.Switch(every=0),
    "0 <= start < stop <= 1": lambda: lw.Switch(start=0.5, stop=0.5),
    "switch order: expected names": lambda: lw.Switch(order="ink"),
    "unknown expert 'inc'; did you mean 'ink'": lambda: lw.Switch(order=["inc"]),
    "composite chunk": lambda: lw.Composite(chunk=0),
    "composite chunk: expected a whole number of at least 1, got True": lambda: lw.Composite(chunk=True),
    "composite weight of 'ink': expected a number of at least 0, got -1": lambda: lw.Composite({"ink": -1}),
    "policy: expected a method such as lw.Sum.*, got 'switch'": lambda: "switch",
    "policy: expected a method such as lw.Sum.*, got Switch": lambda: lw.Switch,
    "unknown expert 'herro'": lambda: lw.Composite({"herro": 1}),
    "they sum to 0": lambda: lw.Composite({"hero": 0}),
    "unknown expert 'cot'": lambda: lw.Regional({"cot": None}),
    r"expected a box \(x0, y0, x1, y1\) in fractions": lambda: lw.Regional({"coat": (0.5, 0, 0.2, 1)}),
    r"mask of 'coat': expected a shape \[height, width\], got \[3, 4, 4\]":
        lambda: lw.Regional({"coat": torch.ones(3, 4, 4)}),
    "expected values between 0 and 1, got 0 to 7": lambda: lw.Regional({"coat": [[0.0, 7.0]]}),
    "mask of 'coat': is empty": lambda: lw.Regional({"coat": torch.zeros(4, 4)}),
    "cannot be read as a picture": lambda: lw.Regional({"coat": "no-such.png"}),
    "is not value@position": lambda: lw.Sum(weights={"hero": "0@0,one@0.5"}),
    "increasing positions between 0": lambda: lw.Sum(weights={"hero": "0@0,1@20"}),
    "'unet.sideways' fits no module": lambda: lw.Sum(weights={"hero": {"unet": {"sideways": 1.0}}}),
    r"weight of 'hero\.unet': expected a finite number": lambda: lw.Sum(weights={"hero": {"unet": None}}),
}  # fmt: skip


def test_wrong_options_leave_the_mixture_as_it_was(sets: Any, attach: Any) -> None:
    pipe, files, _ = sets("sd15")
    mixture = attach(pipe, files, lw.Composite())
    before = pipes.latents(pipe)
    for message, wrong in WRONG.items():
        with pytest.raises(lw.LoraweaveError, match=message):
            mixture.policy = wrong()
    assert torch.equal(pipes.latents(pipe), before)


@pytest.mark.parametrize("name", sorted(set(registry.names()) - {"regional"}))
def test_every_method_paints_with_convolutions_and_text_encoders(name: str, sets: Any, attach: Any) -> None:
    pipe, files, _ = sets("sd15")
    attach(pipe, files, registry.from_dict({"name": name}))
    if name == "lora_flow":  # weights a token, made for the blocks of language models
        with pytest.raises(lw.LoraweaveError, match="gate site"):
            pipes.latents(pipe)
    else:
        assert pipes.latents(pipe).isfinite().all()


def test_masks_that_leave_nothing_are_refused(sets: Any, attach: Any) -> None:
    pipe, files, _ = sets("sd15")
    for policy in (lw.Composite({"hero": 1.0}), lw.Switch(order=["hero"])):
        mixture = attach(pipe, files, policy)
        before = pipes.latents(pipe)
        with pytest.raises(lw.LoraweaveError, match=r"nothing would be left|has a turn"), mixture.only("ink"):
            pass
        assert torch.equal(pipes.latents(pipe), before)
        mixture.detach()


def test_strengths_for_peft_are_refused(sets: Any, attach: Any) -> None:
    made, files, _ = sets("sd15")
    pipe = copy.deepcopy(made)  # diffusers keeps the strength in the pipeline
    attach(pipe, files, lw.Sum())
    with pytest.raises(lw.LoraweaveError, match="has no effect on a mixture; set the weight in the policy"):
        pipes.latents(pipe, cross_attention_kwargs={"scale": 0.5})


def test_methods_for_pipelines_refuse_language_models() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    expert = lw.Expert("one", {"0": lw.LoraFactors(torch.ones(1, 4), torch.ones(4, 1), 1.0)})
    for policy in (lw.Switch(), lw.Composite(), lw.Sum(weights={"one": "0@0,1@1"})):
        with pytest.raises(lw.LoraweaveError, match="attach to a diffusers pipeline"):
            lw.attach(model, {"one": expert}, policy)
    with pytest.raises(lw.LoraweaveError, match="expected a torch module or a diffusers pipeline, got str"):
        lw.attach("model", {"one": expert})


@pytest.mark.parametrize("kind", ["sd15", "flux"])
def test_experts_that_are_fetched_when_used(kind: str, sets: Any, attach: Any) -> None:
    pipe, files, _ = sets(kind)
    policies = [lw.Switch(every=1), lw.Composite(), lw.Sum(weights={"hero": 0.5, "ink": -0.3}), lw.MoLE(pooling="mean")]

    def painted(**options: Any) -> list[torch.Tensor]:
        mixture = attach(pipe, files, lw.Sum(), **options)
        found = []
        for policy in policies:
            mixture.policy = policy
            found.append(pipes.latents(pipe))
            if options:
                assert 0 < mixture.expert_memory.held <= mixture.expert_memory.budget
        mixture.detach()
        return found

    for got, expected in zip(painted(expert_memory="64KB"), painted(), strict=True):
        assert_close(got, expected, atol=1e-5, rtol=1e-5)
