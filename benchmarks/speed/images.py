"""A Stable Diffusion 1.5 of random weights, three LoRAs on its attention, and the ways to compose them.

The text encoder and the picture decoder take no part: embeddings are given and latents returned.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging
from safetensors.torch import save_file
from torch import Tensor, nn

import loraweave as lw
from loraweave.mixing.types import Policy
from speed.timing import Task

ENDINGS = (".to_q", ".to_k", ".to_v", ".to_out.0")
NAMES = ("hero", "coat", "ink")


@dataclass(frozen=True)
class ImageSize:
    """Shapes: ``channels`` of the four stages (two of the toy), ``latent`` cells a side, ``text`` wide embeddings."""

    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers: int = 2
    text: int = 768
    tokens: int = 77
    latent: int = 32
    rank: int = 16
    steps: int = 3
    groups: int = 32


IMAGE_SIZES = {
    "full": ImageSize(),
    "small": ImageSize((64, 128, 256, 256), text=128, latent=16, rank=8),
    "tiny": ImageSize((8, 16), 1, text=16, tokens=5, latent=8, rank=2, groups=4),
}


@dataclass(frozen=True)
class ImageBench:
    """The bare denoiser and the LoRA files."""

    size: ImageSize
    unet: nn.Module
    files: dict[str, Path]

    def pipe(self, own_targets: bool = False) -> Any:
        """A pipeline around a copy of the denoiser; weights are shared, but for LoRAs' targets if they will change."""
        own = {id(m.weight) for path, m in self.unet.named_modules() if own_targets and path.endswith(ENDINGS)}
        tensors = chain(self.unet.parameters(), self.unet.buffers())
        shared = {id(tensor): tensor for tensor in tensors if id(tensor) not in own}
        vae = AutoencoderKL(
            block_out_channels=(4,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=2,
        )
        pipe = StableDiffusionPipeline(
            unet=copy.deepcopy(self.unet, shared),
            vae=vae,
            text_encoder=None,
            tokenizer=None,
            scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe


def make_image_bench(size: ImageSize, folder: Path) -> ImageBench:
    """The denoiser, and its LoRAs in ``folder``, written there first if it has none."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    down = (*("CrossAttnDownBlock2D",) * (len(size.channels) - 1), "DownBlock2D")
    up = ("UpBlock2D", *("CrossAttnUpBlock2D",) * (len(size.channels) - 1))
    unet = UNet2DConditionModel(
        block_out_channels=size.channels,
        layers_per_block=size.layers,
        sample_size=size.latent,
        down_block_types=down,
        up_block_types=up,
        cross_attention_dim=size.text,
        attention_head_dim=8 if size.channels[0] >= 64 else 4,
        norm_num_groups=size.groups,
    )
    unet.requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(1)
    files = {}
    for name in NAMES:
        files[name] = folder / f"{name}.safetensors"
        factors: dict[str, Tensor] = {}
        for path, module in unet.named_modules():
            if path.endswith(ENDINGS):
                into, out = module.in_features, module.out_features
                A = torch.randn(size.rank, into, generator=generator) / math.sqrt(into)
                factors[f"unet.{path}.lora_A.weight"] = A
                factors[f"unet.{path}.lora_B.weight"] = torch.randn(out, size.rank, generator=generator) * 0.02
        if not files[name].exists():
            folder.mkdir(parents=True, exist_ok=True)
            save_file(factors, files[name])
    return ImageBench(size, unet, files)


class Published(nn.Module):
    """The published Composite: one pass after another, each after ``set_adapters``, and the estimates' mean."""

    def __init__(self, inner: Any, names: Sequence[str]) -> None:
        super().__init__()
        self.inner, self.names = inner, names

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        estimates = []
        for name in self.names:
            self.inner.set_adapters([name])
            estimates.append(self.inner(*args, **(kwargs | {"return_dict": False}))[0])
        return (torch.stack(estimates).mean(dim=0),)


def call(pipe: Any, size: ImageSize, **options: Any) -> Tensor:
    """The latents of one run with guidance: two rows a step."""
    generator = torch.Generator().manual_seed(2)
    prompt, negative = torch.randn(2, 1, size.tokens, size.text, generator=generator)
    with torch.inference_mode():
        latents: Tensor = pipe(
            prompt_embeds=prompt,
            negative_prompt_embeds=negative,
            num_inference_steps=size.steps,
            height=size.latent * 8,
            width=size.latent * 8,
            output_type="latent",
            generator=generator,
            **options,
        ).images
    return latents


def loaded(bench: ImageBench, names: Sequence[str]) -> Any:
    """The pipeline with LoRAs loaded by diffusers, through peft; all of them active."""
    pipe = bench.pipe()
    for name in names:
        pipe.load_lora_weights(bench.files[name], adapter_name=name)
    pipe.set_adapters(list(names))
    return pipe


def composed(bench: ImageBench, policy: Policy, fold: bool = False) -> Any:
    """The pipeline with loraweave."""
    pipe = bench.pipe(own_targets=fold)
    mixture = lw.attach(pipe, dict(bench.files), policy)
    if fold:
        mixture.fold()
    return pipe


def pictures(bench: ImageBench, only: Sequence[str] | None = None) -> dict[str, Callable[[], Tensor]]:
    """Every contender, ready to be called; built when first called."""

    def swap(pipe: Any, step: int, _: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe.set_adapters([NAMES[(step + 1) % len(NAMES)]])
        return values

    def switched(pipe: Any) -> Tensor:
        pipe.set_adapters([NAMES[0]])
        return call(pipe, bench.size, callback_on_step_end=swap)

    def published() -> Any:
        pipe = loaded(bench, NAMES)
        pipe.unet = Published(pipe.unet, NAMES)
        return pipe

    def in_turn(pipe: Any) -> Tensor:
        results = []
        for name in NAMES:
            pipe.set_adapters([name])
            results.append(call(pipe, bench.size))
        return torch.stack(results)

    simple = partial(call, size=bench.size)
    table: dict[str, tuple[Callable[[], Any], Callable[[Any], Tensor]]] = {
        "bare": (bench.pipe, simple),
        "peft 1": (lambda: loaded(bench, NAMES[:1]), simple),
        "peft all": (lambda: loaded(bench, NAMES), simple),
        "switch": (lambda: composed(bench, lw.Switch(every=1)), simple),
        "switch, published": (lambda: loaded(bench, NAMES), switched),
        "composite": (lambda: composed(bench, lw.Composite()), simple),
        "composite, chunk 1": (lambda: composed(bench, lw.Composite(chunk=1)), simple),
        "composite, published": (published, simple),
        "three runs, peft 1": (lambda: loaded(bench, NAMES), in_turn),
        "merge": (lambda: composed(bench, lw.Sum()), simple),
        "merge, folded": (lambda: composed(bench, lw.Sum(), fold=True), simple),
    }

    def ready(build: Callable[[], Any], run: Callable[[Any], Tensor]) -> Callable[[], Tensor]:
        made: list[Any] = []

        def picture() -> Tensor:
            if not made:
                made.append(build())
            return run(made[0])

        return picture

    return {name: ready(*entry) for name, entry in table.items() if only is None or name in only}


EQUAL = (
    ("switch", "switch, published"),
    ("composite", "composite, published"),
    ("composite, chunk 1", "composite, published"),
    ("merge", "peft all"),
    ("merge, folded", "peft all"),
)


def check(made: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Compare latents: every contender must change the bare model's, and those of ``EQUAL`` must agree.

    Raises:
        AssertionError: a contender computes something else than it should.
    """
    latents = {name: picture().double() for name, picture in made.items()}
    for name, value in latents.items():
        if not bool(value.isfinite().all()):
            raise AssertionError(f"{name}: its latents are not finite")
        if name != "bare" and torch.allclose(value, latents["bare"], rtol=1e-6, atol=1e-7):
            raise AssertionError(f"{name}: says the same as the bare model; its LoRAs are not in use")
    differences = {}
    for name, other in EQUAL:
        change = (latents[other] - latents["bare"]).abs().max()
        difference = float((latents[name] - latents[other]).abs().max() / change)
        if difference > 1e-2:
            raise AssertionError(f"{name} should equal {other}, but is off by {difference:.2g} of what LoRAs change")
        differences[f"{name} = {other}"] = difference
    return differences


def tasks(made: dict[str, Callable[[], Tensor]]) -> dict[str, Task]:
    def run(picture: Callable[[], Tensor], _: None) -> None:
        picture()

    return {name: Task(partial(run, picture)) for name, picture in made.items()}
