"""PEFT folders, local or on the hub, to experts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from loraweave.errors import LoraweaveError, LoraweaveWarning
from loraweave.experts import lycoris_folder
from loraweave.experts.checks import header_problems, sorted_keys
from loraweave.experts.config import LYCORIS, AdapterConfig, read_config
from loraweave.experts.keys import KeyTable
from loraweave.experts.mapped import Entry, MappedFactors, MappedFile
from loraweave.experts.scan import checked_hash
from loraweave.experts.sources import Location, locate
from loraweave.experts.types import Expert
from loraweave.experts.weightfile import Header, hash_files, read_header


def read_expert(
    source: str | Path,
    name: str | None = None,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Expert:
    """Read a trained LoRA that peft saved. Its tensors are mapped from the file and keep their dtype.

    Args:
        source: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``; or a hub id, ``owner/name``,
            ``owner/name/subfolder`` or either with ``@revision``. A local folder wins over a hub id of that name.
        name: what to call the expert; by default its folder's or repository's name.
        revision: a hub branch, tag or commit.
        cache_dir: the hub cache; by default the one of ``huggingface_hub``.
        local_files_only: look in the hub cache only, as with the environment variable ``HF_HUB_OFFLINE=1``.

    Raises:
        LoraweaveError: the files are missing, damaged or pickled; or they hold something that cannot be mixed as
            ``scale * B A`` (LoRA, LoHa and LoKr can): DoRA, ``modules_to_save``, biases, another PEFT method; or they
            contradict each other.
    """
    location = locate(source, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only)
    config = read_config(location.config)
    header = read_header(location.weights)
    if config.peft_type in LYCORIS:
        return _lycoris(location, config, header, name)
    table = sorted_keys(header)
    for problem in header_problems(config, header, table):
        raise LoraweaveError(problem)
    _warn(config, header, table)
    sha256 = checked_hash(header, _names(table), location.config)
    factors = _factors(config, header, table)
    return Expert(
        name=name or location.name,
        factors=factors,
        source=location.source,
        sha256=sha256,
        base=config.base,
        revision=location.revision,
    )


def read_experts(
    sources: Mapping[str, str | Path],
    *,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    threads: int = 8,
) -> list[Expert]:
    """Read several experts at once, in threads.

    Args:
        sources: the expert's name -> its folder or hub id; see :func:`read_expert`.
        cache_dir: see :func:`read_expert`.
        local_files_only: see :func:`read_expert`.
        threads: how many to read at a time.

    Returns:
        The experts, in the order of ``sources``.

    Raises:
        LoraweaveError: as :func:`read_expert`, for the first expert in order that cannot be read.
    """

    def read(item: tuple[str, str | Path]) -> Expert:
        return read_expert(item[1], item[0], cache_dir=cache_dir, local_files_only=local_files_only)

    with ThreadPoolExecutor(max_workers=max(1, min(threads, len(sources)))) as pool:
        return list(pool.map(read, sources.items()))


def fingerprint(
    source: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> str:
    """The SHA-256 that :func:`read_expert` would give this source: of its weight file followed by its configuration."""
    return _hash(locate(source, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only))


def _factors(config: AdapterConfig, header: Header, table: KeyTable) -> MappedFactors:
    entries = {}
    for module, keys in table.modules.items():
        a, b = header.tensors[str(keys.A)], header.tensors[str(keys.B)]
        entries[module] = Entry(a, b, config.scale_of(module, a.shape[0]), keys.embedding)
    return MappedFactors(MappedFile(header), entries)


def _lycoris(location: Location, config: AdapterConfig, header: Header, name: str | None) -> Expert:
    """A LoHa or LoKr as the LoRA it equals."""
    for problem in lycoris_folder.problems(config, header):
        raise LoraweaveError(problem)
    _warn(config, header, KeyTable(), stacklevel=4)
    return Expert(
        name=name or location.name,
        sha256=checked_hash(header, lycoris_folder.tensors(header), location.config),
        factors=lycoris_folder.factors(config, header),
        source=location.source,
        base=config.base,
        revision=location.revision,
    )


def _names(table: KeyTable) -> frozenset[str]:
    """Names of all factors."""
    return frozenset(str(key) for keys in table.modules.values() for key in (keys.A, keys.B))


def _warn(config: AdapterConfig, header: Header, table: KeyTable, stacklevel: int = 3) -> None:
    if unknown := config.unknown_fields():
        warnings.warn(
            f"{config.path}: unknown fields {', '.join(unknown)} are ignored; a newer PEFT may mean something by them",
            LoraweaveWarning,
            stacklevel=stacklevel,
        )
    if table.copies:
        warnings.warn(
            f"{header.path}: also holds the base's own weights ({', '.join(table.copies)}), which are not "
            "used; if the vocabulary was resized in training, give the base those weights first",
            LoraweaveWarning,
            stacklevel=stacklevel,
        )


def _hash(location: Location) -> str:
    return hash_files([location.weights, location.config])
