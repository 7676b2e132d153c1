"""LoRA files in the names of several trainers, and the pictures they must give."""

from __future__ import annotations

import pipes
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close

import loraweave as lw

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def kohya_sd15(path: str) -> str:
    part, _, inner = path.partition(".")
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}[part]
    return prefix + inner.replace(".", "_")


def kohya_sdxl(path: str) -> str:
    part, _, inner = path.partition(".")
    if part != "unet":
        nested = "" if inner.startswith("text_model.") else "text_model_"
        return {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}[part] + nested + inner.replace(".", "_")
    for name, sgm in {
        "down_blocks.1.attentions.0": "input_blocks.3.1",
        "mid_block.attentions.0": "middle_block.1",
        "up_blocks.0.attentions.0": "output_blocks.0.1",
        "up_blocks.0.attentions.1": "output_blocks.1.1",
    }.items():
        inner = inner.replace(name, sgm)
    return "lora_unet_" + inner.replace(".", "_")


def kohya(pairs: Mapping[str, tuple[Tensor, Tensor]], name: Callable[[str], str], alpha: float) -> dict[str, Tensor]:
    tensors = {}
    for path, (a, b) in pairs.items():
        stem = name(path)
        tensors |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b, f"{stem}.alpha": torch.tensor(alpha)}
    return {key: tensor.contiguous() for key, tensor in tensors.items()}


def same_picture(pipe: Any, path: Path, attach: Any) -> Any:
    """The mixture of this one file, after its picture equalled the one by way of diffusers."""
    mixture = attach(pipe, {"one": path}, lw.Sum())
    mixed = pipes.latents(pipe)
    mixture.detach()
    bare = pipes.latents(pipe)
    assert (mixed - bare).abs().max() > 0.01
    assert_close(mixed, pipes.latents(pipes.loaded(pipe, {"one": path})), **CLOSE)
    return mixture


def named(stem: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    return {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
