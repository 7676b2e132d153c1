"""LoRA files as they circulate (diffusers, kohya/civitai, PEFT), read for a pipeline with diffusers' own converters."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from loraweave.errors import LoraweaveError, LoraweaveWarning
from loraweave.experts import lycoris
from loraweave.experts.checks import value_problem
from loraweave.experts.config import CONFIG_NAME, AdapterConfig
from loraweave.experts.mapped import open_tensors
from loraweave.experts.report import ExpertReport
from loraweave.experts.single_file import configs, convention, inspect_file, is_of_text, refusals, scale_of
from loraweave.experts.sources import WEIGHTS_NAME
from loraweave.experts.types import Expert, LoraFactors
from loraweave.experts.weightfile import MIXABLE_DTYPES, PICKLES, Header, pickle_refused, read_header

_WEIGHTS = "pytorch_lora_weights.safetensors"
_WHOLE = ("I64", "I32", "I16", "I8", "U8")
"""Dtypes that some trainers keep alphas in."""
_WRAPPER = "lycoris_"
"""What names begin with where LyCORIS itself wrapped a denoiser."""


def read_expert(source: str | Path, name: str, *, pipe: Any, parts: nn.Module) -> Expert:
    """Read a LoRA for a pipeline; its module paths begin with the pipeline's own names (``unet.``, ``text_encoder.``).

    Args:
        source: a ``.safetensors`` file, a folder that holds one, a PEFT folder or its hub id.
        name: what to call the expert.
        pipe: the pipeline, whose class converts the names in the file.
        parts: its models under their names.

    Raises:
        LoraweaveError: it cannot be read or mixed, or nothing in it fits the pipeline. What fits in part warns.
    """
    path = Path(source).expanduser()
    modules = dict(parts.named_modules())
    file = _file(path)
    if file is None:
        return _peft_folder(source, name, pipe, modules)
    header = read_header(file)
    for problem in refusals(header):
        raise LoraweaveError(f"{file}: {problem}")
    report = inspect_file(str(source), file)
    found = _Found.read(header, pipe, modules)
    factors, unmatched = _factors(found, header, modules)
    if not factors or _beside_the_denoiser(factors, unmatched):
        raise LoraweaveError(_misfit(file, pipe, report, factors, unmatched, len(header.tensors)))
    report = _told(report, factors, header, unmatched)
    if unmatched:
        warnings.warn(
            f"{file}: {len(unmatched)} of {len(header.tensors)} tensors fit nothing in {type(pipe).__name__} and are "
            f"not used: {_some(unmatched)}",
            LoraweaveWarning,
            stacklevel=2,
        )
    return Expert(name, factors, source=str(source), sha256=report.sha256, base=report.base, report=report)


def _beside_the_denoiser(placed: Iterable[str], unplaced: Iterable[str]) -> bool:
    """Whether text encoders alone were found, of an expert that extends a denoiser too: it is another family's."""
    return all(is_of_text(name) for name in placed) and any(
        not is_of_text(name) and not name.endswith(".alpha") for name in unplaced
    )


def _misfit(
    file: Path, pipe: Any, report: ExpertReport, factors: Mapping[str, LoraFactors], unmatched: list[str], tensors: int
) -> str:
    """Why a file is refused of which nothing, or nothing but text encoders, fits."""
    what = "of its denoiser nothing" if factors else "nothing in it"
    guess = f"; it looks made for {report.architecture}" if report.architecture else ""
    if report.architecture == "SD3" and report.format == "kohya" and "StableDiffusion3" in type(pipe).__name__:
        guess = "; it is kohya's for SD3, which diffusers cannot convert: have it in diffusers' own format"
    return f"{file}: {what} fits {type(pipe).__name__}{guess}; unmatched, of {tensors} tensors: {_some(unmatched)}"


def _file(path: Path) -> Path | None:
    """The single weight file that a path means; ``None`` for a PEFT folder or a hub id."""
    if path.is_file():
        if path.suffix in PICKLES:
            raise pickle_refused(path)
        beside = path.name == WEIGHTS_NAME and (path.parent / CONFIG_NAME).is_file()
        return None if beside else path
    if path.suffix == ".safetensors" and not path.exists():
        raise LoraweaveError(f"{path}: no such file")
    if not path.is_dir() or (path / CONFIG_NAME).is_file():
        return None
    if (path / _WEIGHTS).is_file():
        return path / _WEIGHTS
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    pickles = sorted(file for file in path.iterdir() if file.suffix in PICKLES)
    if not files and pickles:
        raise pickle_refused(pickles[0])
    names = ", ".join(file.name for file in files[:5]) or "none"
    raise LoraweaveError(f"{path}: expected one .safetensors file or a PEFT folder, got {names}; name the file itself")


