"""A lone ``.safetensors`` file: whose names its tensors have, and what they tell without a configuration."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from loraweave.experts.config import CONFIG_NAME
from loraweave.experts.mapped import open_tensors
from loraweave.experts.report import ExpertReport, counted, shortened
from loraweave.experts.weightfile import Header, hash_files, read_header

_CONVENTIONS = (
    ("lycoris", re.compile(r"\.(hada_w|lokr_w|oft_|glora|diff$|lora_mid)")),
    ("kohya", re.compile(r"\.lora_(down|up)\.weight$")),
    ("diffusers", re.compile(r"^(unet|transformer|text_encoder(_\d)?|diffusion_model)\.|lora\.(down|up)\.weight$")),
    ("diffusers", re.compile(r"lora_linear_layer|\.processor\.")),
    ("peft", re.compile(r"\.lora_(embedding_)?[AB](\.|$)")),
)
"""Tried in this order: a kohya file for a Flux model may also have names that begin with ``transformer``."""
_DOWN = re.compile(r"(?P<module>.+?)[._](lora_down|lora_A|lora\.down|lora_linear_layer\.down|down)(\.[^.]+)?\.weight$")
_UP = re.compile(r"(?P<module>.+?)[._](lora_up|lora_B|lora\.up|lora_linear_layer\.up|up)(\.[^.]+)?\.weight$")
_LYCORIS = {
    "hada_w": "LoHa", "lokr_w": "LoKr", "oft_": "OFT", "glora": "GLoRA", "diff": "full difference",
    "lora_mid": "LoCon with a third factor (Tucker)",
}  # fmt: skip
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
    report = ExpertReport(
        source=source,
        format=kind,
        base=next((header.metadata[name] for name in _BASE_FIELDS if header.metadata.get(name)), None),
        ranks=counted(ranks.values()),
        alphas=counted(alphas.values()),
        scales=counted(alphas.get(module, rank) / rank for module, rank in ranks.items()) if kind == "kohya" else {},
        targets=counted(_leaf(module) for module in down),
        modules=len(down),
        parameters=sum(header.tensors[key].count for key in [*down.values(), *up.values()]),
        dtypes=counted(info.dtype for info in header.tensors.values()),
        size=header.size,
        sha256=hash_files([path]),
        metadata=shortened(header.metadata),
    )
    text = [key for key in [*down.values(), *up.values()] if _TEXT_ENCODER.match(key)]
    report.text_encoder_share = sum(header.tensors[key].count for key in text) / max(report.parameters, 1)
    report.architecture, report.triggers = architecture(header), triggers(header.metadata)
    reasons = {
        "peft": f"{path}: has no {CONFIG_NAME} beside it, so its alpha is unknown; put both files in one folder",
        "unknown": f"{path}: holds no LoRA that is known here",
    }
    refused = refusals(header)
    if kind not in reasons and refused:
        reasons[kind] = f"{path}: {refused.pop(0)}"
    report.reason = reasons.get(kind)
    report.mixable, report.odd = report.reason is None, refused
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
    reasons = []
    if any("lora_magnitude_vector" in key or "dora_scale" in key for key in names):
        reasons.append("DoRA is not additive (it rescales the base weight), so it cannot be mixed; train without it")
    if convention(names) == "lycoris":
        kinds = {match[1] for key in names if (match := _CONVENTIONS[0][1].search(key))}
        known = sorted({title for mark, title in _LYCORIS.items() if any(kind.startswith(mark) for kind in kinds)})
        reasons.append(
            f"is a {' and '.join(known)}, not a plain LoRA, so it cannot be mixed; convert it to LoRA (LyCORIS "
            "has tools for that), or train one"
        )
    return reasons


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


def convention(names: Iterable[str]) -> str:
    """Whose names a file's tensors have: ``"kohya"``, ``"diffusers"``, ``"lycoris"``, ``"peft"`` or ``"unknown"``."""
    names = list(names)
    return next((kind for kind, pattern in _CONVENTIONS if any(pattern.search(name) for name in names)), "unknown")


def _alphas(header: Header) -> dict[str, float]:
    """The scalar ``.alpha`` of each module, where the file has any."""
    keys = [key for key, info in header.tensors.items() if key.endswith(".alpha") and info.count == 1]
    get = open_tensors(header)
    return {key.removesuffix(".alpha"): float(get(key).item()) for key in keys}


def _leaf(module: str) -> str:
    """``lora_unet_..._attn1_to_q`` and ``....attn1.to_q`` both end in ``to_q``."""
    name = module.rpartition(".")[2]
    match = re.search(
        r"_(to_(?:q|k|v|out)(?:_0)?|[qkv]_proj|out_proj|fc[12]|proj_(?:in|out)|conv\d?|ff_net_\d(?:_proj)?)$", name
    )
    return match[1] if match else name
