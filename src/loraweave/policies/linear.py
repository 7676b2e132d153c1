"""Normalised linear arithmetic (NLA): weights that sum to one (MoLE Eq. 2)."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from loraweave.errors import LoraweaveError
from loraweave.mixing.types import SitePlan
from loraweave.policies import checks
from loraweave.policies.registry import register


@register
@dataclass(frozen=True)
class Linear:
    """``W + sum_i w_i dW_i`` with ``sum_i w_i = 1`` (MoLE Eq. 2).

    Args:
        weights: weight of each expert; divided by their sum. Experts that are not named get 0. Default: 1/N each.
        blocks: other weights for some parts of the model: a pattern of module paths (``decoder.*``,
            ``*.layers.3``, shell wildcards; it matches a module and all that lies in it) -> weights. The last
            pattern that matches wins.
    """

    weights: Mapping[str, float] | None = None
    blocks: Mapping[str, Mapping[str, float]] | None = None

    name: ClassVar[str] = "linear"
    source: ClassVar[str] = "https://arxiv.org/abs/2404.13628"
    granularity: ClassVar[Literal["matrix"]] = "matrix"
    normalized: ClassVar[bool] = True
    mix: ClassVar[Literal["deltas"]] = "deltas"

    def constant(self, site: SitePlan) -> Tensor:
        chosen = self.weights
        for pattern, weights in (self.blocks or {}).items():
            if _covers(pattern, site.members[0]):
                chosen = weights
        if chosen is None:
            return torch.full((len(site.experts),), 1.0 / len(site.experts), dtype=torch.float64)
        vector = checks.weight_vector(self.name, chosen, site.experts, 0.0)
        if float(vector.sum()) == 0:
            raise LoraweaveError(
                f"linear weights at {site.members[0]}: they sum to 0 and cannot be normalised; use sum"
            )
        return vector / vector.sum()

    def check(self, sites: Sequence[SitePlan]) -> None:
        """Raise if a pattern fits nothing: its weights would be passed over in silence."""
        for pattern in self.blocks or {}:
            if not any(_covers(pattern, path) for site in sites for path in site.members):
                raise LoraweaveError(
                    f"linear blocks: {pattern!r} fits no module that an expert extends; these are, among others, "
                    f"{', '.join(repr(site.members[0]) for site in sites[:2])}"
                )

    def gate(self, site: SitePlan) -> None:
        """Nothing is learned."""


def _covers(pattern: str, path: str) -> bool:
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"{pattern}.*")
