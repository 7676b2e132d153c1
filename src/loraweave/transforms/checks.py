"""Checks of options that several transforms share."""

from __future__ import annotations

from typing import Any

from loraweave.errors import LoraweaveError
from loraweave.policies.checks import choice, finite

__all__ = ["choice", "density", "finite", "rank", "seed"]


def density(method: str, value: Any) -> None:
    """Raise unless ``value`` is a share: above 0, at most 1."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1:
        raise LoraweaveError(f"{method} density: expected a share above 0 and at most 1, got {value!r}")


def rank(method: str, value: Any) -> None:
    """Raise unless ``value`` is ``None`` or a whole number of at least 1."""
    if value is not None and not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        raise LoraweaveError(f"{method} rank: expected a whole number of at least 1, got {value!r}")


def seed(method: str, value: Any) -> None:
    """Raise unless ``value`` is a whole number."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise LoraweaveError(f"{method} seed: expected a whole number, got {value!r}")


def no_rank_in_factors(method: str, space: str, value: Any) -> None:
    """Raise if a rank is given where the experts' own decides."""
    if space == "factors" and value is not None:
        raise LoraweaveError(f"{method} rank: space='factors' keeps the experts' own rank; leave rank out")
