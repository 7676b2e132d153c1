"""A lone ``.safetensors`` file: whose names its tensors have, and what they tell without a configuration."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from loraweave.errors import LoraweaveError
from loraweave.experts import lycoris
from loraweave.experts.checks import value_problem
from loraweave.experts.config import CONFIG_NAME, AdapterConfig, parse_config
from loraweave.experts.mapped import open_tensors
from loraweave.experts.report import ExpertReport, counted, shortened
from loraweave.experts.weightfile import MIXABLE_DTYPES, Header, hash_files, read_header

METADATA = "lora_adapter_metadata"
"""Field of the header in which diffusers keeps PEFT's configurations."""

_CONVENTIONS = (
    ("lycoris", re.compile(r"\.(hada_w|lokr_w|oft_|glora|diff$|lora_mid)")),
    ("kohya", re.compile(r"\.lora_(down|up)\.weight$")),
    ("diffusers", re.compile(r"^(unet|transformer|text_encoder(_\d)?|diffusion_model)\.|lora\.(down|up)\.weight$")),
    ("diffusers", re.compile(r"lora_linear_layer|\.processor\.")),
    ("diffusers", re.compile(r"^(base_model\.model\.)?(double|single)_blocks\.")),  # Flux: BFL's own, fal's
    ("peft", re.compile(r"\.lora_(embedding_)?[AB](\.|$)")),
)
"""Tried in this order: a kohya file for a Flux model may also have names that begin with ``transformer``."""
_DOWN = re.compile(r"(?P<module>.+?)[._](lora_down|lora_A|lora\.down|lora_linear_layer\.down|down)(\.[^.]+)?\.weight$")
_UP = re.compile(r"(?P<module>.+?)[._](lora_up|lora_B|lora\.up|lora_linear_layer\.up|up)(\.[^.]+)?\.weight$")
_LYCORIS = {
    "oft_": "OFT", "glora": "GLoRA", "diff": "full difference",
    "lora_mid": "LoCon with a third factor (Tucker)",
}  # fmt: skip
_CONTROL = "query_norm.scale"
"""What diffusers, too, tells Flux control LoRAs by."""
_TEXT_ENCODER = re.compile(r"lora_te\d?_|text_encoder(_\d)?\.")
_ARCHITECTURES = (
    ("Flux", re.compile(r"double_blocks|single_blocks|single_transformer_blocks")),
    ("SD3", re.compile(r"joint_blocks|transformer_blocks[._]\d+[._]attn[._]add_[qkv]_proj")),
    ("SDXL", re.compile(r"lora_te2_|text_encoder_2\.|add_embedding|label_emb")),
)
_PROMPT_WIDTH = re.compile(
    r"attn2[._](processor[._])?to_[kv](_lora)?\.(lora_down|lora_A|down|lora\.down)(\.[^.]+)?\.weight$"
)
_WIDTHS = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}
_BASE_FIELDS = ("modelspec.architecture", "ss_base_model_version", "ss_sd_model_name", "base_model")


