"""What the engine needs to know of diffusers pipelines; with ``diffusers_*.py`` beside it all that knows them."""

from __future__ import annotations

import copy
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loraweave.errors import LoraweaveError, unknown
from loraweave.integrations.diffusers_clock import StepClock
from loraweave.integrations.host import Host
from loraweave.mixing.anatomy import Anatomy, find_blocks, named_blocks
from loraweave.mixing.denoiser import Staging
from loraweave.mixing.stream import Arguments, Canvas, StreamSpec

_DENOISER = re.compile(r"(unet|transformer)(_\d+)?")
_ENCODER = re.compile(r"text_encoder(_\d+)?")
# Parts of transformer denoisers that read the prompt's tokens.
_TEXT = re.compile(
    r"\.(add_[qkv]_proj|to_add_out|ff_context|norm1_context|context_embedder|txt_in|caption_projection|text_embedder|"
    r"encoder_hid_proj)(\.|$)"
)
# Parts of transformer blocks that read the time (and pooled prompt), one vector a row, before any token is read.
_TIME = re.compile(r"\.norm\w*\.linear$")
_STAGES = ("down_blocks", "mid_block", "up_blocks")
_PARTS = ("resnets", "attentions", "motion_modules")  # and last of all what changes the size
_UNET_PART = re.compile(rf"\.({'|'.join(_STAGES)})(?:\.(\d+))?\.(\w+)\.(\d+)")
_STAGE = re.compile(r"(Up|Down|Mid)Block")
_UNBATCHED = frozenset({"img_ids", "txt_ids", "image_rotary_emb"})
_TIMES = ("timestep", "timesteps", "t")
_SCALES = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")


class Components(nn.Module):
    """The denoisers and text encoders of a pipeline under their own names, so that module paths start with these."""

    def __init__(self, parts: dict[str, nn.Module], name: str | None) -> None:
        super().__init__()
        for part, module in parts.items():
            self.add_module(part, module)
        self.name_or_path = name

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


def is_pipeline(model: Any) -> bool:
    """Whether this is a diffusers pipeline."""
    from diffusers import DiffusionPipeline

    return isinstance(model, DiffusionPipeline)


def load_pipeline(name: str, kind: str) -> Any:
    """A pipeline by its class and its folder or hub id, or ``zoo:images``; only safetensors are read.

    Raises:
        LoraweaveError: there is no such class, or it cannot be loaded.
    """
    import diffusers
    import transformers

    from loraweave import zoo

    found = getattr(diffusers, kind, None)
    if not (isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)):
        raise LoraweaveError(f"{kind!r} is no pipeline class of diffusers {diffusers.__version__}; pass model=")
    pipeline: Any = found
    if name.startswith(zoo.PREFIX) or not sys.stderr.isatty():
        # A bar for each file that is read is worth it for large models, and for people.
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    try:
        pipe = pipeline.from_pretrained(zoo.local(name), use_safetensors=True)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise LoraweaveError(f"pipeline {name!r}: cannot be loaded ({first})") from error
    for part in pipe.components.values():
        # diffusers reads its own models in fp32, but leaves those of transformers as they were saved.
        if isinstance(part, nn.Module) and getattr(part, "dtype", None) in (torch.float16, torch.bfloat16):
            part.float()
    return pipe


def scheduler_named(pipe: Any, name: str | None = None, options: Mapping[str, Any] | None = None) -> Any:
    """A fresh copy of the pipeline's scheduler, or one of another class with the same settings.

    Args:
        pipe: whose settings are kept.
        name: a scheduler class of diffusers; default: the pipeline's own.
        options: settings that differ.

    Raises:
        LoraweaveError: diffusers has no scheduler of this name, or an option is unknown or refused.
    """
    if name is None and not options:
        return copy.deepcopy(pipe.scheduler)
    import diffusers

    kind: Any = type(pipe.scheduler)
    if name is not None:
        known = [n for n in dir(diffusers) if n.endswith("Scheduler") and not n.startswith("Flax")]
        if name not in known:
            raise unknown("scheduler", name, known)
        kind = getattr(diffusers, name)
    allowed = [n for n in inspect.signature(kind.__init__).parameters if n not in ("self", "kwargs")]
    for option in options or ():
        if option not in allowed:
            raise unknown(f"option of {kind.__name__}", option, allowed)
    try:
        return kind.from_config(settings_of(pipe.scheduler), **(options or {}))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise LoraweaveError(
            f"scheduler {kind.__name__}: refuses its options ({str(error).splitlines()[0]})"
        ) from error


