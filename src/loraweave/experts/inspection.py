"""What a LoRA file is, told without its base model."""

from __future__ import annotations

from pathlib import Path

from loraweave.errors import LoraweaveError
from loraweave.experts import lycoris_folder
from loraweave.experts.checks import each_tensor, header_problems, sorted_keys, value_problem
from loraweave.experts.config import CONFIG_NAME, LYCORIS, AdapterConfig, read_config
from loraweave.experts.keys import KeyTable
from loraweave.experts.mapped import open_tensors
from loraweave.experts.report import ExpertReport, counted, shortened
from loraweave.experts.single_file import inspect_file
from loraweave.experts.sources import WEIGHTS_NAME, locate
from loraweave.experts.weightfile import Header, hash_files, read_header

__all__ = ["ExpertReport", "inspect"]

STRONG_SCALE = 8.0
"""``alpha / rank`` from which a LoRA is reported as unusually strong; 1 and 2 are usual."""


def inspect(
    source: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> ExpertReport:
    """Report what a LoRA is: a PEFT folder, a hub id, or a single ``.safetensors`` file.

    The base model is not needed. What can be read but not mixed (DoRA, another method, NaN values ...) is reported.

    Args:
        source: see :func:`~loraweave.experts.reader.read_expert`; or a ``.safetensors`` file.
        revision: a hub branch, tag or commit.
        cache_dir: the hub cache; by default the one of ``huggingface_hub``.
        local_files_only: look in the hub cache only.

    Raises:
        LoraweaveError: there is nothing there, or it cannot be read at all (damaged, pickled).
    """
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".safetensors":
        if path.name == WEIGHTS_NAME and (path.parent / CONFIG_NAME).is_file():
            source = path.parent
        else:
            return inspect_file(str(source), path)
    if path.suffix == ".safetensors" and not path.exists():
        raise LoraweaveError(f"{path}: no such file")
    location = locate(source, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only)
    config, header = read_config(location.config), read_header(location.weights)
    report = ExpertReport(
        source=location.source,
        format="peft",
        method=config.peft_type,
        base=config.base,
        base_class=config.base_class,
        task_type=config.task_type,
        peft_version=config.peft_version,
        revision=location.revision,
        dtypes=counted(info.dtype for info in header.tensors.values()),
        size=header.size,
        sha256=hash_files([location.weights, location.config]),
        metadata=shortened(header.metadata),
    )
    if config.peft_type in LYCORIS:
        lycoris_folder.describe(report, config, header)
        return report
    try:
        table = sorted_keys(header)
    except LoraweaveError as error:
        report.reason = str(error)
        return report
    _describe(report, config, header, table)
    problems = list(header_problems(config, header, table))
    damaged, idle = _examine_values(header, table)
    problems += damaged
    report.mixable, report.reason = not problems, problems[0] if problems else None
    report.odd = [*problems[1:], *_oddities(report, config, header, table, idle)]
    return report


def _describe(report: ExpertReport, config: AdapterConfig, header: Header, table: KeyTable) -> None:
    """Fill in ranks, scales, targets and counts from the header."""
    factors = {
        module: (header.tensors[keys.A].shape, header.tensors[keys.B].shape)
        for module, keys in table.modules.items()
        if keys.A is not None and keys.B is not None
    }
    ranks = {module: a[0] for module, (a, _) in factors.items() if a and a[0] > 0}
    report.modules = len(factors)
    report.ranks = counted(ranks.values())
    report.targets = counted(module.rpartition(".")[2] for module in factors)
    report.parameters = sum(
        header.tensors[key].count for keys in table.modules.values() for key in (keys.A, keys.B) if key is not None
    )
    if config.alpha is not None:
        report.alphas = counted(config.alpha_of(module) for module in ranks)
        report.scales = counted(config.scale_of(module, rank) for module, rank in ranks.items())


def _examine_values(header: Header, table: KeyTable) -> tuple[list[str], list[str]]:
    """Tensors whose values cannot be mixed, and modules whose LoRA is all zero."""
    damaged: list[str] = []
    zero: set[str] = set()
    get = open_tensors(header)
    for key, tensor in each_tensor(header, table, get):
        if problem := value_problem(header, key, tensor):
            damaged.append(problem)
        if not bool(tensor.any()):
            zero.add(key)
    return damaged, [module for module, keys in table.modules.items() if keys.A in zero or keys.B in zero]


def _oddities(
    report: ExpertReport, config: AdapterConfig, header: Header, table: KeyTable, idle: list[str]
) -> list[str]:
    """What is unusual but does not keep an expert out of a mixture, one sentence each."""
    odd: list[str] = []
    if len(report.ranks) > 1:
        odd.append(f"rank differs between modules: {_table(report.ranks)}")
    if len(report.scales) > 1:
        odd.append(f"scale differs between modules: {_table(report.scales)}")
    if config.rslora:
        odd.append("rank-stabilised (rsLoRA): scale is alpha / sqrt(rank)")
    if strong := [scale for scale in report.scales if abs(scale) >= STRONG_SCALE]:
        formula = "alpha / sqrt(rank)" if config.rslora else "alpha / rank"
        odd.append(f"{formula} = {max(strong, key=abs):g} is unusually strong (1 or 2 is usual)")
    if unusual := [scale for scale in report.scales if scale <= 0]:
        odd.append(f"scale {unusual[0]:g}: " + ("does nothing" if unusual[0] == 0 else "works against its training"))
    if idle:
        odd.append(
            f"A or B is all zero in {len(idle)} of {len(table.modules)} modules ({_some(idle)}): they do nothing"
        )
    if wide := [module for module in table.modules if _too_wide(header, table, module)]:
        odd.append(f"rank exceeds the module's width in {len(wide)} modules ({_some(wide)}): more than a full matrix")
    if table.modules and all("attn" in name.lower() or "attention" in name.lower() for name in table.modules):
        odd.append("targets only attention")
    if embeddings := [module for module, keys in table.modules.items() if keys.embedding]:
        odd.append(f"targets embeddings: {_some(embeddings)}")
    if table.copies:
        odd.append(f"also holds the base's own weights ({_some(table.copies)}); they are not used")
    if config.fields.get("fan_in_fan_out") is True:
        odd.append("trained with fan_in_fan_out (Conv1D layers, as in GPT-2)")
    if len(report.dtypes) > 1:
        odd.append(f"mixed dtypes: {_table(report.dtypes)}")
    if config.bias != "none" and not any(key.endswith(".bias") for key in header.tensors):
        odd.append(f"field bias is {config.bias!r}, but the file holds no biases")
    targets = config.fields.get("target_modules")
    if isinstance(targets, list):
        names = [name for name in targets if isinstance(name, str)]
        if absent := [name for name in names if not any(f".{key}".endswith(f".{name}") for key in table.modules)]:
            odd.append(f"target_modules names {_some(absent)}, of which the file holds nothing")
    if unknown := config.unknown_fields():
        odd.append(f"configuration has fields unknown here, which are ignored: {_some(unknown)}")
    if config.base is None:
        odd.append("names no base model")
    return odd


def _too_wide(header: Header, table: KeyTable, module: str) -> bool:
    keys = table.modules[module]
    shapes = [header.tensors[key].shape for key in (keys.A, keys.B) if key is not None]
    if len(shapes) < 2 or any(len(shape) != 2 for shape in shapes):
        return False
    return shapes[0][0] > min(shapes[0][1], shapes[1][0])


def _table(counts: dict[int, int] | dict[float, int] | dict[str, int]) -> str:
    return ", ".join(f"{value if isinstance(value, str) else f'{value:g}'} in {n}" for value, n in counts.items())


def _some(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
