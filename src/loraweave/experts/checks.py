"""What speaks against mixing the adapter in a file. The reader raises the first reason, a report lists them all."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from loraweave.errors import LoraweaveError
from loraweave.experts.config import AdapterConfig
from loraweave.experts.keys import KeyTable, sort_keys, unpaired
from loraweave.experts.weightfile import MIXABLE_DTYPES, Header


def sorted_keys(header: Header) -> KeyTable:
    """:func:`sort_keys` of a file, with errors that name the file."""
    try:
        return sort_keys(header.tensors)
    except LoraweaveError as error:
        raise LoraweaveError(f"{header.path}: {error}") from error


def header_problems(config: AdapterConfig, header: Header, table: KeyTable) -> Iterator[str]:
    """Why an adapter cannot be mixed, as far as configuration and header tell; nothing if it can."""
    for reason in config.refusals():
        yield f"{config.path}: {reason}"
    for reason in [*table.refusals(), *unpaired(table.modules)]:
        yield f"{header.path}: {reason}"
    if not table.modules:
        yield f"{header.path}: holds no LoRA (no tensor is named like '...lora_A.weight')"
    for module in table.modules:
        problem = _shape_problem(config, header, table, module)
        if problem is not None:
            yield f"{header.path}: {problem}"


def value_problem(header: Header, key: str, tensor: Tensor) -> str | None:
    """Why a tensor's values cannot be mixed, if so."""
    if bool(tensor.isfinite().all()):
        return None
    return f"{header.path}: tensor {key!r} has NaN or infinite values; the training diverged or the file is damaged"


def each_tensor(header: Header, table: KeyTable, get: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The names and tensors of the factors, module by module; those of a dtype that cannot be mixed are left out."""
    for keys in table.modules.values():
        for key in (keys.A, keys.B):
            if key is not None and header.tensors[key].dtype in MIXABLE_DTYPES:
                yield key, get(key)


def _shape_problem(config: AdapterConfig, header: Header, table: KeyTable, module: str) -> str | None:
    keys = table.modules[module]
    if keys.A is None or keys.B is None:
        return None  # reported as unpaired
    for key in (keys.A, keys.B):
        info = header.tensors[key]
        if info.dtype not in MIXABLE_DTYPES:
            return (
                f"tensor {key!r} has dtype {info.dtype}; expected one of {', '.join(MIXABLE_DTYPES)}: "
                "convert it and save the file again"
            )
        if len(info.shape) in (3, 5):
            return (
                f"tensor {key!r} has shape {list(info.shape)}, of a convolution; LoRAs on one- and three-dimensional "
                "convolutions are not supported"
            )
        if len(info.shape) not in (2, 4) or 0 in info.shape:
            return (
                f"tensor {key!r} has shape {list(info.shape)}; expected two dimensions, four of a convolution, none "
                "of them 0 (shards that were not gathered before saving look like this)"
            )
    a, b = header.tensors[keys.A].shape, header.tensors[keys.B].shape
    if len(a) != len(b) or (len(b) == 4 and b[2:] != (1, 1)):
        return (
            f"tensors {keys.A!r} {list(a)} and {keys.B!r} {list(b)} do not fit; expected [rank, in, h, w] and "
            "[out, rank, 1, 1]"
        )
    if a[0] != b[1]:
        return f"tensors {keys.A!r} {list(a)} and {keys.B!r} {list(b)} do not fit; expected [rank, in] and [out, rank]"
    if config.rank is not None and config.rank_of(module) != a[0]:
        return (
            f"tensor {keys.A!r} has rank {a[0]}, but r and rank_pattern in {config.path.name} say "
            f"{config.rank_of(module)}; the two files do not belong together"
        )
    return None
