"""The names of tensors in a PEFT file, sorted into LoRA factors and everything else."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from loraweave.errors import LoraweaveError

_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?:(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight"
    r"|embedding_(?P<embedding>[AB])(?:\.(?P<embedding_adapter>[^.]+))?)"
)
_PREFIX = "base_model.model."

_FOREIGN = (
    (re.compile(r"lora_magnitude_vector|dora_scale"), "DoRA is not additive, so it cannot be mixed"),
    (re.compile(r"\.lora_B(\.[^.]+)?\.bias$"), "trained LoRA biases (lora_bias) cannot be mixed"),
    (re.compile(r"modules_to_save"), "whole modules trained beside the LoRA (modules_to_save) cannot be mixed"),
    (re.compile(r"token_adapter|trainable_tokens"), "trained tokens (trainable_token_indices) cannot be mixed"),
    (re.compile(r"\.lora_diag|\.lora_E|\.hada_|\.lokr_|\.oft_|\.boft_|\.ia3_|vera_lambda|prompt_e"),
     "this is not a plain LoRA and cannot be mixed"),
    (re.compile(r"lora_(down|up)|lora_linear_layer|lora\.(down|up)|^lora_(unet|te)"),
     "these are names of image LoRAs (kohya, diffusers), not of PEFT"),
    (re.compile(r"\.bias$"), "trained biases (bias='all' or 'lora_only') cannot be mixed; train with bias='none'"),
    (re.compile(r"\.weight$"), "whole weights of the base (modules_to_save, or a resized vocabulary) cannot be mixed"),
)  # fmt: skip


@dataclass
class ModuleKeys:
    """The names of one module's two factors."""

    A: str | None = None
    B: str | None = None
    embedding: bool = False


@dataclass
class KeyTable:
    """The tensors of a PEFT file by what they are.

    Attributes:
        modules: module path in the base model -> the names of its factors, in order of the path.
        copies: names of the base's own weights that PEFT saves beside the LoRA of an embedding or head; not trained.
        foreign: name -> why it is neither; a file with any cannot be mixed.
    """

    modules: dict[str, ModuleKeys] = field(default_factory=dict)
    copies: list[str] = field(default_factory=list)
    foreign: dict[str, str] = field(default_factory=dict)

    def refusals(self) -> list[str]:
        """One sentence for each kind of foreign tensor, naming a few."""
        reasons: dict[str, list[str]] = {}
        for key, reason in self.foreign.items():
            reasons.setdefault(reason, []).append(key)
        return [f"{_some(keys)}: {reason}" for reason, keys in reasons.items()]


def sort_keys(names: Iterable[str]) -> KeyTable:
    """Sort the tensor names of a PEFT file.

    PEFT writes ``base_model.model.<module>.lora_A.weight``, older files with an adapter's name before ``.weight``, and
    ``lora_embedding_A`` without ``.weight`` for embeddings; the prefix may be missing.

    Raises:
        LoraweaveError: two names mean the same factor, or the file holds several adapters.
    """
    table = KeyTable()
    rest: list[str] = []
    adapters: set[str] = set()
    for key in sorted(names):
        match = _FACTOR.fullmatch(key)
        if match is None:
            rest.append(key)
            continue
        adapters.add(match["adapter"] or match["embedding_adapter"] or "")
        module = table.modules.setdefault(match["module"].removeprefix(_PREFIX), ModuleKeys())
        side = match["side"] or match["embedding"]
        known = getattr(module, side)
        if known is not None:
            raise LoraweaveError(f"tensors {known!r} and {key!r} are both lora_{side} of one module; expected one")
        setattr(module, side, key)
        module.embedding = match["embedding"] is not None
    if len(adapters) > 1:
        raise LoraweaveError(f"holds several adapters ({', '.join(sorted(adapters))}); save them one to a folder")
    for key in rest:
        module_path = key.removeprefix(_PREFIX).removesuffix(".base_layer.weight")
        if key.endswith(".base_layer.weight") and module_path in table.modules:
            table.copies.append(key)
        else:
            table.foreign[key] = _reason(key)
    return table


def module_of(name: str) -> str:
    """A module's path in the base model, without PEFT's prefix."""
    return name.removeprefix(_PREFIX)


def unpaired(modules: Mapping[str, ModuleKeys]) -> list[str]:
    """A sentence for every module that has one factor only."""
    return [
        f"tensor {keys.A or keys.B!r} has no lora_{'B' if keys.B is None else 'A'} beside it; the file is incomplete"
        for keys in modules.values()
        if keys.A is None or keys.B is None
    ]


def _reason(key: str) -> str:
    return next((reason for pattern, reason in _FOREIGN if pattern.search(key)), "not understood as part of a LoRA")


def _some(keys: list[str], limit: int = 3) -> str:
    listed = ", ".join(repr(key) for key in keys[:limit])
    return f"tensor{'s' if len(keys) > 1 else ''} {listed}" + (
        f" and {len(keys) - limit} more" if len(keys) > limit else ""
    )
