"""``adapter_config.json``: PEFT's description of an adapter, type-checked field by field and otherwise untrusted."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TypeVar

from loraweave.errors import LoraweaveError

CONFIG_NAME = "adapter_config.json"
CONFIG_LIMIT = 10_000_000
"""Bytes; ordinary files have a thousand, ones with a rank pattern for every module some hundred thousand."""
PATTERN_LIMIT = 512
"""Characters of one rank or alpha pattern."""

_REFUSED_FIELDS = {
    "use_dora": "DoRA is not additive (it rescales the base weight), so it cannot be mixed; train with use_dora=False",
    "modules_to_save": "whole modules trained beside the LoRA cannot be mixed; train with modules_to_save=None",
    "lora_bias": "trained biases beside the LoRA cannot be mixed; train with lora_bias=False",
    "target_parameters": "LoRAs on bare parameters are not supported; target modules instead",
    "trainable_token_indices": "trained tokens beside the LoRA cannot be mixed; train without them",
    "alora_invocation_tokens": "activated LoRA (aLoRA) applies to some tokens only and cannot be mixed",
    "arrow_config": "an Arrow router is not one LoRA; give its task LoRAs one by one",
    "use_qalora": "QA-LoRA pools its input and is not a plain low-rank term",
    "use_bdlora": "block-diagonal LoRA (BD-LoRA) stores its factors differently and is not supported",
    "kasa_config": "KaSA changes the base weights and scales singular values; it is not a plain low-rank term",
    "monteclora_config": "MonteCLoRA samples its factors; it is not a plain low-rank term",
    "layer_replication": "layers replicated in the base model are not supported",
}
_HARMLESS_FIELDS = frozenset(
    {
        "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
        "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
        "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_config",
        "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
        "runtime_config", "target_modules", "task_type", "use_rslora", "velora_config",
    }
)  # fmt: skip
LYCORIS = ("LOHA", "LOKR")
"""Kinds of adapters that are LoRAs in another form; see :mod:`loraweave.experts.lycoris`."""
_LYCORIS_FIELDS = frozenset(
    {
        "alpha", "decompose_both", "decompose_factor", "init_weights", "module_dropout", "rank_dropout",
        "rank_dropout_scale", "use_effective_conv2d",
    }
)  # fmt: skip
T = TypeVar("T")

_LITERAL = re.compile(r"\^?(?:\w|\\[.-])+", re.ASCII)
_BASE_CHANGING_INITS = {"pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "lora_ga": "LoRA-GA"}


@dataclass(frozen=True)
class Pattern:
    """A key of ``rank_pattern`` or ``alpha_pattern``, matched to module paths as peft's ``get_pattern_key`` does."""

    regex: re.Pattern[str]
    literal: str | None
    anchored: bool

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Compile a pattern.

        Raises:
            ValueError: it is not a regular expression, or one that could keep the engine busy for ever.
        """
        unbounded = len(re.findall(r"(?<!\\)[*+]|\{\d*,\d*\}", text))
        if len(text) > PATTERN_LIMIT or unbounded > 4 or re.search(r"\)[*+{?]", text):
            raise ValueError("too complex; name the modules instead")
        try:
            regex = re.compile(rf"(.*\.)?({text})$")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        # most patterns are module names, and there may be thousands of them, one for every module
        literal = re.sub(r"\\(.)", r"\1", text.removeprefix("^")) if _LITERAL.fullmatch(text) else None
        return cls(regex, literal, text.startswith("^"))

    def matches(self, module: str) -> bool:
        """Whether it matches a whole module path, or its end after a dot."""
        if self.literal is None:
            return self.regex.match(module) is not None
        return module == self.literal or (not self.anchored and module.endswith("." + self.literal))


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of ``adapter_config.json`` that matter here.

    Attributes:
        path: the file, for messages.
        fields: everything the file says.
        peft_type: upper case, ``"LORA"`` for a LoRA.
        rank, alpha: fields ``r`` and ``lora_alpha``, of LoHa and LoKr ``alpha``; ``None`` where the file has none
            (other kinds of adapters).
        rank_pattern, alpha_pattern: module pattern -> value that differs from the default; first match wins.
        rslora: whether the scale is ``alpha / sqrt(rank)``.
        bias: ``"none"``, ``"all"`` or ``"lora_only"``.
        base: the base model's name.
        base_class: its class, where the file says.
        task_type, peft_version: as written, where given.
    """

    path: Path
    fields: Mapping[str, object] = field(repr=False)
    peft_type: str
    rank: int | None
    alpha: float | None
    rank_pattern: tuple[tuple[Pattern, int], ...]
    alpha_pattern: tuple[tuple[Pattern, float], ...]
    rslora: bool
    bias: str
    base: str | None
    base_class: str | None
    task_type: str | None
    peft_version: str | None

    def rank_of(self, module: str) -> int:
        """The rank the file declares for a module path."""
        assert self.rank is not None
        return _first_match(self.rank_pattern, module, self.rank)

    def alpha_of(self, module: str) -> float:
        """The alpha the file declares for a module path."""
        assert self.alpha is not None
        return _first_match(self.alpha_pattern, module, self.alpha)

    def scale_of(self, module: str, rank: int) -> float:
        """``alpha / rank``, or ``alpha / sqrt(rank)`` for rank-stabilised LoRA (arXiv:2312.03732)."""
        return self.alpha_of(module) / (math.sqrt(rank) if self.rslora else rank)

    def refusals(self) -> list[str]:
        """Why an adapter with this configuration cannot be mixed, each naming its field; empty if it can."""
        if self.peft_type not in ("LORA", *LYCORIS):
            return [f"field peft_type is {self.peft_type!r}; only LORA, LOHA and LOKR adapters can be mixed"]
        missing = [name for name, value in (("r", self.rank), (_alpha(self.peft_type), self.alpha)) if value is None]
        reasons = [f"field {name} is missing; expected a number" for name in missing]
        reasons += [
            f"field {name} is set: {reason}"
            for name, reason in _REFUSED_FIELDS.items()
            if _is_set(self.fields.get(name))
        ]
        init = str(self.fields.get("init_lora_weights", "")).lower()
        for prefix, title in _BASE_CHANGING_INITS.items():
            if init.startswith(prefix):
                reasons.append(
                    f"field init_lora_weights is {init!r}: {title} changes the base weights, so this LoRA does not fit "
                    "the published base; convert it with peft's save_pretrained(..., "
                    "path_initial_model_for_weight_conversion=...)"
                )
        if init.startswith("loftq"):
            reasons.append(
                f"field init_lora_weights is {init!r}: LoftQ changes the base weights, so this LoRA fits only the "
                "quantised base saved with it; attach it to that base after setting the field to true"
            )
        return reasons

    def unknown_fields(self) -> list[str]:
        """Fields that are set and unknown here: a newer PEFT may have meant something by them."""
        known = _HARMLESS_FIELDS | _REFUSED_FIELDS.keys()
        known = known | _LYCORIS_FIELDS if self.peft_type in LYCORIS else known
        return [name for name, value in self.fields.items() if name not in known and _is_set(value)]


