"""CLIP as a differentiable judge of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from loraweave.errors import LoraweaveError

# What OpenAI's models were trained with, for folders that do not say.
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Clip(nn.Module):
    """A frozen ``transformers.CLIPModel`` and its tokenizer.

    Args:
        model: a ``CLIPModel``.
        tokenizer: its tokenizer.
        mean, std: by which pixels between 0 and 1 are normalised, a number a channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, tokenizer: Any, mean: Sequence[float] = _MEAN, std: Sequence[float] = _STD) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.size = int(model.config.vision_config.image_size)
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def pictures(self, pictures: Tensor) -> Tensor:
        """``[rows, 3, height, width]`` between 0 and 1 -> unit vectors ``[rows, width]``, with gradient.

        Whole pictures are resized (bicubic) to the model's square, none of them is cut.
        """
        side = (self.size, self.size)
        x = pictures.to(self.mean.device, torch.float32)
        if x.shape[2:] != side:
            x = interpolate(x, side, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        x = ((x - self.mean) / self.std).to(self.model.dtype)
        # In its own precision: autocast fails on what is stored in another half precision.
        with torch.autocast(x.device.type, enabled=False):
            found = self.model.get_image_features(pixel_values=x)
        return normalize(_tensor(found).float(), dim=-1)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Texts -> unit vectors ``[rows, width]``; what is longer than the model reads is cut."""
        longest = self.model.config.text_config.max_position_embeddings
        read = self.tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        ids, mask = read["input_ids"].to(self.mean.device), read["attention_mask"].to(self.mean.device)
        found = self.model.get_text_features(input_ids=ids, attention_mask=mask)
        return normalize(_tensor(found).float(), dim=-1)


def load_clip(source: Any) -> Clip:
    """A :class:`Clip`, or the one in a folder, on the hub or bundled (``zoo:images/clip-objective``).

    Only safetensors are read.

    Raises:
        LoraweaveError: there is no CLIP model, or no tokenizer beside it.
    """
    if isinstance(source, Clip):
        return source
    if not isinstance(source, str | Path):
        raise LoraweaveError(f"clip: expected a folder, a hub id or a Clip, got {type(source).__name__}")
    from transformers import AutoConfig, AutoTokenizer, CLIPModel
    from transformers.image_processing_base import ImageProcessingMixin

    from loraweave import zoo

    source = zoo.local(str(source))
    try:
        config = AutoConfig.from_pretrained(source)
        kind = getattr(config, "model_type", None)
        if kind != "clip":
            raise LoraweaveError(f"clip {str(source)!r}: expected a CLIP model of transformers, got a {kind!r} model")
        model = CLIPModel.from_pretrained(source, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except LoraweaveError:
        raise
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise LoraweaveError(f"clip {str(source)!r}: no CLIP model of transformers there ({first})") from error
    try:
        said = ImageProcessingMixin.get_image_processor_dict(source)[0]
    except OSError:
        said = {}  # saved without its processor
    return Clip(model, tokenizer, said.get("image_mean", _MEAN), said.get("image_std", _STD))


def _tensor(found: Any) -> Tensor:
    """Features of transformers 5 come with what they were pooled from."""
    features: Tensor = getattr(found, "pooler_output", found)
    return features
