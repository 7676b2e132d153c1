"""What experts are attached to: a model, or the models of a diffusers pipeline."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from loraweave.errors import LoraweaveError
from loraweave.experts.types import Expert
from loraweave.mixing.anatomy import Anatomy

if TYPE_CHECKING:
    from loraweave.mixture import Mixture


@dataclass(frozen=True)
class Host:
    """A model or pipeline, as the mixture sees it.

    Attributes:
        module: what the experts' module paths start from.
        anatomy: its streams and blocks.
        pipeline: the diffusers pipeline whose models these are, if it is one.
        read: reads an expert's files for this very pipeline: source, name -> expert; ``None``: PEFT folders alone.
        watch: hangs hooks of its own in the model once a mixture stands there; they are removed with it.
    """

    module: nn.Module
    anatomy: Anatomy
    pipeline: Any = None
    read: Callable[[str | Path, str], Expert] | None = None
    watch: Callable[[Mixture], list[RemovableHandle]] | None = None


def open_host(model: Any, blocks: Iterable[str] | None = None) -> Host:
    """Look at a transformers model (or another module) or a diffusers pipeline.

    Raises:
        LoraweaveError: it is neither, or a pipeline without a denoiser.
    """
    if isinstance(model, nn.Module):
        from loraweave.integrations.transformers import anatomy

        return Host(model, anatomy(model, blocks))
    if "diffusers" in sys.modules:
        from loraweave.integrations import diffusers

        if diffusers.is_pipeline(model):
            return diffusers.open_pipeline(model, blocks)
    raise LoraweaveError(f"model: expected a torch module or a diffusers pipeline, got {type(model).__name__}")