def read_config(path: Path) -> AdapterConfig:
    """Read and type-check ``adapter_config.json``.

    Raises:
        LoraweaveError: it is missing, too large, not a JSON object, or a field has the wrong type or names a file
            outside its folder.
    """
    try:
        size = path.stat().st_size
        if size > CONFIG_LIMIT:
            raise LoraweaveError(f"{path}: has {size} bytes; an adapter's configuration has at most {CONFIG_LIMIT}")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise LoraweaveError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, LoraweaveError):
            raise
        raise LoraweaveError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise LoraweaveError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return parse_config(path, content)


def parse_config(path: Path, content: Mapping[str, object]) -> AdapterConfig:
    """Type-check a configuration that was already parsed from JSON; see :func:`read_config`."""
    for name, value in _strings(content):
        leaf = name.rpartition(".")[2]
        if leaf.endswith(("file", "path", "dir", "folder")) and leaf != "base_model_name_or_path" and _leaves(value):
            raise LoraweaveError(f"{path}: field {name} names a file outside its folder ({value!r}); remove the field")
    fields = _Fields(path, content)
    kind = fields.text("peft_type")
    if kind is None:
        raise LoraweaveError(f"{path}: field peft_type is missing; is this the configuration of a PEFT adapter?")
    kind = kind.rpartition(".")[2].upper()
    auto_mapping = fields.mapping("auto_mapping")
    base_class = auto_mapping.get("base_model_class")
    rank = fields.number("r")
    return AdapterConfig(
        path=path,
        fields=content,
        peft_type=kind,
        rank=None if rank is None else fields.as_rank("r", rank),
        alpha=fields.number(_alpha(kind)),
        rank_pattern=tuple(
            (key, fields.as_rank("rank_pattern", rank)) for key, rank in fields.patterns("rank_pattern")
        ),
        alpha_pattern=tuple(fields.patterns("alpha_pattern")),
        rslora=fields.flag("use_rslora"),
        bias=fields.text("bias") or "none",
        base=fields.text("base_model_name_or_path") or None,
        base_class=base_class if isinstance(base_class, str) else None,
        task_type=fields.text("task_type"),
        peft_version=fields.text("peft_version"),
    )


