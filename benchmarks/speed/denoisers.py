"""Denoisers of random weights in the shapes of Stable Diffusion 1.5 (a UNet) and 3 (a DiT), and three LoRAs for each.

Text encoders and picture decoders take no part: embeddings are given and latents returned.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging
from safetensors.torch import save_file
from torch import Generator, Tensor, nn

from speed.place import HERE, Place

ENDINGS = (".to_q", ".to_k", ".to_v", ".to_out.0")
NAMES = ("hero", "coat", "ink")


@dataclass(frozen=True)
class ImageSize(ABC):
    """Shapes: pictures of ``latent`` cells a side, prompts of ``tokens`` embeddings, ``text`` wide.

    Attributes:
        part: what a pipeline calls its denoiser.
    """

    part: ClassVar[str]

    text: int = 768
    tokens: int = 77
    latent: int = 32
    rank: int = 16
    steps: int = 3

    @property
    @abstractmethod
    def what(self) -> str:
        """The denoiser in words."""

    @abstractmethod
    def denoiser(self) -> nn.Module:
        """A new one."""

    @abstractmethod
    def pipe(self, denoiser: nn.Module) -> Any:
        """A pipeline around it."""

    def embeddings(self, generator: Generator) -> dict[str, Tensor]:
        """What a pipeline takes in place of a prompt and a negative one."""
        prompt, negative = torch.randn(2, 1, self.tokens, self.text, generator=generator)
        return {"prompt_embeds": prompt, "negative_prompt_embeds": negative}


@dataclass(frozen=True)
class UNetSize(ImageSize):
    """Stable Diffusion 1.5: ``channels`` of the stages, ``layers`` in each."""

    part = "unet"

    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers: int = 2
    groups: int = 32

    @property
    def what(self) -> str:
        return "UNet of SD1.5's shape"

    def denoiser(self) -> nn.Module:
        return UNet2DConditionModel(
            block_out_channels=self.channels,
            layers_per_block=self.layers,
            sample_size=self.latent,
            down_block_types=(*("CrossAttnDownBlock2D",) * (len(self.channels) - 1), "DownBlock2D"),
            up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * (len(self.channels) - 1)),
            cross_attention_dim=self.text,
            attention_head_dim=8 if self.channels[0] >= 64 else 4,
            norm_num_groups=self.groups,
        )

    def pipe(self, denoiser: nn.Module) -> Any:
        return StableDiffusionPipeline(
            unet=denoiser,
            vae=_vae(4),
            text_encoder=None,
            tokenizer=None,
            scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


@dataclass(frozen=True)
class SDXLSize(UNetSize):
    """Stable Diffusion XL: attention is ``depths`` layers deep in each stage, ``head`` channels a head."""

    text: int = 2048
    latent: int = 128
    channels: tuple[int, ...] = (320, 640, 1280)
    depths: tuple[int, ...] = (1, 2, 10)
    head: int = 64
    pooled: int = 1280
    time: int = 256

    @property
    def what(self) -> str:
        return "UNet of SDXL's shape"

    def denoiser(self) -> nn.Module:
        crossed = ("CrossAttnDownBlock2D",) * (len(self.channels) - 1)
        return UNet2DConditionModel(
            block_out_channels=self.channels,
            layers_per_block=self.layers,
            sample_size=self.latent,
            down_block_types=("DownBlock2D", *crossed),
            up_block_types=(*(kind.replace("Down", "Up") for kind in crossed), "UpBlock2D"),
            transformer_layers_per_block=self.depths,
            cross_attention_dim=self.text,
            attention_head_dim=tuple(width // self.head for width in self.channels),
            norm_num_groups=self.groups,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=self.time,
            projection_class_embeddings_input_dim=self.pooled + 6 * self.time,
        )

    def pipe(self, denoiser: nn.Module) -> Any:
        nothing = dict.fromkeys(f"{kind}{n}" for kind in ("text_encoder", "tokenizer") for n in ("", "_2"))
        return StableDiffusionXLPipeline(
            unet=denoiser, vae=_vae(4), scheduler=DDIMScheduler(steps_offset=1, clip_sample=False), **nothing
        )

    def embeddings(self, generator: Generator) -> dict[str, Tensor]:
        return super().embeddings(generator) | _pooled(self.pooled, generator)


@dataclass(frozen=True)
class DiTSize(ImageSize):
    """Stable Diffusion 3 medium, a third as deep: ``layers`` of joint attention with ``heads`` of ``head`` channels."""

    part = "transformer"

    text: int = 4096
    tokens: int = 154
    layers: int = 8
    heads: int = 24
    head: int = 64
    pooled: int = 2048
    channels: int = 16

    @property
    def what(self) -> str:
        return f"DiT of SD3's shape, {self.layers} layers"

    def denoiser(self) -> nn.Module:
        return SD3Transformer2DModel(
            sample_size=self.latent,
            patch_size=2,
            in_channels=self.channels,
            out_channels=self.channels,
            num_layers=self.layers,
            attention_head_dim=self.head,
            num_attention_heads=self.heads,
            joint_attention_dim=self.text,
            caption_projection_dim=self.heads * self.head,
            pooled_projection_dim=self.pooled,
        )

    def pipe(self, denoiser: nn.Module) -> Any:
        nothing = dict.fromkeys(f"{kind}{n}" for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3"))
        return StableDiffusion3Pipeline(
            transformer=denoiser, vae=_vae(self.channels), scheduler=FlowMatchEulerDiscreteScheduler(), **nothing
        )

    def embeddings(self, generator: Generator) -> dict[str, Tensor]:
        return _pooled(self.pooled, generator) | super().embeddings(generator)


def _pooled(width: int, generator: Generator) -> dict[str, Tensor]:
    prompt, negative = torch.randn(2, 1, width, generator=generator)
    return {"pooled_prompt_embeds": prompt, "negative_pooled_prompt_embeds": negative}


def _vae(channels: int) -> AutoencoderKL:
    """As little of one as tells a pipeline that its latents are an eighth of a picture."""
    return AutoencoderKL(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        latent_channels=channels,
    )


# By scenario and by the name of a size.
IMAGE_SIZES: dict[str, dict[str, ImageSize]] = {
    "images": {
        "large": SDXLSize(),
        "full": UNetSize(),
        "small": UNetSize(channels=(64, 128, 256, 256), text=128, latent=16, rank=8),
        "tiny": UNetSize(channels=(8, 16), layers=1, text=16, tokens=5, latent=8, rank=2, groups=4),
    },
    "images, DiT": {
        "large": DiTSize(layers=24, latent=128),
        "full": DiTSize(),
        "small": DiTSize(layers=4, heads=6, text=128, tokens=77, latent=16, rank=8, pooled=64),
        "tiny": DiTSize(layers=2, heads=2, head=8, text=16, tokens=5, latent=8, rank=2, pooled=16, channels=4),
    },
}


@dataclass(frozen=True)
class ImageBench:
    """The bare denoiser and the LoRA files."""

    size: ImageSize
    denoiser: nn.Module
    files: dict[str, Path]
    place: Place = HERE

    def pipe(self, own_targets: bool = False) -> Any:
        """A pipeline around a copy of the denoiser; weights are shared, but for LoRAs' targets if they will change."""
        own = {id(module.weight) for _, module in targets(self.denoiser) if own_targets}
        tensors = chain(self.denoiser.parameters(), self.denoiser.buffers())
        shared = {id(tensor): tensor for tensor in tensors if id(tensor) not in own}
        pipe = self.size.pipe(copy.deepcopy(self.denoiser, shared))
        self.place.moved(pipe.vae)
        pipe.set_progress_bar_config(disable=True)
        return pipe