def inspect_file(source: str, path: Path) -> ExpertReport:
    """Report on a weight file that has no PEFT configuration beside it.

    Raises:
        LoraweaveError: it is missing, damaged or pickled.
    """
    header = read_header(path)
    kind = convention(header.tensors)
    down = {match["module"]: key for key in header.tensors if (match := _DOWN.match(key))}
    up = {match["module"]: key for key in header.tensors if (match := _UP.match(key))}
    ranks = {
        module: shape[0] for module, key in down.items() if len(shape := header.tensors[key].shape) >= 2 and shape[0]
    }
    alphas = _alphas(header)
    refused = refusals(header)
    small = {} if refused else lycoris.modules({key: info.shape for key, info in header.tensors.items()})
    try:
        scales = _scales(ranks, alphas, configs(header)) if kind in ("kohya", "diffusers", "lycoris") else {}
    except LoraweaveError as error:
        scales, refused = {}, [*refused, str(error)]
    ranks |= {module: one.rank for module, one in small.items()}
    scales |= {module: one.scale(alphas.get(module)) for module, one in small.items()}
    used = [*down.values(), *up.values(), *(key for one in small.values() for key in one.keys.values())]
    report = ExpertReport(
        source=source,
        format=kind,
        base=next((header.metadata[name] for name in _BASE_FIELDS if header.metadata.get(name)), None),
        ranks=counted(ranks.values()),
        alphas=counted(alphas.values()),
        scales=counted(scales.values()),
        targets=counted(_leaf(module) for module in [*down, *small]),
        modules=len(down) + len(small),
        parameters=sum(header.tensors[key].count for key in used),
        dtypes=counted(info.dtype for info in header.tensors.values()),
        size=header.size,
        sha256=hash_files([path]),
        metadata=shortened(header.metadata),
    )
    text = [key for key in used if _TEXT_ENCODER.match(key)]
    report.text_encoder_share = sum(header.tensors[key].count for key in text) / max(report.parameters, 1)
    report.architecture, report.triggers = architecture(header), triggers(header.metadata)
    reasons = {
        "peft": f"{path}: has no {CONFIG_NAME} beside it, so its alpha is unknown; put both files in one folder",
        "unknown": f"{path}: holds no LoRA that is known here",
    }
    problems = [f"{path}: {reason.removeprefix(f'{path}: ')}" for reason in refused]
    problems += [f"{path}: {problem}" for problem in _misfits(header, down, up, used)]
    problems += _damage(header, used)
    problems += [f"{path}: alpha of {module!r} is not finite" for module, s in scales.items() if not math.isfinite(s)]
    report.reason = reasons.get(kind) or next(iter(problems), None)
    report.mixable, report.odd = report.reason is None, problems[kind not in reasons :]
    if small:
        report.odd.append("LoHa or LoKr modules are read as the LoRAs they equal, whose rank is given")
    if any(scale == 0 for scale in scales.values()):
        report.odd.append("alpha is 0 in some modules: they do nothing")
    wide = [m for m, rank in ranks.items() if m in up and rank > min(_widths(header, down[m], up[m]))]
    if wide:
        report.odd.append(f"rank exceeds the module's width in {len(wide)} modules: more than a full matrix")
    if any(len(info.shape) == 4 for info in header.tensors.values()):
        report.odd.append("has LoRAs on convolutions")
    if down.keys() != up.keys():
        report.odd.append(f"{len(down.keys() ^ up.keys())} modules have only one of their two factors")
    if len(report.ranks) > 1:
        report.odd.append("rank differs between modules")
    if len(report.dtypes) > 1:
        report.odd.append(f"mixed dtypes: {', '.join(report.dtypes)}")
    return report


def refusals(header: Header) -> list[str]:
    """Why an image LoRA cannot be mixed, as far as its names tell; empty if it can."""
    names = header.tensors
    reasons: list[str] = []
    if any("lora_magnitude_vector" in key or "dora_scale" in key for key in names):
        reasons.append("DoRA is not additive (it rescales the base weight), so it cannot be mixed; train without it")
    if any(key.endswith(_CONTROL) for key in names):
        reasons.append(
            "is a control LoRA (Black Forest Labs' own for Flux): it also replaces norms, adds biases and widens the "
            "input, so it is part of a base, not an expert; take the full control model (FLUX.1 Canny or Depth) as base"
        )
    elif any(key.endswith(".lora_B.bias") for key in names):
        reasons.append("trained biases beside the LoRA cannot be mixed; train with lora_bias=False")
    if convention(names) == "lycoris":
        kinds = {match[1] for key in names if (match := _CONVENTIONS[0][1].search(key))}
        known = sorted({title for mark, title in _LYCORIS.items() if any(kind.startswith(mark) for kind in kinds)})
        if known:
            reasons.append(
                f"is a {' and '.join(known)}, not a plain LoRA, so it cannot be mixed; convert it to LoRA (LyCORIS "
                "has tools for that), or train one"
            )
        try:
            lycoris.modules({key: info.shape for key, info in names.items()})
        except LoraweaveError as error:
            reasons.append(str(error))
    return reasons