def _peft_folder(source: str | Path, name: str, pipe: Any, modules: Mapping[str, nn.Module]) -> Expert:
    """A PEFT folder: made for one of the models, or for the pipeline's models under their names."""
    from loraweave.experts.reader import read_expert as read_peft

    path = Path(source).expanduser()
    expert = read_peft(path.parent if path.is_file() else source, name)
    factors, missing = {}, []
    for module, one in expert.factors.items():
        place = _place(module, modules)
        if place is None:
            missing.append(module)
        else:
            factors[place] = _shaped(one, modules[place])
    if not factors:
        raise LoraweaveError(f"{source}: none of its modules exists in this pipeline; the first is {missing[0]!r}")
    if _beside_the_denoiser(factors, [name for name in missing if name.startswith(("unet.", "transformer."))]):
        raise LoraweaveError(
            f"{source}: of its denoiser nothing fits {type(pipe).__name__}; missing modules: {_some(missing)}"
        )
    if missing:
        warnings.warn(
            f"{source}: {len(missing)} of {len(expert.factors)} modules do not exist in this pipeline and are not "
            f"used: {_some(missing)}",
            LoraweaveWarning,
            stacklevel=3,
        )
    return replace(expert, factors=factors)


@dataclass
class _Found:
    """What diffusers' converter made of a file.

    Attributes:
        sides: module path as the converter names it -> ``A`` and ``B`` -> the tensor.
        alphas: module path -> alpha.
        origins: module path -> names of the tensors in the file it came from.
        configs: model's name -> the PEFT configuration that diffusers saved in the header.
    """

    sides: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    origins: dict[str, set[str]] = field(default_factory=dict)
    configs: dict[str, AdapterConfig] = field(default_factory=dict)

    @classmethod
    def read(cls, header: Header, pipe: Any, modules: Iterable[str]) -> _Found:
        """Load the factors, with every tensor remembering its name, and let the pipeline's class convert them."""
        tensors = _loaded(header)
        if wrapped := {key: tensor for key, tensor in tensors.items() if key.startswith(_WRAPPER)}:
            return cls.wrapped(wrapped, modules)
        if not hasattr(pipe, "lora_state_dict"):
            raise LoraweaveError(f"{type(pipe).__name__}: diffusers reads no LoRA files for it; use PEFT folders")
        options: dict[str, Any] = {"return_alphas": True}
        if getattr(pipe, "unet", None) is not None and hasattr(pipe, "text_encoder_2"):
            options["unet_config"] = pipe.unet.config
        try:
            with _quiet():
                converted = pipe.lora_state_dict(tensors, **options)
        except Exception as error:  # converters assert, index and convert as they please
            first = " ".join(str(error).split())[:300]
            raise LoraweaveError(
                f"{header.path}: diffusers cannot convert it for {type(pipe).__name__} ({type(error).__name__}: "
                f"{first}); is it made for another kind of model?"
            ) from error
        state, alphas = (converted[0], converted[1] or {}) if isinstance(converted, tuple) else (converted, {})
        found = cls(configs=configs(header))
        for key, tensor in state.items():
            if key.endswith(".alpha") and isinstance(tensor, Tensor) and tensor.numel() == 1:
                alphas = {**alphas, key: tensor}
        for key, peft_key in _peft_names([key for key in state if not key.endswith(".alpha")]).items():
            module, _, side = peft_key.removesuffix(".weight").rpartition(".lora_")
            if side in ("A", "B"):
                found.sides.setdefault(module, {})[side] = state[key].as_subclass(Tensor)
                found.origins.setdefault(module, set()).update(getattr(state[key], "origins", {key}))
        for key, value in alphas.items():
            stem = key.removesuffix(".alpha")
            module = _peft_names([stem])[stem].partition(".lora_A")[0].replace(".processor.", ".")
            found.alphas[module] = float(value)
            found.origins.setdefault(module, set()).add(key)
        return found

    @classmethod
    def wrapped(cls, tensors: Mapping[str, Tensor], modules: Iterable[str]) -> _Found:
        """Names that LyCORIS gave to the parts of a denoiser it wrapped: the path with ``_`` for every dot.

        Only the model itself tells which of them were dots, so this needs no converter.
        """
        paths: dict[str, str] = {}
        for path in modules:
            inner = path.partition(".")[2]
            if inner and not is_of_text(path):
                paths.setdefault(inner.replace(".", "_"), path)
        found = cls()
        for key, tensor in tensors.items():
            stem, _, ending = key.removeprefix(_WRAPPER).partition(".")
            path, side = paths.get(stem, stem), {"lora_down.weight": "A", "lora_up.weight": "B"}.get(ending)
            if side is not None:
                found.sides.setdefault(path, {})[side] = tensor.as_subclass(Tensor)
            elif ending == "alpha":
                found.alphas[path] = float(tensor)
            found.origins.setdefault(path, set()).update(getattr(tensor, "origins", {key}))
        return found


