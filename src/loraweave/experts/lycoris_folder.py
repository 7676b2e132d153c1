"""PEFT folders of LoHa and LoKr adapters, read as the LoRAs they equal."""

from __future__ import annotations

from collections.abc import Iterator

from loraweave.errors import LoraweaveError
from loraweave.experts import lycoris
from loraweave.experts.checks import value_problem
from loraweave.experts.config import AdapterConfig
from loraweave.experts.keys import module_of, sort_keys
from loraweave.experts.lycoris import Lycoris
from loraweave.experts.mapped import open_tensors
from loraweave.experts.report import ExpertReport, counted
from loraweave.experts.types import LoraFactors
from loraweave.experts.weightfile import MIXABLE_DTYPES, Header

_PARTS = {"LOHA": "hada_", "LOKR": "lokr_"}


def problems(config: AdapterConfig, header: Header) -> Iterator[str]:
    """Why an adapter cannot be mixed, as far as configuration and header tell; nothing if it can."""
    for reason in config.refusals():
        yield f"{config.path}: {reason}"
    try:
        found = lycoris.modules({key: info.shape for key, info in header.tensors.items()})
    except LoraweaveError as error:
        yield f"{header.path}: {error}"
        return
    used = {key for one in found.values() for key in one.keys.values()}
    rest = sort_keys(key for key in header.tensors if key not in used)
    for reason in rest.refusals():
        yield f"{header.path}: {reason}"
    part = _PARTS[config.peft_type]
    if rest.modules or any(not name.startswith(part) for one in found.values() for name in one.keys):
        yield f"{header.path}: holds other tensors than {part}..., but peft_type is {config.peft_type!r}"
    if not found:
        yield f"{header.path}: holds no {config.peft_type} (no tensor is named like '...{part}w1_a')"
    if len({module_of(name) for name in found}) < len(found):
        yield f"{header.path}: holds a module twice, with and without the prefix 'base_model.model.'"
    for name, one in found.items():
        for key in one.keys.values():
            if header.tensors[key].dtype not in MIXABLE_DTYPES:
                yield (
                    f"{header.path}: tensor {key!r} has dtype {header.tensors[key].dtype}; expected one of "
                    f"{', '.join(MIXABLE_DTYPES)}: convert it and save the file again"
                )
        if one.divisor is not None and config.rank is not None and one.divisor != config.rank_of(module_of(name)):
            yield (
                f"{header.path}: module {module_of(name)!r} has rank {one.divisor}, but r and rank_pattern in "
                f"{config.path.name} say {config.rank_of(module_of(name))}; the two files do not belong together"
            )


def factors(config: AdapterConfig, header: Header) -> dict[str, LoraFactors]:
    """Module path -> its LoRA, of an adapter without :func:`problems`.

    As in peft the scale is ``alpha / r`` of the configuration, also where LoKr's matrices are both stored whole.
    """
    get = open_tensors(header)
    found = {}
    for name, one in _modules(header).items():
        A, B = one.factors(get)
        found[name] = LoraFactors(A, B, _scale(config, name))
    return found


def tensors(header: Header) -> frozenset[str]:
    """Names of the tensors that make the updates."""
    return frozenset(key for one in _modules(header).values() for key in one.keys.values())


def describe(report: ExpertReport, config: AdapterConfig, header: Header) -> None:
    """Fill in a report: whether it can be mixed, ranks of the LoRAs, scales, targets and counts."""
    found = [*problems(config, header)]
    try:
        modules = _modules(header)
    except LoraweaveError:  # it is among the problems
        modules = {}
    report.modules = len(modules)
    report.ranks = counted(one.rank for one in modules.values())
    report.targets = counted(name.rpartition(".")[2] for name in modules)
    report.parameters = sum(header.tensors[key].count for one in modules.values() for key in one.keys.values())
    if config.alpha is not None and config.rank is not None:
        report.alphas = counted(config.alpha_of(name) for name in modules)
        report.scales = counted(_scale(config, name) for name in modules)
    get = open_tensors(header)
    for one in modules.values():
        for key in one.keys.values():
            if header.tensors[key].dtype in MIXABLE_DTYPES and (damage := value_problem(header, key, get(key))):
                found.append(damage)
    report.mixable, report.reason = not found, found[0] if found else None
    report.odd = [*found[1:], "LoHa or LoKr modules are read as the LoRAs they equal, whose rank is given"]
    if unknown := config.unknown_fields():
        report.odd.append(f"configuration has fields unknown here, which are ignored: {', '.join(unknown)}")
    if config.base is None:
        report.odd.append("names no base model")


def _modules(header: Header) -> dict[str, Lycoris]:
    found = lycoris.modules({key: info.shape for key, info in header.tensors.items()})
    return {module_of(name): one for name, one in found.items()}


def _scale(config: AdapterConfig, module: str) -> float:
    return config.scale_of(module, config.rank_of(module))