def configs(header: Header) -> dict[str, AdapterConfig]:
    """The LoRA configurations that diffusers wrote into the header, by the model's name.

    Raises:
        LoraweaveError: they cannot be read, or say something that cannot be mixed.
    """
    if METADATA not in header.metadata:
        return {}
    try:
        content = json.loads(header.metadata[METADATA])
    except (ValueError, RecursionError) as error:
        raise LoraweaveError(f"{header.path}: field {METADATA} of the header is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise LoraweaveError(f"{header.path}: field {METADATA} of the header is not a JSON object")
    by_part: dict[str, dict[str, object]] = {}
    for key, value in content.items():
        part, _, name = key.partition(".")
        by_part.setdefault(part, {})[name] = value
    found = {part: parse_config(header.path, {"peft_type": "LORA", **fields}) for part, fields in by_part.items()}
    for config in found.values():
        for reason in config.refusals():
            raise LoraweaveError(f"{header.path}: {reason}")
    return found


def scale_of(module: str, rank: int, alpha: float | None, found: Mapping[str, AdapterConfig]) -> float:
    """``alpha / rank``; 1 where the file says nothing, as in diffusers.

    Args:
        module: its path, which begins with the name of the pipeline's model.
        rank: of its factors.
        alpha: what the file has beside them.
        found: see :func:`configs`.
    """
    if alpha is not None:
        return alpha / rank
    part, _, inner = module.partition(".")
    config = found.get(part)
    return 1.0 if config is None or config.alpha is None else config.scale_of(inner, rank)


def _scales(
    ranks: Mapping[str, int], alphas: Mapping[str, float], found: Mapping[str, AdapterConfig]
) -> dict[str, float]:
    return {module: scale_of(module, rank, alphas.get(module), found) for module, rank in ranks.items()}


def _misfits(header: Header, down: Mapping[str, str], up: Mapping[str, str], used: Iterable[str]) -> list[str]:
    """Factors whose shapes or dtypes cannot be mixed."""
    problems = []
    for key in used:
        if header.tensors[key].dtype not in MIXABLE_DTYPES:
            dtype = header.tensors[key].dtype
            problems.append(f"tensor {key!r} has dtype {dtype}; expected one of {', '.join(MIXABLE_DTYPES)}")
    for module in down.keys() & up.keys():
        a, b = header.tensors[down[module]].shape, header.tensors[up[module]].shape
        if len(a) not in (2, 4) or len(b) not in (2, 4) or not a[0] or a[0] != b[1]:
            problems.append(f"factors of {module!r} have shapes {list(a)} and {list(b)}, which do not fit")
    return sorted(problems)


def _widths(header: Header, a: str, b: str) -> tuple[int, int]:
    """What goes into a module (of a convolution, what its kernel sees) and what comes out."""
    return math.prod(header.tensors[a].shape[1:]), math.prod(header.tensors[b].shape[:1])


def architecture(header: Header) -> str | None:
    """The kind of image model a file was made for, from the names of its tensors and the width of its prompts."""
    names = list(header.tensors)
    for guess, pattern in _ARCHITECTURES:
        if any(pattern.search(name) for name in names):
            return guess
    for name in names:
        if _PROMPT_WIDTH.search(name) and len(shape := header.tensors[name].shape) >= 2:
            return _WIDTHS.get(shape[1])
    return None


def triggers(metadata: Mapping[str, str], limit: int = 5) -> list[str]:
    """Words that call a LoRA up: its author's, or the commonest tags of its training pictures."""
    phrase = metadata.get("modelspec.trigger_phrase") or metadata.get("trigger_words")
    if phrase:
        return [word.strip() for word in phrase.split(",") if word.strip()][:limit]
    try:
        tables = json.loads(metadata.get("ss_tag_frequency", "{}"))
    except (ValueError, RecursionError):
        return []  # somebody else's free text; without it there is simply nothing to tell
    counts: Counter[str] = Counter()
    for table in tables.values() if isinstance(tables, dict) else ():
        for tag, count in table.items() if isinstance(table, dict) else ():
            if isinstance(count, int):
                counts[tag.strip()] += count
    return [tag for tag, _ in counts.most_common(limit)]


def is_of_text(name: str) -> bool:
    """Whether this is a tensor or module of a text encoder, in anybody's names."""
    return bool(_TEXT_ENCODER.match(name))


def convention(names: Iterable[str]) -> str:
    """Whose names a file's tensors have: ``"kohya"``, ``"diffusers"``, ``"lycoris"``, ``"peft"`` or ``"unknown"``."""
    names = list(names)
    return next((kind for kind, pattern in _CONVENTIONS if any(pattern.search(name) for name in names)), "unknown")


def _alphas(header: Header) -> dict[str, float]:
    """The scalar ``.alpha`` of each module, where the file has any."""
    keys = [key for key, info in header.tensors.items() if key.endswith(".alpha") and info.count == 1]
    get = open_tensors(header)
    return {key.removesuffix(".alpha"): float(get(key).item()) for key in keys}


def _damage(header: Header, keys: Iterable[str]) -> list[str]:
    """Factors that hold values which are not finite."""
    get = open_tensors(header)
    found = (value_problem(header, key, get(key)) for key in keys if header.tensors[key].dtype in MIXABLE_DTYPES)
    return [problem for problem in found if problem]


def _leaf(module: str) -> str:
    """``lora_unet_..._attn1_to_q`` and ``....attn1.to_q`` both end in ``to_q``."""
    name = ".".join(module.split(".")[-2:]) if module.rpartition(".")[2].isdigit() else module.rpartition(".")[2]
    match = re.search(
        r"_(to_(?:q|k|v|out)(?:_0)?|[qkv]_proj|out_proj|fc[12]|proj_(?:in|out)|conv\d?|ff_net_\d(?:_proj)?)$", name
    )
    return match[1] if match else name
