"""Switch keeps step in families that tell their denoisers the time in forms of their own."""

from __future__ import annotations

import functools
import pipes
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

import loraweave as lw
from loraweave.mixing.layer import MixingLayer

FLOW = functools.partial(diffusers.FlowMatchEulerDiscreteScheduler, shift=3.0)
PROMPT = {"prompt": None, "height": 16, "width": 16, "output_type": "latent", "guidance_scale": 3.0}


def states(width: int, tokens: int = 4) -> torch.Tensor:
    return torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(2))


def encoded(features: int, *, masks: bool = True, **options: Any) -> dict[str, Any]:
    """A call's arguments for a prompt that is encoded already."""
    made = {"prompt_embeds": states(features), "negative_prompt_embeds": torch.zeros(1, 4, features)}
    if masks:
        ones = torch.ones(1, 4, dtype=torch.long)
        made |= {"prompt_attention_mask": ones, "negative_prompt_attention_mask": ones}
    return PROMPT | made | options


def lumina2() -> tuple[Any, dict[str, Any]]:
    """1 - t / 1000, rising; guidance in calls of its own."""
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=4, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=4, axes_dim_rope=(4, 4, 4), axes_lens=(32, 16, 16), cap_feat_dim=8,
    )  # fmt: skip
    pipe = diffusers.Lumina2Pipeline(
        transformer=transformer, scheduler=FLOW(), vae=pipes.vae(), text_encoder=None, tokenizer=None
    )
    return pipe, encoded(8)


def sana() -> tuple[Any, dict[str, Any]]:
    """t * timestep_scale."""
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=8,
        sample_size=4, timestep_scale=0.001,
    )  # fmt: skip
    pipe = diffusers.SanaPipeline(
        transformer=transformer, scheduler=FLOW(), vae=None, text_encoder=None, tokenizer=None
    )
    return pipe, encoded(8, negative_prompt=None, height=128, width=128, use_resolution_binning=False)


def sprint() -> tuple[Any, dict[str, Any]]:
    """An angle's share of sine and cosine."""
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=8,
        sample_size=4, guidance_embeds=True,
    )  # fmt: skip
    pipe = diffusers.SanaSprintPipeline(
        transformer=transformer, scheduler=diffusers.SCMScheduler(), vae=None, text_encoder=None, tokenizer=None
    )
    call = encoded(8, height=128, width=128, use_resolution_binning=False, intermediate_timesteps=None)
    return pipe, {name: value for name, value in call.items() if not name.startswith("negative")}


def pixart() -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, cross_attention_dim=16, sample_size=4,
        caption_channels=8, use_additional_conditions=False,
    )  # fmt: skip
    pipe = diffusers.PixArtSigmaPipeline(
        transformer=transformer, scheduler=diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True),
        vae=pipes.vae(), text_encoder=None, tokenizer=None,
    )  # fmt: skip
    return pipe, encoded(8, negative_prompt=None, use_resolution_binning=False)


def auraflow() -> tuple[Any, dict[str, Any]]:
    """t / 1000."""
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, caption_projection_dim=16, pos_embed_max_size=64,
    )  # fmt: skip
    pipe = diffusers.AuraFlowPipeline(
        transformer=transformer, scheduler=FLOW(), vae=pipes.vae(), text_encoder=None, tokenizer=None
    )
    return pipe, encoded(8)


def hunyuan() -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.HunyuanDiT2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, patch_size=2, sample_size=8, hidden_size=16,
        num_layers=2, cross_attention_dim=8, cross_attention_dim_t5=8, pooled_projection_dim=8, text_len=4,
        text_len_t5=4,
    )  # fmt: skip
    pipe = diffusers.HunyuanDiTPipeline(
        transformer=transformer, scheduler=diffusers.DDPMScheduler(), vae=pipes.vae(), text_encoder=None,
        tokenizer=None, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    call = encoded(8, use_resolution_binning=False)
    return pipe, call | {f"{name}_2": value for name, value in call.items() if "embeds" in name or "mask" in name}


def wan(expand: bool = False) -> tuple[Any, dict[str, Any]]:
    """One time for each row, or for each token."""
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=8, ffn_dim=16,
        num_layers=1, rope_max_seq_len=16,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    pipe = diffusers.WanPipeline(
        transformer=transformer, scheduler=diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0),
        vae=vae, text_encoder=None, tokenizer=None, expand_timesteps=expand,
    )  # fmt: skip
    return pipe, encoded(8, masks=False, num_frames=5, height=32, width=32)


FAMILIES = {
    "lumina2": lumina2, "sana": sana, "sana-sprint": sprint, "pixart-karras": pixart, "auraflow": auraflow,
    "hunyuandit": hunyuan, "wan": wan, "wan-tokens": lambda: wan(True),
}  # fmt: skip


def turns(pipe: Any, call: dict[str, Any], attach: Any, steps: int) -> list[tuple[str, ...]]:
    """Who was at work at each step, over two runs: the experts of its calls, none named twice."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    modules = pipes.targets(pipe, ("to_q", "to_v"))
    factors = {path: lw.LoraFactors(a, b, 1.0) for path, (a, b) in pipes.factors(modules, 0, 2).items()}
    attach(pipe, {name: lw.Expert(name, factors) for name in ("one", "two", "three")}, lw.Switch(every=2))
    denoiser = getattr(pipe, pipes.denoiser(pipe))
    layer = next(module for module in denoiser.modules() if isinstance(module, MixingLayer))
    seen: list[set[str]] = [set()]

    def look(_: nn.Module, __: Any, ___: Any) -> None:
        seen[-1].add(("one", "two", "three")[int(layer.constant.argmax())])

    step = pipe.scheduler.step

    @functools.wraps(step)  # pipelines look at its signature
    def ends(*args: Any, **kwargs: Any) -> Any:
        seen.append(set())
        return step(*args, **kwargs)

    pipe.scheduler.step = ends
    denoiser.register_forward_pre_hook(look, with_kwargs=True)
    for seed in (0, 1):
        pipe(**call, num_inference_steps=steps, generator=torch.Generator().manual_seed(seed))
    return [tuple(names) for names in seen[:-1]]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_expert_has_its_steps(family: str, attach: Any) -> None:
    torch.manual_seed(0)
    pipe, call = FAMILIES[family]()
    found = turns(pipe, call, attach, 7)
    assert found == [(name,) for name in ("one", "one", "two", "two", "three", "three", "one")] * 2