def make_image_bench(size: ImageSize, folder: Path, place: Place = HERE) -> ImageBench:
    """The denoiser, and its LoRAs in ``folder``, written there first if it has none."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    with torch.device(place.device):
        made = size.denoiser()
    denoiser = place.moved(made).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(1)
    files = {}
    for name in NAMES:
        files[name] = folder / f"{name}.safetensors"
        factors: dict[str, Tensor] = {}
        for path, module in targets(denoiser):
            into, out = module.in_features, module.out_features
            A = torch.randn(size.rank, into, generator=generator) / math.sqrt(into)
            B = torch.randn(out, size.rank, generator=generator) * 0.02
            factors[f"{size.part}.{path}.lora_A.weight"] = A.to(place.format)
            factors[f"{size.part}.{path}.lora_B.weight"] = B.to(place.format)
        if not files[name].exists():
            folder.mkdir(parents=True, exist_ok=True)
            save_file(factors, files[name])
    return ImageBench(size, denoiser, files, place)


class StandIn(nn.Module):
    """Stands in a pipeline in its denoiser's place; what it lacks itself is looked up there."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


def targets(denoiser: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """What the LoRAs change: the projections of attention."""
    for path, module in denoiser.named_modules():
        if path.endswith(ENDINGS) and isinstance(module, nn.Linear):
            yield path, module
