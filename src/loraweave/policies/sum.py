"""Sum: every expert at full strength (MoLE Eq. 1), or at one common or individual weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from loraweave.errors import LoraweaveError, unknown
from loraweave.mixing.types import Moment, SitePlan
from loraweave.policies import checks, strength
from loraweave.policies.registry import register


@register
@dataclass(frozen=True)
class Sum:
    """``W + sum_i w_i dW_i`` with weights that need not sum to one (MoLE Eq. 1, where all are 1).

    Args:
        weight: strength of every expert that ``weights`` does not name.
        weights: strength of single experts: a number; for pictures also a schedule along the denoising run
            (``"0@0,1@0.5"``: value@position, straight lines between; a text encoder, which runs before, takes the
            value farthest from zero); or either for parts of the model, in diffusers' own words
            (``{"unet": {"down": 0.5, "up": {"block_1": [0.3, 1, 1]}}, "text_encoder": 0.8}``; 1 where nothing is said).
    """

    weight: float = 1.0
    weights: Mapping[str, Any] | None = None

    name: ClassVar[str] = "sum"
    source: ClassVar[str] = "https://arxiv.org/abs/2404.13628"
    granularity: ClassVar[Literal["matrix"]] = "matrix"
    normalized: ClassVar[bool] = False
    mix: ClassVar[Literal["deltas"]] = "deltas"

    def __post_init__(self) -> None:
        checks.finite(self.name, "weight", self.weight)
        for name, weight in (self.weights or {}).items():
            strength.check(self.name, name, weight)

    def constant(self, site: SitePlan) -> Tensor | None:
        strengths = self._strengths(site)
        if any(isinstance(s, strength.Schedule) for s in strengths):
            return None
        return torch.tensor(strengths, dtype=torch.float64)

    def at(self, site: SitePlan, moment: Moment | None) -> Tensor:
        def now(s: float | strength.Schedule) -> float:
            if isinstance(s, strength.Schedule):
                return s.peak if moment is None else s.value(moment.fraction)
            return s

        return torch.tensor([now(s) for s in self._strengths(site)], dtype=torch.float64)

    def check(self, sites: Sequence[SitePlan]) -> None:
        """Raise if a key for a part of the model fits nothing: its weight would be passed over in silence."""
        paths = [path for site in sites for path in site.members]
        for name, weight in (self.weights or {}).items():
            for key in strength.unmatched(weight, paths):
                raise LoraweaveError(
                    f"sum weights of {name!r}: {key!r} fits no module that an expert extends; these are, among others, "
                    f"{', '.join(map(repr, paths[:2]))}"
                )

    def gate(self, site: SitePlan) -> None:
        """Nothing is learned."""

    def _strengths(self, site: SitePlan) -> list[float | strength.Schedule]:
        weights = self.weights or {}
        for name in weights:
            if name not in site.experts:
                raise unknown("expert", name, site.experts)
        return [
            strength.resolve(self.name, weights[name], site.members[0]) if name in weights else float(self.weight)
            for name in site.experts
        ]
