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


def row_vectors(rows: Sequence[Mapping[str, float] | None], experts: Sequence[str]) -> Tensor:
    """``[rows, E]``: weights of each row of a batch; experts that a row does not name have none in it.

    Raises:
        LoraweaveError: no rows, something that is no mapping, an unknown expert, or a weight that is no finite number.
    """
    if isinstance(rows, str | Mapping) or not isinstance(rows, Sequence) or not rows:
        raise LoraweaveError(
            "rows: expected a list with one entry per row of the batch, {expert: weight} or None for the bare model, "
            f"got {rows!r}"
        )
    vectors = []
    for number, row in enumerate(rows):
        if row is not None and not isinstance(row, Mapping):
            raise LoraweaveError(f"rows: expected {{expert: weight}} or None in row {number}, got {row!r}")
        vectors.append(weight_vector(f"rows, row {number}", row or {}, experts, 0.0))
    return torch.stack(vectors)
