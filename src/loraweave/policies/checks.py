"""Checks that several policies share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from loraweave.errors import LoraweaveError, unknown


def choice(method: str, option: str, value: Any, allowed: Any) -> None:
    """Raise unless ``value`` is one of the literal type ``allowed``."""
    known = get_args(allowed)
    if value not in known:
        raise unknown(f"{method} {option}", str(value), [str(v) for v in known])


def finite(method: str, option: str, value: Any, above: float | None = None) -> None:
    """Raise unless ``value`` is a finite number (larger than ``above``)."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or (above is not None and value <= above):
        bound = "" if above is None else f" larger than {above:g}"
        raise LoraweaveError(f"{method} {option}: expected a finite number{bound}, got {value!r}")


def whole(method: str, option: str, value: Any) -> None:
    """Raise unless ``value`` is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise LoraweaveError(f"{method} {option}: expected a whole number of at least 1, got {value!r}")


def weight_vector(method: str, weights: Mapping[str, float], experts: Sequence[str], default: float) -> Tensor:
    """``[E]`` weights in the mixture's order, ``default`` for experts that ``weights`` does not name."""
    for name in weights:
        if name not in experts:
            raise unknown("expert", name, experts)
    for name, value in weights.items():
        finite(method, f"weight of {name!r}", value)
    return torch.tensor([float(weights.get(name, default)) for name in experts], dtype=torch.float64)
