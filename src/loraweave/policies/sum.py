"""Sum: every expert at full strength (MoLE Eq. 1), or at one common or individual weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from loraweave.mixing.types import SitePlan
from loraweave.policies import checks
from loraweave.policies.registry import register


@register
@dataclass(frozen=True)
class Sum:
    """``W + sum_i w_i dW_i`` with weights that need not sum to one (MoLE Eq. 1, where all are 1).

    Args:
        weight: strength of every expert that ``weights`` does not name.
        weights: strength of single experts.
    """

    weight: float = 1.0
    weights: Mapping[str, float] | None = None

    name: ClassVar[str] = "sum"
    source: ClassVar[str] = "https://arxiv.org/abs/2404.13628"
    granularity: ClassVar[Literal["matrix"]] = "matrix"
    normalized: ClassVar[bool] = False
    mix: ClassVar[Literal["deltas"]] = "deltas"

    def __post_init__(self) -> None:
        checks.finite(self.name, "weight", self.weight)

    def constant(self, site: SitePlan) -> Tensor:
        if self.weights is None:
            return torch.full((len(site.experts),), float(self.weight), dtype=torch.float64)
        return checks.weight_vector(self.name, self.weights, site.experts, self.weight)

    def gate(self, site: SitePlan) -> None:
        """Nothing is learned."""