def _loaded(header: Header) -> dict[str, Tensor]:
    """The file's tensors, ready for a converter: in pairs where it insists on that, with their names attached."""
    kohya = convention(header.tensors) in ("kohya", "lycoris")
    small = lycoris.modules({key: info.shape for key, info in header.tensors.items()})
    stems = {key.removesuffix(".lora_down.weight") for key in header.tensors if key.endswith(".lora_down.weight")}
    stems &= {key.removesuffix(".lora_up.weight") for key in header.tensors if key.endswith(".lora_up.weight")}
    stems = {stem for stem in stems if not stem.startswith("lora_te3_")}
    get = open_tensors(header)

    def checked(key: str) -> Tensor:
        dtype = header.tensors[key].dtype
        whole = key.endswith(".alpha") and dtype in _WHOLE
        if dtype not in MIXABLE_DTYPES and not whole:
            raise LoraweaveError(
                f"{header.path}: tensor {key!r} has dtype {dtype}; expected one of {', '.join(MIXABLE_DTYPES)}"
            )
        tensor = get(key).float() if whole else get(key)
        if problem := value_problem(header, key, tensor):
            raise LoraweaveError(problem)
        return tensor

    tensors: dict[str, Tensor] = {}
    for key in header.tensors:
        stem = key.removesuffix(".lora_down.weight").removesuffix(".lora_up.weight").removesuffix(".alpha")
        if not kohya or stem in stems:  # the rest is reported as unmatched; converters stumble over half a pair
            tensors[key] = _Traced.of(checked(key), key)
    for module, one in small.items():
        A, B = one.factors(checked)
        alpha = f"{module}.alpha"
        scale = one.scale(float(checked(alpha)) if alpha in header.tensors else None)
        names = [*one.keys.values(), *([alpha] if alpha in header.tensors else [])]
        for ending, tensor in (
            ("lora_down.weight", A),
            ("lora_up.weight", B),
            ("alpha", torch.tensor(scale * one.rank)),
        ):
            tensors[f"{module}.{ending}"] = _Traced.of(tensor, *names)
    return tensors


class _Traced(Tensor):
    """A tensor that remembers under which names in the file it, or what it was made of, was stored."""

    origins: frozenset[str]

    @classmethod
    def of(cls, tensor: Tensor, *names: str) -> _Traced:
        made: _Traced = tensor.as_subclass(cls)
        made.origins = frozenset(names)
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = [leaf for leaf in tree_flatten((args, dict(kwargs or {})))[0] if isinstance(leaf, _Traced)]
        names = frozenset().union(*(getattr(leaf, "origins", frozenset()) for leaf in given))
        out = super().__torch_function__(func, types, args, kwargs or {})
        for leaf in tree_flatten(out)[0]:
            if isinstance(leaf, _Traced):
                leaf.origins = names
        return out


def _peft_names(keys: Sequence[str]) -> dict[str, str]:
    """Converter's name -> PEFT's (``....lora_A.weight``), by the tables that diffusers' loaders use."""
    from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
    from diffusers.utils.state_dict_utils import StateDictType

    names = {}
    for key in keys:
        if ".lora_A" in key or ".lora_B" in key:
            names[key] = key
        elif key.startswith("text_encoder"):
            old = "_lora." in key
            kind = StateDictType.DIFFUSERS_OLD if old else StateDictType.DIFFUSERS
            names[key] = next(iter(convert_state_dict_to_peft({key: None}, original_type=kind)))
        else:
            names[key] = next(iter(convert_unet_state_dict_to_peft({key: None})))
    return names


