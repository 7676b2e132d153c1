"""A tensor that carries one reading of itself per expert through code that knows nothing of experts.

A prompt is encoded under several LoRAs, and a pipeline repeats, pads and joins the encodings before its denoiser sees
them. Whatever it does to a :class:`Variants` is done to every reading, so that the denoiser's door can take them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from loraweave.errors import LoraweaveError

BARE = -1
"""The reading of the model without any expert."""


class Variants(Tensor):
    """Behaves as its first reading; every operation runs on all of them.

    Attributes:
        readings: number of the expert (or :data:`BARE`) -> the tensor as that expert has it.
    """

    readings: Mapping[int, Tensor]

    @classmethod
    def of(cls, readings: Mapping[int, Tensor]) -> Variants:
        first = next(iter(readings.values()))
        made: Variants = first.as_subclass(cls)
        made.readings = readings
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = [leaf for leaf in tree_flatten((args, dict(kwargs or {})))[0] if isinstance(leaf, Variants)]
        owners = tuple(given[0].readings)
        if any(tuple(other.readings) != owners for other in given[1:]):
            raise LoraweaveError("two encodings of prompts were made under different experts; encode both again")
        results = []
        with torch._C.DisableTorchFunctionSubclass():
            for owner in owners:
                one_args, one_kwargs = tree_map(lambda leaf, owner=owner: pick(leaf, owner), (args, dict(kwargs or {})))
                results.append(func(*one_args, **one_kwargs))
        return join(owners, results)


def pick(value: Any, owner: int) -> Any:
    """The reading of one owner; whatever has no readings is the same for all.

    Raises:
        LoraweaveError: that owner has none.
    """
    if not isinstance(value, Variants):
        return value
    if owner not in value.readings:
        raise LoraweaveError(
            "this encoding of a prompt was made under other experts, or another policy, than are mixed now; encode the "
            "prompt again"
        )
    return value.readings[owner]


def join(owners: Sequence[int], results: Sequence[Any]) -> Any:
    """One result of several equal structures: their tensors become :class:`Variants`, the rest is the first's."""
    first = results[0]
    if isinstance(first, Tensor):
        return Variants.of(dict(zip(owners, results, strict=True)))
    if isinstance(first, tuple | list):
        joined = [join(owners, parts) for parts in zip(*results, strict=True)]
        plain = type(first) in (tuple, list)
        return type(first)(joined) if plain else type(first)(*joined) if hasattr(first, "_fields") else tuple(joined)
    return first
