"""Policies by name: how recipes and saved mixtures refer to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from loraweave.errors import LoraweaveError, unknown

P = TypeVar("P")
_policies: dict[str, Any] = {}
ALIASES = {"merge": "sum", "nla": "linear"}
"""What the literature on pictures calls some of them."""


def register(cls: P) -> P:
    """Class decorator: make a policy known under its ``name``."""
    policy: Any = cls
    if policy.name in _policies:
        raise LoraweaveError(f"two policies are called {policy.name!r}: {_policies[policy.name]}, {policy}")
    _policies[policy.name] = policy
    return cls


def names() -> tuple[str, ...]:
    return tuple(_policies)


def get(name: str) -> Callable[..., Any]:
    """The policy class called ``name``.

    Raises:
        LoraweaveError: no policy has that name; the message suggests the nearest.
    """
    name = ALIASES.get(name, name)
    if name not in _policies:
        raise unknown("method", name, _policies)
    cls: Callable[..., Any] = _policies[name]
    return cls


def options(name: str) -> tuple[str, ...]:
    """The options of the policy called ``name``."""
    return tuple(f.name for f in dataclasses.fields(get(name)))  # type: ignore[arg-type]


def from_dict(config: Mapping[str, Any]) -> Any:
    """``{"name": "mole", "granularity": "block"}`` -> the policy.

    Raises:
        LoraweaveError: unknown name, unknown option, or an option the policy refuses.
    """
    given = dict(config)
    name = given.pop("name", None)
    if not isinstance(name, str):
        raise LoraweaveError(f"method: expected a field 'name' (one of: {', '.join(names())}), got {dict(config)}")
    return build(get(name), name, given)


def build(cls: Callable[..., Any], name: str, given: Mapping[str, Any]) -> Any:
    """``cls`` with these options.

    Raises:
        LoraweaveError: an unknown option, one that it refuses, or one that it needs is missing.
    """
    known = tuple(f.name for f in dataclasses.fields(cls))  # type: ignore[arg-type]
    for option in given:
        if option not in known:
            raise unknown(f"option of method {name!r}", option, known)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and field.name not in given:
            raise LoraweaveError(f"method {name!r}: needs the option {field.name!r}; give it in the recipe")
    return cls(**given)


def to_dict(policy: Any) -> dict[str, Any]:
    """The inverse of :func:`from_dict`."""
    return {"name": policy.name, **dataclasses.asdict(policy)}
