"""Strengths that differ along the run (``0@0,1@0.5``) or between parts of the model (``{"unet": {"down": 0.5}}``)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from loraweave.errors import LoraweaveError
from loraweave.policies import checks

PARTS = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}
"""The words of diffusers' ``set_adapters`` for parts of a UNet."""


@dataclass(frozen=True)
class Schedule:
    """``value@position`` points, straight lines between them, level before the first and after the last.

    Attributes:
        points: ``(position, value)``; position 0 is the first denoising step, 1 the last.
    """

    points: tuple[tuple[float, float], ...]

    @classmethod
    def parse(cls, method: str, text: str) -> Schedule:
        """``"0@0,1@0.5"``: from 0 at the start to 1 half-way.

        Raises:
            LoraweaveError: it does not parse, or positions leave 0..1 or do not increase.
        """
        points = []
        for piece in text.split(","):
            value, at, position = piece.partition("@")
            try:
                points.append((float(position) if at else 0.0, float(value)))
            except ValueError as error:
                raise LoraweaveError(
                    f"{method} schedule {text!r}: {piece.strip()!r} is not value@position; write e.g. '0@0,1@0.5'"
                ) from error
            checks.finite(method, f"value in schedule {text!r}", points[-1][1])
        positions = [position for position, _ in points]
        rising = all(a < b for a, b in pairwise(positions))
        if not rising or any(not 0 <= p <= 1 for p in positions):
            raise LoraweaveError(
                f"{method} schedule {text!r}: expected increasing positions between 0 (first step) and 1 (last), got "
                f"{', '.join(f'{p:g}' for p in positions)}"
            )
        return cls(tuple(points))

    def value(self, fraction: float) -> float:
        """The strength at a fraction of the run."""
        before = [point for point in self.points if point[0] <= fraction]
        after = [point for point in self.points if point[0] > fraction]
        if not before or not after:
            return (before or after)[-1 if before else 0][1]
        (p, v), (q, w) = before[-1], after[0]
        return v + (w - v) * (fraction - p) / (q - p)

    @property
    def peak(self) -> float:
        """The value farthest from zero."""
        return max((value for _, value in self.points), key=abs)


def check(method: str, name: str, strength: Any) -> None:
    """Raise unless ``strength`` is a number, a schedule, or such for parts of the model."""
    if isinstance(strength, str):
        Schedule.parse(method, strength)
    elif isinstance(strength, Mapping):
        for key, inner in strength.items():
            check(method, f"{name}.{key}", inner)
    elif isinstance(strength, list | tuple):
        for number, inner in enumerate(strength):
            check(method, f"{name}[{number}]", inner)
    else:
        checks.finite(method, f"weight of {name!r}", strength)


def resolve(method: str, strength: Any, path: str) -> float | Schedule:
    """What ``strength`` says for the module at ``path``; 1 where it says nothing, as in diffusers' ``set_adapters``.

    Raises:
        LoraweaveError: it is a list that has no entry for this module.
    """
    try:
        found = _find(strength, path.split("."))
        if found is None and isinstance(strength, Mapping) and "." in path:
            found = _find(strength, path.split(".")[1:])  # parts of the denoiser, without its name
    except _NoEntry as error:
        raise LoraweaveError(f"{method} weights: {error.args[0]} {path!r}") from None
    if found is None:
        return 1.0
    return Schedule.parse(method, found) if isinstance(found, str) else float(found)


def unmatched(strength: Any, paths: Iterable[str]) -> list[str]:
    """Keys of ``strength`` that fit no module, dotted."""
    paths = [p for path in paths for p in (path, path.partition(".")[2])]
    return [
        ".".join(keys)
        for keys in _keys(strength)
        if not any(_inside(path.split("."), [part for key in keys for part in _parts(key)]) for path in paths)
    ]


def _keys(strength: Any) -> list[tuple[str, ...]]:
    if not isinstance(strength, Mapping):
        return []
    return [(key, *rest) for key, inner in strength.items() for rest in [(), *_keys(inner)]]


def _parts(key: str) -> list[str]:
    return PARTS.get(key, key.removeprefix("block_")).split(".")


def _inside(path: Sequence[str], prefix: Sequence[str]) -> bool:
    return list(path[: len(prefix)]) == list(prefix)


def _find(strength: Any, path: Sequence[str]) -> Any:
    """The number or text that holds at ``path``; the longest key that fits wins."""
    if isinstance(strength, Mapping):
        fitting = [(_parts(key), inner) for key, inner in strength.items() if _inside(path, _parts(key))]
        for prefix, inner in sorted(fitting, key=lambda item: -len(item[0])):
            found = _find(inner, path[len(prefix) :])
            if found is not None:
                return found
        return None
    if isinstance(strength, list | tuple):
        number = 0 if len(strength) == 1 else _number(path)
        if number is None:
            raise _NoEntry(f"the list {list(strength)} is for the numbered parts of a block, not for")
        if number >= len(strength):
            raise _NoEntry(f"the list {list(strength)} has no entry of number {number} (the first is 0), for")
        return strength[number]
    return strength


class _NoEntry(Exception):
    """A list says nothing about a module that it is for."""


def _number(path: Sequence[str]) -> int | None:
    """Which entry of a list holds at what is left of a path.

    Of a UNet's blocks it is the number of the attention (``attentions.1``), as in diffusers, whether the list stands
    for one block or for all that go down or up; elsewhere the number of the block itself.
    """
    for place in (2, 1, 0) if path and path[0].isdigit() else (1,):
        if len(path) > place and path[place].isdigit():
            return int(path[place])
    return None
