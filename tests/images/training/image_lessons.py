"""A tiny CLIP, pictures and mixtures to teach."""

from __future__ import annotations

import pipes
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel

import loraweave as lw
from loraweave.integrations import diffusers_training as runs
from loraweave.integrations.clip import Clip
from loraweave.mixture import Mixture

PROMPTS = ["hero coat", "ink hero"]
CONCEPTS = {name: name for name in pipes.NAMES}
EXTRA = {"sd15": {}, "sdxl": {}, "sd3": {"max_sequence_length": 12}, "flux": {"max_sequence_length": 12}}
SIZE = {"height": pipes.SIZE, "width": pipes.SIZE}


def clip(seed: int = 0) -> Clip:
    torch.manual_seed(seed)
    text = {"vocab_size": 54, "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = CLIPConfig(
        text_config=text | sizes, vision_config=sizes | {"image_size": 8, "patch_size": 4}, projection_dim=8
    )
    return Clip(CLIPModel(config), pipes.clip_tokenizer())


def pipeline(kind: str) -> Any:
    pipe = pipes.make(kind)
    if kind == "sd3":
        pipe.vae.register_to_config(shift_factor=0.1)
    if kind == "flux":
        pipe.vae.register_to_config(shift_factor=0.2)
    return pipe


def files(pipe: Any, folder: Path, text: bool = False) -> dict[str, Path]:
    """Two experts in attention alone."""
    chosen = {
        p: m
        for p, m in pipes.targets(pipe, ("to_q", "to_v", "q_proj")).items()
        if text or not p.startswith("text_encoder")
    }
    return {
        name: pipes.write(folder / f"{name}.safetensors", pipes.factors(chosen, n, rank=2))
        for n, name in enumerate(("hero", "coat"))
    }


def guidance(**options: Any) -> lw.ClipGuidance:
    call = SIZE | options.pop("call", {})
    given = {"concepts": {"hero": "hero", "coat": "coat"}, "steps": 2, "crops": 2, "guidance": 2.0}
    return lw.ClipGuidance(clip(), **(given | {"call": call} | options))


def picture(seed: int = 0) -> Image.Image:
    values = np.random.RandomState(seed).randint(0, 255, (pipes.SIZE, pipes.SIZE, 3))
    return Image.fromarray(values.astype("uint8"))


def best_last_layer(pipe: Any, picture: Image.Image, draws: int = 64) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The LoRA of the denoiser's last layer that predicts best, in least squares, what noise this picture was given."""
    seen: dict[str, torch.Tensor] = {}
    hook = pipe.unet.conv_out.register_forward_hook(lambda _, args, out: seen.update(read=args[0], said=out))
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].double() / 255
    generator = torch.Generator().manual_seed(5)
    latents = runs.encoded(pipe, pixels).expand(draws, -1, -1, -1)
    noise = torch.randn(latents.shape, generator=generator).double()
    noised = runs.noised(pipe, latents, noise, torch.randn(draws, generator=generator))
    with torch.no_grad():
        pipe.unet(noised.sample, noised.timestep, pipe.encode_prompt("a", "cpu", 1, False)[0].expand(draws, -1, -1))
    hook.remove()
    read = torch.nn.functional.unfold(seen["read"], 3, padding=1).mT.flatten(0, 1)
    lacking = (noised.target - seen["said"]).flatten(2).mT.flatten(0, 1)
    kernel = torch.linalg.lstsq(read, lacking).solution.mT.float()
    down = torch.eye(read.shape[1]).view(read.shape[1], -1, 3, 3)
    return {"unet.conv_out": (down, kernel[:, :, None, None])}


def gates(mixture: Mixture) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in mixture.gate_parameters()}


def train(mixture: Mixture, data: Any = None, objective: Any = None, **options: Any) -> lw.TrainingResult:
    given = {"steps": 2, "progress": False, "gradient_checkpointing": False} | options
    return lw.train_images(mixture, data or PROMPTS, objective or guidance(), **given)
