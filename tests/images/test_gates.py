"""MoLE on pipelines: order of decisions, pooling, masking and guidance."""

from __future__ import annotations

import pipes
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.testing import assert_close

import loraweave as lw

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def disturb(mixture: Any, seed: int = 5, size: float = 0.5) -> None:
    """Gates as if they had learned something."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in mixture.gate_parameters():
        if parameter.ndim:
            parameter.data.normal_(std=size, generator=generator)


def with_norms(pipe: Any, folder: Any) -> dict[str, Any]:
    """LoRAs on the layers that modulate a transformer's blocks, too."""
    endings = (*pipes.ATTENTION, *pipes.OTHERS, "norm1.linear", "norm1_context.linear", "norm.linear", "add_q_proj")
    chosen = {p: m for p, m in pipes.targets(pipe, endings).items() if not p.startswith("text_encoder")}
    return {
        name: pipes.write(folder / f"{name}.safetensors", pipes.factors(chosen, n, rank=2))
        for n, name in enumerate(("one", "two"))
    }


@pytest.mark.parametrize("kind", ["sd3", "flux"])
@pytest.mark.parametrize("granularity", ["block", "network", "layer"])
def test_modulation_decides_before_it_is_used(
    kind: str, granularity: str, sets: Any, attach: Any, tmp_path: Any
) -> None:
    pipe = sets(kind).pipe
    files = with_norms(pipe, tmp_path)
    mixture = attach(pipe, files, lw.MoLE(granularity=granularity))
    modulation = [site for site in mixture.sites if site.plan.members[0].endswith(".linear")]
    assert all(member.endswith(".linear") for site in modulation for member in site.plan.members)
    assert modulation
    disturb(mixture)
    first = pipes.latents(pipe)
    pipes.latents(pipe, prompt="another prompt", seed=1)  # what a run decided does not leak into the next
    assert_close(pipes.latents(pipe), first, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3"])
@pytest.mark.parametrize("granularity", ["matrix", "layer", "block", "network"])
def test_sites_are_led_by_who_runs_first(kind: str, granularity: Any, attach: Any, tmp_path: Any) -> None:
    """UNets register their attentions before the resnets that they call first, and the way up before the middle."""
    pipe = pipes.make(kind)
    if kind == "sd15":  # attention in the first stage of all, as in the original
        reversed_types = {f"{way}_block_types": pipe.unet.config[f"{way}_block_types"][::-1] for way in ("down", "up")}
        pipe.unet = UNet2DConditionModel.from_config(pipe.unet.config, **reversed_types).double()
    endings = (
        *pipes.ATTENTION,
        *pipes.CONVS,
        *pipes.OTHERS,
        "conv_in",
        "conv_out",
        "conv2",
        "upsamplers.0.conv",
        "ff.net.2",
    )
    chosen = pipes.targets(pipe, endings)
    files = {"one": pipes.write(tmp_path / "one.safetensors", pipes.factors(chosen, 1, rank=2))}
    mixture = attach(pipe, files, lw.MoLE(granularity))
    ran: list[str] = []
    for path, layer in mixture.layers.items():
        layer.register_forward_pre_hook(lambda *_, path=path: ran.append(path))
    pipes.latents(pipe)
    order = {path: n for n, path in reversed(list(enumerate(ran)))}
    leaders = [site.plan.members[0] for site in mixture.sites]
    for site, leader in zip(mixture.sites, leaders, strict=True):
        assert leader == min(site.plan.members, key=order.__getitem__)
    for stream in {site.plan.stream for site in mixture.sites}:
        own = [site for site in mixture.sites if site.plan.stream == stream]
        (first,) = [site.plan.members[0] for site in own if site.plan.first]
        assert first == min((site.plan.members[0] for site in own), key=order.__getitem__)


def test_a_gate_that_has_not_decided_is_an_error_and_no_stale_weight(sets: Any, attach: Any) -> None:
    pipe, files, _ = sets("sd15")
    mixture = attach(pipe, files, lw.MoLE())
    pipes.latents(pipe)
    site = next(s for s in mixture.sites if s.plan.stream == "unet" and len(s.layers) > 1)
    site.leader = site.layers[-1]  # as in a model that calls its parts in another order than expected
    with pytest.raises(lw.LoraweaveError, match="decides the weights but has not run in this pass"):
        pipes.latents(pipe)


@pytest.mark.parametrize("kind", pipes.KINDS)
def test_one_expert_left_equals_diffusers(kind: str, sets: Any, attach: Any) -> None:
    pipe, files, reference = sets(kind)
    mixture = attach(pipe, files, lw.MoLE())
    disturb(mixture)
    reference.set_adapters(["coat"])
    with mixture.only("coat"):
        assert_close(pipes.latents(pipe), pipes.latents(reference), **CLOSE)


@pytest.mark.parametrize("kind", ["sd15", "sd3"])
def test_fresh_gates_equal_the_mean_of_the_experts(kind: str, sets: Any, attach: Any) -> None:
    pipe, files, reference = sets(kind)
    attach(pipe, files, lw.MoLE())
    reference.set_adapters(list(files), [1 / 3] * 3)
    assert_close(pipes.latents(pipe), pipes.latents(reference), **CLOSE)


def test_flatten_gates_at_one_resolution(sets: Any, attach: Any) -> None:
    pipe, files, _ = sets("sd15")
    mixture = attach(pipe, files, lw.MoLE(pooling="flatten", max_length=64))
    disturb(mixture, size=0.05)
    assert torch.isfinite(pipes.latents(pipe)).all()
    with pytest.raises(lw.LoraweaveError, match="max_length=64"):
        pipes.latents(pipe, height=32, width=32)


def test_guidance_rows_decide_alone(sets: Any, attach: Any) -> None:
    pipe, files, _ = sets("sd15")
    mixture = attach(pipe, files, lw.MoLE())
    disturb(mixture)
    both = pipes.latents(pipe, num_inference_steps=1, guidance_scale=3.0)
    alone = pipes.latents(pipe, num_inference_steps=1, guidance_scale=1.0)
    blank = pipes.latents(pipe, num_inference_steps=1, guidance_scale=1.0, prompt="")
    # One DDIM step is linear in the estimate, so guidance is too.
    assert_close(both, blank + 3.0 * (alone - blank), **CLOSE)
    with mixture.record() as seen:
        pipes.latents(pipe, num_inference_steps=1, guidance_scale=3.0)
    assert {g.shape[0] for name, g in seen.weights.items() if name.startswith("unet")} == {2}


def test_a_trained_gate_is_saved_and_loaded(sets: Any, attach: Any, tmp_path: Any) -> None:
    pipe, files, _ = sets("sd15")
    mixture = attach(pipe, files, lw.MoLE())
    disturb(mixture)
    expected = pipes.latents(pipe)
    mixture.save_pretrained(tmp_path / "saved")
    mixture.detach()
    again = lw.load(tmp_path / "saved", pipe)
    try:
        assert_close(pipes.latents(pipe), expected, rtol=0, atol=0)
    finally:
        again.detach()


def test_mixing_block_outputs_is_for_language_models(sets: Any, attach: Any) -> None:
    pipe, files, _ = sets("sd15")
    outputs = lw.MoLE(mix="outputs", evidence="outputs", gate_form="full")
    with pytest.raises(lw.LoraweaveError, match="use mix='deltas'") as caught:
        lw.attach(pipe, files, outputs)
    assert "\n" not in str(caught.value)
    mixture = attach(pipe, files, lw.MoLE())  # the refused one left nothing behind
    with pytest.raises(lw.LoraweaveError, match="use mix='deltas'"):
        mixture.policy = outputs
    assert mixture.policy == lw.MoLE()