@dataclass(frozen=True)
class _Fields:
    """Typed access to a parsed configuration."""

    path: Path
    content: Mapping[str, object]

    def _wrong(self, name: str, expected: str, value: object) -> LoraweaveError:
        return LoraweaveError(f"{self.path}: field {name} must be {expected}, got {str(value)[:80]!r}")

    def text(self, name: str) -> str | None:
        value = self.content.get(name)
        if value is not None and not isinstance(value, str):
            raise self._wrong(name, "a string", value)
        return value

    def flag(self, name: str) -> bool:
        value = self.content.get(name)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(name, "true or false", value)
        return bool(value)

    def number(self, name: str) -> float | None:
        value = self.content.get(name)
        return None if value is None else self._as_number(name, value)

    def mapping(self, name: str) -> Mapping[str, object]:
        value = self.content.get(name)
        if value is not None and not isinstance(value, dict):
            raise self._wrong(name, "an object", value)
        return value or {}

    def patterns(self, name: str) -> Iterator[tuple[Pattern, float]]:
        for text, value in self.mapping(name).items():
            try:
                pattern = Pattern.parse(text)
            except ValueError as error:
                raise LoraweaveError(f"{self.path}: field {name}: pattern {text[:80]!r} is {error}") from error
            yield pattern, self._as_number(f"{name}[{text!r}]", value)

    def as_rank(self, name: str, value: float) -> int:
        if value < 1 or value != int(value):
            raise self._wrong(name, "a positive integer", value)
        return int(value)

    def _as_number(self, name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e9 or value != value:
            raise self._wrong(name, "a finite number", value)
        return value


def _alpha(kind: str) -> str:
    return "alpha" if kind in LYCORIS else "lora_alpha"


def _first_match(patterns: tuple[tuple[Pattern, T], ...], module: str, default: T) -> T:
    return next((value for pattern, value in patterns if pattern.matches(module)), default)


def _is_set(value: object) -> bool:
    return value is not None and value is not False and value != [] and value != {} and value != ""


def _leaves(value: str) -> bool:
    paths = (PurePosixPath(value), PureWindowsPath(value))
    return value.startswith("~") or any(path.is_absolute() or ".." in path.parts for path in paths)


def _strings(content: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Every string in a configuration with its dotted field name."""
    waiting: list[tuple[str, object]] = list(content.items())
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, str):
            yield name, value
        elif isinstance(value, dict):
            waiting += [(f"{name}.{key}", inner) for key, inner in value.items()]
