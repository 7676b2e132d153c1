"""Merging methods by name: how Python, recipes and the command line refer to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from loraweave.errors import LoraweaveError, unknown
from loraweave.transforms.types import Transform

T = TypeVar("T")
_transforms: dict[str, Any] = {}


def register(cls: T) -> T:
    """Class decorator: make a transform known under its ``name``."""
    transform: Any = cls
    if transform.name in _transforms:
        raise LoraweaveError(f"two merging methods are called {transform.name!r}")
    _transforms[transform.name] = transform
    return cls


def names() -> tuple[str, ...]:
    return tuple(sorted(_transforms))


def get(name: str) -> Callable[..., Transform]:
    """The transform class called ``name``.

    Raises:
        LoraweaveError: none has that name; the message suggests the nearest.
    """
    if name not in _transforms:
        raise unknown("merging method", name, names())
    cls: Callable[..., Transform] = _transforms[name]
    return cls


def options(name: str) -> dict[str, Any]:
    """The options of the transform called ``name``, with their defaults."""
    return {field.name: field.default for field in dataclasses.fields(get(name))}  # type: ignore[arg-type]


def build(name: str, given: Mapping[str, Any]) -> Transform:
    """The transform called ``name`` with these options.

    Raises:
        LoraweaveError: unknown name, unknown option, or an option that the transform refuses.
    """
    cls, known = get(name), options(name)
    for option in given:
        if option not in known:
            raise unknown(f"option of merging method {name!r}", option, known)
    return cls(**given)
