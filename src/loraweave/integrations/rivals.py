"""Contestants that are no LoRAs: Textual Inversion, Custom Diffusion and DreamBooth, by diffusers' loaders; SVDiff.

Each function checks the files against the pipeline at once, before anything is loaded, and gives a block: within it the
pipeline paints with them, afterwards it is what it was, object for object. Files and folders of this machine, and only
safetensors: diffusers itself would fall back to pickles.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from loraweave.errors import LoraweaveError, LoraweaveWarning
from loraweave.experts.mapped import open_tensors
from loraweave.experts.weightfile import MIXABLE_DTYPES, PICKLES, Header, pickle_refused, read_header
from loraweave.integrations.diffusers import open_pipeline
from loraweave.integrations.svdiff import apply_shifts, compose_shifts, read_shifts, shifted_weights
from loraweave.mixing.layer import MixingLayer

_EMBEDDING = "learned_embeds.safetensors"
_SHIFTS = "spectral_shifts"
_CUSTOM = "pytorch_custom_diffusion_weights.safetensors"
_ENCODERS = {"text_encoder": ("tokenizer", "clip_l"), "text_encoder_2": ("tokenizer_2", "clip_g")}
"""Text encoder -> its tokenizer, and its tensor in the embedding files of pipelines that have both."""


class Loading:
    """A block in which a pipeline paints with something that diffusers loaded.

    Attributes:
        tokens: the words that it adds to the tokenizer; a prompt needs them.
    """

    def __init__(self, block: AbstractContextManager[None], tokens: Iterable[str] = ()) -> None:
        self._block = block
        self.tokens = tuple(tokens)

    def warn_of_tokens(self, label: str, prompts: Sequence[str]) -> None:
        """Warn if prompts have none of the words; ``label`` stands in front."""
        without = [text for text in prompts if not any(token.lower() in text.lower() for token in self.tokens)]
        if self.tokens and without:
            warnings.warn(
                f"{label}: {len(without)} of {len(prompts)} prompts have none of its words ({_few(self.tokens)}), as "
                f"{without[0]!r}; 'words' beside it says what to read instead of other words",
                LoraweaveWarning,
                stacklevel=2,
            )

    def __enter__(self) -> None:
        self._block.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._block.__exit__(kind, error, trace)


def textual_inversion(pipe: Any, sources: Mapping[str, str | Path]) -> Loading:
    """Textual Inversion (Gal et al. 2022, https://arxiv.org/abs/2208.01618): new words with trained embeddings.

    Within the block a copy of text encoder and tokenizer, extended by ``pipe.load_textual_inversion``, stands in.

    Args:
        pipe: a pipeline of the Stable Diffusion family, with nothing attached to it.
        sources: word of the prompt -> its file, one tensor ``[width]`` or ``[vectors, width]`` (of a pipeline with two
            text encoders ``clip_l`` and ``clip_g``), or a folder with ``learned_embeds.safetensors``.

    Raises:
        LoraweaveError: a file is missing, a pickle or damaged, its tensors do not fit the text encoder, or the
            tokenizer knows the word.
    """
    _check_bare(pipe)
    encoders = {part: names for part, names in _ENCODERS.items() if getattr(pipe, part, None) is not None}
    if not encoders or not hasattr(pipe, "load_textual_inversion"):
        raise LoraweaveError(f"{type(pipe).__name__}: diffusers loads no textual inversions into it")
    if not sources:
        raise LoraweaveError("textual inversion: expected word -> file, at least one, got none")
    tokenizers = {part: getattr(pipe, names[0]) for part, names in encoders.items()}
    taken = {word for tokenizer in tokenizers.values() for word in tokenizer.get_vocab()}
    found: dict[str, dict[str, Tensor]] = {part: {} for part in encoders}
    for token, source in sources.items():
        header = read_header(_file(Path(source), _EMBEDDING))
        keys = {part: key for part, (_, key) in encoders.items()}
        if len(encoders) == 1:
            keys = dict(zip(encoders, header.tensors, strict=False))
        if set(keys.values()) != set(header.tensors) or len(keys) != len(encoders):
            wanted = "one tensor" if len(encoders) == 1 else f"the tensors {', '.join(keys.values())}"
            raise LoraweaveError(
                f"{header.path}: expected {wanted}, got {len(header.tensors)} ({_few(header.tensors)})"
            )
        vectors = 0
        for part, key in keys.items():
            found[part][token] = _embedding(header, key, pipe, part, tokenizers[part])
            vectors = max(vectors, len(found[part][token]))
        # A prompt's <a> becomes <a> <a>_1 ... as far as the tokenizer knows them.
        words = [token, *(f"{token}_{n}" for n in range(1, vectors + 1))]
        for word in words:
            if word in taken or word != word.strip() or not word:
                raise LoraweaveError(
                    f"textual inversion of {token!r} ({header.path}): expected a word that the tokenizer does not "
                    f"have, but {word!r} is taken, empty, or has space around it; give it another, such as "
                    f"'<{token.strip(' <>')}-1>'"
                )
        taken.update(words)
    return Loading(_with_tokens(pipe, found), sources)


def custom_diffusion(pipe: Any, folder: str | Path) -> Loading:
    """Custom Diffusion (Kumari et al. 2022, https://arxiv.org/abs/2212.04488): new keys and values in cross-attention.

    Args:
        pipe: a pipeline with a UNet and nothing attached to it.
        folder: as diffusers' training script leaves it: ``pytorch_custom_diffusion_weights.safetensors``, which
            ``unet.load_attn_procs`` reads, and a file for each new word, called by its only tensor.

    Raises:
        LoraweaveError: a file is missing, a pickle or damaged, or does not fit the UNet or the text encoder.
    """
    _check_bare(pipe)
    unet: Any = getattr(pipe, "unet", None)
    if not hasattr(unet, "load_attn_procs"):
        raise LoraweaveError(f"{type(pipe).__name__}: Custom Diffusion is for pipelines with a UNet")
    folder = Path(folder)
    if folder.is_file():
        raise LoraweaveError(f"{folder}: expected the folder that holds {_CUSTOM}, got a file")
    header = read_header(_file(folder, _CUSTOM))
    for pickle in (path for path in sorted(folder.iterdir()) if path.suffix in PICKLES):
        if not pickle.with_suffix(".safetensors").exists():
            raise pickle_refused(pickle)
    # Safetensors have no place for layers without weights, without which diffusers refuses the rest.
    weights: dict[str, Any] = {name: {} for name in unet.attn_processors if not _under(name, header.tensors)}
    expected: dict[str, tuple[int, ...]] = {}
    for name in unet.attn_processors:
        if own := _under(name, header.tensors):
            expected |= _custom_shapes(name, unet.get_submodule(name.removesuffix(".processor")), own)
    _check_shapes(header, expected, "the UNet's attention layers")
    read = open_tensors(header)
    weights |= {key: _finite(header, key, read(key)) for key in header.tensors}
    embeddings = {}
    for path in sorted(folder.glob("*.safetensors")):
        if path.name != _CUSTOM:
            keys = list(read_header(path).tensors)
            if len(keys) != 1:
                raise LoraweaveError(f"{path}: expected one tensor, a new word's embedding, got {len(keys)}")
            embeddings[keys[0]] = path
    tokens = textual_inversion(pipe, embeddings) if embeddings else None
    return Loading(_with_processors(pipe, weights, tokens), embeddings)


def dreambooth(pipe: Any, folder: str | Path) -> Loading:
    """A DreamBooth checkpoint (Ruiz et al. 2022, https://arxiv.org/abs/2208.12242): the same models, trained further.

    Args:
        pipe: a pipeline with nothing attached to it.
        folder: of a whole pipeline, of which denoiser and text encoders are taken, or of a denoiser. VAE, tokenizer and
            scheduler stay the pipeline's own.

    Raises:
        LoraweaveError: a file is missing, a pickle or damaged, or its tensors are not those of the pipeline's model.
    """
    _check_bare(pipe)
    folder = Path(folder)
    parts = dict(open_pipeline(pipe).module.named_children())
    denoiser = next(name for name in parts if not name.startswith("text_encoder"))
    if (folder / "model_index.json").is_file():
        places = {name: folder / name for name in parts if name == denoiser or (folder / name).is_dir()}
    elif (folder / "config.json").is_file():
        places = {denoiser: folder}
    else:
        raise LoraweaveError(
            f"{folder}: expected the folder of a pipeline (with model_index.json) or of a {denoiser} (with config.json)"
        )
    for name, place in places.items():
        _check_part(parts[name], name, place)
    return Loading(_with_parts(pipe, {name: (parts[name], place) for name, place in places.items()}))


def svdiff(pipe: Any, sources: Iterable[str | Path]) -> Loading:
    """Spectral shifts (SVDiff) of several concepts, added up: see :mod:`loraweave.integrations.svdiff`.

    Args:
        pipe: a pipeline with a UNet and nothing attached to it.
        sources: files of shifts for the UNet, or folders with ``spectral_shifts.safetensors`` and, if the text
            encoder is shifted, too, ``spectral_shifts_te.safetensors``.

    Raises:
        LoraweaveError: as :func:`loraweave.integrations.svdiff.read_shifts`, ``compose_shifts`` and ``apply_shifts``.
    """
    _check_bare(pipe)
    files = [_file(Path(source), f"{_SHIFTS}.safetensors") for source in sources]
    beside = [path.with_name(f"{_SHIFTS}_te.safetensors") for path in files if path.stem == _SHIFTS]
    read = {
        "unet": [read_shifts(path) for path in files],
        "text_encoder": [read_shifts(path) for path in beside if path.exists()],
    }
    if not files:
        raise LoraweaveError("svdiff: expected at least one file of shifts, got none")
    composed = {part: compose_shifts(shifts) for part, shifts in read.items() if shifts}
    for part, shifts in composed.items():
        if not isinstance(getattr(pipe, part, None), nn.Module):
            raise LoraweaveError(f"{type(pipe).__name__}: spectral shifts are for its {part}, which it does not have")
        shifted_weights(getattr(pipe, part), shifts)
    return Loading(_with_shifts(pipe, composed))


@contextmanager
def _with_shifts(pipe: Any, shifts: Mapping[str, Mapping[str, Tensor]]) -> Iterator[None]:
    with ExitStack() as stack:
        for part, own in shifts.items():
            stack.enter_context(apply_shifts(getattr(pipe, part), own))
        yield


@contextmanager
def _with_tokens(pipe: Any, found: Mapping[str, Mapping[str, Tensor]]) -> Iterator[None]:
    copies: dict[str, Any] = {}
    for part in found:
        for name in (part, _ENCODERS[part][0]):
            copies[name] = copy.deepcopy(getattr(pipe, name))
    with _standing_in(pipe, copies):
        for part, embeddings in found.items():
            with torch.random.fork_rng():  # new rows are drawn at random before they are set
                pipe.load_textual_inversion(
                    [{token: vectors} for token, vectors in embeddings.items()],
                    tokenizer=copies[_ENCODERS[part][0]],
                    text_encoder=copies[part],
                )
        yield


@contextmanager
def _with_processors(pipe: Any, weights: dict[str, Any], tokens: Loading | None) -> Iterator[None]:
    own = pipe.unet.attn_processors
    with ExitStack() as stack:
        if tokens is not None:
            stack.enter_context(tokens)
        stack.callback(lambda: pipe.unet.set_attn_processor(dict(own)))
        # Without its pipeline diffusers (0.42) reads everything and changes nothing.
        pipe.unet.load_attn_procs(weights, _pipeline=pipe)
        yield


@contextmanager
def _with_parts(pipe: Any, parts: Mapping[str, tuple[nn.Module, Path]]) -> Iterator[None]:
    loaded = {}
    for name, (own, place) in parts.items():
        kind: Any = type(own)
        try:
            model, told = kind.from_pretrained(
                place, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise LoraweaveError(f"{place}: cannot be loaded as {name} ({first})") from error
        if told["missing_keys"]:
            raise LoraweaveError(f"{place}: tensors of the {name} are missing: {_few(told['missing_keys'])}")
        first_own = next(own.parameters())
        loaded[name] = model.to(device=first_own.device, dtype=first_own.dtype).eval()
    with _standing_in(pipe, loaded):
        yield


@contextmanager
def _standing_in(pipe: Any, parts: Mapping[str, Any]) -> Iterator[None]:
    """Within the block the pipeline has these components instead of its own."""
    own = {name: getattr(pipe, name) for name in parts}
    try:
        for name, part in parts.items():
            setattr(pipe, name, part)
        yield
    finally:
        for name, part in own.items():
            setattr(pipe, name, part)


def _check_bare(pipe: Any) -> None:
    for name, part in pipe.components.items():
        if not isinstance(part, nn.Module):
            continue
        if any(isinstance(module, MixingLayer) for module in part.modules()):
            raise LoraweaveError(f"experts are attached to {name!r}; call mixture.detach() first")
        if hasattr(part, "_hf_hook"):
            raise LoraweaveError(f"{name!r} is offloaded by accelerate; load before pipe.enable_model_cpu_offload()")


def _check_part(part: nn.Module, name: str, place: Path) -> None:
    """Raise unless the weights in ``place`` have the shapes of ``part``; names differ between library versions."""
    if (place / "adapter_config.json").exists():
        raise LoraweaveError(f"{place}: expected whole weights, there is an adapter (adapter_config.json) beside them")
    headers = [read_header(path) for path in _weight_files(place, hasattr(part, "register_to_config"))]
    found = {key: info.shape for h in headers for key, info in h.tensors.items() if info.dtype in MIXABLE_DTYPES}
    named = part.state_dict(keep_vars=True).items()
    own = {id(tensor): (key, tuple(tensor.shape)) for key, tensor in named if tensor.is_floating_point()}
    expected = dict(own.values())  # tied weights once
    if sorted(found.values()) == sorted(expected.values()):
        return
    for key, shape in expected.items():
        if key in found and found[key] != shape:
            raise LoraweaveError(
                f"{place}: tensor {key!r} has the shape {list(found[key])}, the pipeline's {name} has {list(shape)}; "
                "is it of another base?"
            )
    raise LoraweaveError(
        f"{place}: expected the {len(expected)} tensors of the pipeline's {name}, got {len(found)}, of other shapes "
        "in part; is it of another base?"
    )


def _weight_files(place: Path, of_diffusers: bool) -> list[Path]:
    """The files that diffusers or transformers read; an index may name nothing but safetensors of its own folder."""
    stem = "diffusion_pytorch_model" if of_diffusers else "model"
    index = place / f"{stem}.safetensors.index.json"
    if not index.exists():
        return [_file(place, f"{stem}.safetensors")]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, RecursionError, LookupError, AttributeError, TypeError) as error:
        raise LoraweaveError(f"{index}: cannot be read as the index of weights ({error})") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise LoraweaveError(f"{index}: expected names of safetensors files in its folder, got {name!r:.120}")
    return [place / name for name in names]


def _custom_shapes(name: str, attention: Any, keys: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Custom Diffusion's tensors of one attention layer: keys and values, or these with queries and outputs."""
    own = {"to_k_custom_diffusion.weight": attention.to_k.weight, "to_v_custom_diffusion.weight": attention.to_v.weight}
    if any(".to_q_" in key or ".to_out_" in key for key in keys):
        own["to_q_custom_diffusion.weight"] = attention.to_q.weight
        own["to_out_custom_diffusion.0.weight"] = attention.to_out[0].weight
        own["to_out_custom_diffusion.0.bias"] = attention.to_out[0].weight[:, 0]
    return {f"{name}.{key}": tuple(tensor.shape) for key, tensor in own.items()}


def _check_shapes(header: Header, expected: Mapping[str, tuple[int, ...]], what: str) -> None:
    for key, info in header.tensors.items():
        if key not in expected:
            raise LoraweaveError(f"{header.path}: tensor {key[:120]!r} has no place in {what}; is it of another base?")
        if info.shape != expected[key] or info.dtype not in MIXABLE_DTYPES:
            raise LoraweaveError(
                f"{header.path}: tensor {key[:120]!r} is {info.dtype} {list(info.shape)}, {what} have "
                f"{list(expected[key])}; is it of another base?"
            )
    if missing := [key for key in expected if key not in header.tensors]:
        raise LoraweaveError(f"{header.path}: tensors are missing: {_few(missing)}")
    if not expected:
        raise LoraweaveError(f"{header.path}: there are no tensors in it")


def _embedding(header: Header, key: str, pipe: Any, part: str, tokenizer: Any) -> Tensor:
    """``[vectors, width]``."""
    width = getattr(pipe, part).get_input_embeddings().weight.shape[1]
    info, most = header.tensors[key], tokenizer.model_max_length - 2
    shape = info.shape if len(info.shape) == 2 else (1, *info.shape)
    if len(shape) != 2 or shape[1] != width or not 1 <= shape[0] <= most or info.dtype not in MIXABLE_DTYPES:
        raise LoraweaveError(
            f"{header.path}: tensor {key[:120]!r} is {info.dtype} {list(info.shape)}, expected [{width}], or 1 to "
            f"{most} such vectors, as the words of {part} are; is it of another base?"
        )
    return _finite(header, key, open_tensors(header)(key)).view(shape)


def _finite(header: Header, key: str, tensor: Tensor) -> Tensor:
    if not tensor.isfinite().all():
        raise LoraweaveError(f"{header.path}: tensor {key[:120]!r} expected finite numbers, got NaN or infinity")
    return tensor.clone()


def _file(place: Path, name: str) -> Path:
    """``place``, or the file called so in the folder ``place``; a pickle in its stead is refused as one."""
    if not place.is_dir():
        if place.suffix in PICKLES:
            raise pickle_refused(place)
        return place
    path = place / name
    if not path.exists():
        for suffix in PICKLES:
            if path.with_suffix(suffix).exists():
                raise pickle_refused(path.with_suffix(suffix))
        raise LoraweaveError(f"{place}: expected a file {name} in it")
    return path


def _under(name: str, keys: Iterable[str]) -> list[str]:
    return [key for key in keys if key.startswith(f"{name}.")]


def _few(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(name[:120] for name in listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