def _factors(
    found: _Found, header: Header, modules: Mapping[str, nn.Module]
) -> tuple[dict[str, LoraFactors], list[str]]:
    """The factors of modules that exist, and the names of tensors in the file that serve none of them."""
    factors: dict[str, LoraFactors] = {}
    used: set[str] = set()
    for module, sides in found.sides.items():
        place = _place(module, modules)
        if place is None or sides.keys() != {"A", "B"}:
            continue
        a, b = sides["A"], sides["B"]
        if a.ndim not in (2, 4) or b.ndim not in (2, 4) or not a.shape[0] or a.shape[0] != b.shape[1]:
            raise LoraweaveError(
                f"{header.path}: factors of {module!r} have shapes {list(a.shape)} and {list(b.shape)}, which do not "
                "fit"
            )
        if b.ndim == 4 and b.shape[2:] != (1, 1):
            raise LoraweaveError(f"{header.path}: B of {module!r} has shape {list(b.shape)}; expected a 1 x 1 kernel")
        scale = scale_of(module, a.shape[0], found.alphas.get(module), found.configs)
        if not math.isfinite(scale):
            raise LoraweaveError(f"{header.path}: alpha of {module!r} is not finite")
        factors[place] = _shaped(LoraFactors(a, b.flatten(1), scale), modules[place])
        used |= found.origins[module]
    stems = {_stem(key) for key in used}
    return factors, [key for key in header.tensors if key not in used and not _serves(key, stems)]


def _serves(key: str, stems: set[str]) -> bool:
    """Whether this is the alpha of a module that was used."""
    return key.endswith(".alpha") and _stem(key) in stems


def _stem(key: str) -> str:
    for ending in (".alpha", ".lora_down.weight", ".lora_up.weight", ".lora_A.weight", ".lora_B.weight"):
        key = key.removesuffix(ending)
    return key


def _place(module: str, modules: Mapping[str, nn.Module]) -> str | None:
    """Where in the pipeline a module of the file is; text encoders were once nested one level deeper."""
    parts = [name for name in modules if name and "." not in name]
    for path in (module, *(f"{part}.{module}" for part in parts)):
        for candidate in (path, path.replace(".text_model.", ".", 1)):
            if candidate in modules:
                return candidate
    return None


def _shaped(factors: LoraFactors, module: nn.Module) -> LoraFactors:
    """The factors with the kernel axes that the module has: 1 x 1 convolutions are stored either way."""
    a = factors.A
    if isinstance(module, nn.Conv2d) and a.ndim == 2 and tuple(module.kernel_size) == (1, 1):
        a = a[:, :, None, None]
    elif isinstance(module, nn.Conv2d) and a.ndim == 2 and module.weight[0].numel() == a.shape[1]:
        a = a.unflatten(1, tuple(module.weight.shape[1:]))
    elif not isinstance(module, nn.Conv2d) and a.ndim == 4 and a.shape[2:] == (1, 1):
        a = a.flatten(1)
    return replace(factors, A=a)


def _told(
    report: ExpertReport, factors: Mapping[str, LoraFactors], header: Header, unmatched: list[str]
) -> ExpertReport:
    """The report of the file, with what attaching it showed."""
    from loraweave.experts.report import counted

    sizes = {path: f.A.numel() + f.B.numel() for path, f in factors.items()}
    text = sum(size for path, size in sizes.items() if path.startswith("text_encoder"))
    return replace(
        report,
        mixable=True,
        reason=None,
        ranks=counted(f.rank for f in factors.values()),
        scales=counted(f.scale for f in factors.values()),
        modules=len(factors),
        parameters=sum(sizes.values()),
        text_encoder_share=text / sum(sizes.values()),
        matched=len(header.tensors) - len(unmatched),
        unmatched=unmatched,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep diffusers' remarks on keys back: they are reported here, with names."""
    logger = logging.getLogger("diffusers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with torch.no_grad():
            yield
    finally:
        logger.setLevel(before)


def _some(names: Sequence[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