def settings_of(scheduler: Any) -> dict[str, Any]:
    """A scheduler's config from which another class keeps what the pipeline has changed.

    diffusers leaves out what was not in the file, even where the pipeline then set it, as Stable Diffusion's sets
    ``clip_sample``.
    """
    config = dict(scheduler.config)
    usual = inspect.signature(type(scheduler).__init__).parameters
    untouched = config.get("_use_default_values", [])
    config["_use_default_values"] = [n for n in untouched if n in usual and config[n] == usual[n].default]
    return config


def open_pipeline(pipe: Any, blocks: Iterable[str] | None = None) -> Host:
    """A pipeline's denoisers and text encoders, their streams, and where in a run a call is.

    Raises:
        LoraweaveError: it has no denoiser.
    """
    from loraweave.integrations.diffusers_files import read_expert
    from loraweave.integrations.diffusers_prompts import PromptWatch

    parts = {
        # torch.compile wraps a whole model; experts go into the model itself.
        name: getattr(part, "_orig_mod", part)
        for name, part in pipe.components.items()
        if isinstance(part, nn.Module) and (_DENOISER.fullmatch(name) or _ENCODER.fullmatch(name))
    }
    denoisers = tuple(name for name in parts if _DENOISER.fullmatch(name))
    encoders = tuple(name for name in parts if _ENCODER.fullmatch(name))
    if not denoisers:
        raise LoraweaveError(f"{type(pipe).__name__}: has no unet and no transformer that experts could extend")
    module = Components(parts, getattr(pipe, "name_or_path", None) or None)
    classes = {c for part in parts.values() for c in getattr(part, "_no_split_modules", None) or ()}
    # A UNet's stages hold many blocks, and register them in another order than they call them.
    classes = {c for c in classes if not _STAGE.search(c)}
    found = find_blocks(module, sorted(classes)) if blocks is None else named_blocks(module, blocks)
    staging = Staging(denoisers, encoders, StepClock(pipe), canvas, _TIMES, _UNBATCHED, _SCALES)
    anatomy = Anatomy(
        streams=(
            *(StreamSpec(name, name, mask=None, spatial=True) for name in denoisers),
            *(StreamSpec(f"{name}.text", name, mask=None) for name in denoisers),
            *(StreamSpec(f"{name}.time", name, mask=None) for name in denoisers),
            *(StreamSpec(name, name) for name in encoders),
        ),
        stream_of=partial(_stream_of, module),
        blocks=found,
        staging=staging,
        turn_of=_turn_of,
    )
    return Host(
        module,
        anatomy,
        pipe,
        partial(read_expert, pipe=pipe, parts=module),
        lambda mixture: PromptWatch(mixture).open(encoders),
    )


def _stream_of(module: Components, path: str) -> str:
    part, _, inner = path.partition(".")
    if not _DENOISER.fullmatch(part):
        return part
    if _TIME.search(f".{inner}"):
        return f"{part}.time"
    owner, _, leaf = path.rpartition(".")
    crosses = leaf in ("to_k", "to_v") and getattr(module.get_submodule(owner), "is_cross_attention", False)
    return f"{part}.text" if crosses or _TEXT.search(f".{inner}") else part


def _turn_of(path: str) -> tuple[int, ...]:
    """When a UNet calls a module: down, through the middle and up, each resnet before the attention of its number."""
    if path.rpartition(".")[2] == "conv_out":
        return (len(_STAGES),)
    found = _UNET_PART.search(path)
    if found is None:
        return ()
    stage, at, kind, number = found.groups()
    within = (int(number), _PARTS.index(kind)) if kind in _PARTS else (sys.maxsize,)
    return (_STAGES.index(stage), int(at or 0), *within)


def canvas(denoiser: nn.Module, get: Callable[[str], Any]) -> Canvas | None:
    """How the picture's tokens are laid out in a call, as far as its arguments tell."""
    prompt = get("encoder_hidden_states")
    text = prompt.shape[1] if isinstance(prompt, Tensor) and prompt.ndim == 3 else 0
    ids = get("img_ids")
    if isinstance(ids, Tensor):  # Flux packs its cells and says where each stands
        ids = ids[0] if ids.ndim == 3 else ids
        cells = ids[:, 1:3] * (ids[:, :1] == 0)  # others belong to given pictures
        bottom, right = cells.amax(0).tolist()  # both at once: reading waits for a GPU
        return Canvas(int(bottom) + 1, int(right) + 1, text)
    sample = get(Arguments(denoiser).names()[0])
    if not isinstance(sample, Tensor) or sample.ndim != 4:
        return None
    patch = getattr(getattr(denoiser, "config", None), "patch_size", None) or 1
    return Canvas(sample.shape[2] // patch, sample.shape[3] // patch, text)
