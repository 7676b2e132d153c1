"""LoRAHub: one weight per expert, found on a few examples without gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from loraweave.errors import LoraweaveError
from loraweave.mixing.types import SitePlan
from loraweave.policies import checks
from loraweave.policies.registry import register

Optimizer = Literal["cmaes", "ngopt"]
Space = Literal["delta", "factors"]


@register
@dataclass(frozen=True)
class LoRAHub:
    """``W + sum_i w_i dW_i`` with ``w`` that minimises ``loss + l1 * mean |w_i|`` on a few examples (LoRAHub).

    :func:`loraweave.search` finds ``w`` and puts a :class:`~loraweave.Sum` with it in this policy's place; until then
    every expert has the weight ``start``. ``loraweave train`` and ``compare`` search by themselves.

    Args:
        evaluations: how many weightings are tried, the start included; one pass over the examples each.
        optimizer: ``cmaes`` (package ``cmaes``), or the published ``ngopt`` (package ``nevergrad``).
        l1: weight of the mean absolute weight.
        bound: weights stay within ``[-bound, bound]``.
        start: weight of every expert at the start.
        examples: how many examples the search uses, drawn by the seed; ``None`` for all there are.
        space: ``delta`` adds updates; ``factors``, as published, adds A and B, ``(sum w_i B_i)(sum w_i A_i)``, and ends
            in one LoRA in the experts' place, see :func:`loraweave.search`.
    """

    evaluations: int = 40
    optimizer: Optimizer = "cmaes"
    l1: float = 0.05
    bound: float = 1.5
    start: float = 0.0
    examples: int | None = 64
    space: Space = "delta"

    name: ClassVar[str] = "lorahub"
    source: ClassVar[str] = "https://arxiv.org/abs/2307.13269"
    granularity: ClassVar[Literal["matrix"]] = "matrix"
    normalized: ClassVar[bool] = False
    mix: ClassVar[Literal["deltas"]] = "deltas"

    def __post_init__(self) -> None:
        checks.whole(self.name, "evaluations", self.evaluations)
        checks.choice(self.name, "optimizer", self.optimizer, Optimizer)
        checks.finite(self.name, "l1", self.l1, above=-1e-30)
        checks.finite(self.name, "bound", self.bound, above=0)
        checks.finite(self.name, "start", self.start)
        if abs(self.start) > self.bound:
            raise LoraweaveError(f"lorahub start: expected a weight within ±{self.bound:g} (bound), got {self.start!r}")
        if self.examples is not None:
            checks.whole(self.name, "examples", self.examples)
        checks.choice(self.name, "space", self.space, Space)

    def constant(self, site: SitePlan) -> Tensor:
        return torch.full((len(site.experts),), float(self.start), dtype=torch.float64)

    def gate(self, site: SitePlan) -> None:
        """Nothing is learned by gradients."""
