"""What a user may give for an expert: a folder, a hub id, a bundled one, or an expert already read."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from loraweave.errors import LoraweaveError
from loraweave.experts.types import Expert

THREADS = 4
"""How many experts are read at a time."""
# Names become folder names, keys in files and column heads.
_NAME = re.compile(r"[\w][\w .+-]*")


T = TypeVar("T")
R = TypeVar("R")
Reader = Callable[[str | Path, str], Expert]


def resolve_experts(
    experts: Mapping[str, str | Path | Expert] | Sequence[str | Path | Expert], read: Reader | None = None
) -> list[Expert]:
    """Read all experts, several at a time; they come in order.

    Args:
        experts: names and sources, or sources alone.
        read: reads the files of one, where others than PEFT folders shall do: source, name -> expert.

    Raises:
        LoraweaveError: none given, a name that is taken or unusable, or a source that cannot be read.
    """
    if isinstance(experts, str | Path | Expert):
        raise LoraweaveError("experts: expected a mapping of names to sources, or a list of sources, got a single one")
    named = dict(experts) if isinstance(experts, Mapping) else _by_folder(experts)
    if not named:
        raise LoraweaveError("experts: expected at least one, got none")
    return in_threads(lambda item: resolve_expert(item[1], item[0], read), list(named.items()))


def in_threads(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """``work`` on every item, several at a time; the results, or the first error, in the items' order."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(work, items))


def resolve_expert(source: str | Path | Expert, name: str, read: Reader | None = None) -> Expert:
    """Read one expert under ``name``; ``zoo:NAME`` is a bundled one."""
    if not _NAME.fullmatch(name):
        raise LoraweaveError(f"expert name {name!r}: use letters, digits, '_', '-', '.', '+' and spaces")
    if isinstance(source, Expert):
        return dataclasses.replace(source, name=name)
    from loraweave import zoo
    from loraweave.experts.reader import read_expert

    if isinstance(source, str) and source.startswith(zoo.PREFIX):
        return dataclasses.replace((read or read_expert)(zoo.place(source), name), source=source)
    return (read or read_expert)(source, name)


def _by_folder(sources: Sequence[str | Path | Expert]) -> dict[str, str | Path | Expert]:
    named: dict[str, str | Path | Expert] = {}
    for source in sources:
        name = source.name if isinstance(source, Expert) else str(source).rstrip("/").split("/")[-1].split(":")[-1]
        name = name.removesuffix(".safetensors")
        if name in named:
            raise LoraweaveError(f"two experts would be called {name!r}; give names: {{'a': {source!r}, ...}}")
        named[name] = source
    return named
