"""Composite: every expert makes its own estimate at every step, and the estimates are averaged."""

from __future__ import annotations

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
class Composite:
    """``sum_i w_i e_i / sum_i w_i`` of the score estimates ``e_i``, each made with one expert alone at weight 1.

    The denoiser's rows are run once per expert, each with the prompt as that expert's own text encoder reads it.
    Averaging before guidance equals averaging after it, since guidance is linear; without guidance the same holds (the
    published code then keeps one LoRA only).

    Args:
        weights: what each expert's estimate counts, divided by their sum. Experts that are not named get 0. Default: 1.
        chunk: how many experts to run at a time, to save memory; default: all at once.
    """

    weights: Mapping[str, float] | None = None
    chunk: int | None = None

    name: ClassVar[str] = "composite"
    source: ClassVar[str] = "https://arxiv.org/abs/2402.16843"
    granularity: ClassVar[Literal["matrix"]] = "matrix"
    normalized: ClassVar[bool] = True
    mix: ClassVar[Literal["deltas"]] = "deltas"

    def __post_init__(self) -> None:
        if self.chunk is not None:
            checks.whole(self.name, "chunk", self.chunk)
        for name, weight in (self.weights or {}).items():
            checks.finite(self.name, f"weight of {name!r}", weight)
            if weight < 0:
                raise LoraweaveError(f"composite weight of {name!r}: expected a number of at least 0, got {weight!r}")

    def check(self, sites: Sequence[SitePlan]) -> None:
        if float(self.shares(sites[0].experts).sum()) == 0:
            raise LoraweaveError("composite weights: they sum to 0; at least one must be larger")

    def shares(self, experts: Sequence[str]) -> Tensor:
        if self.weights is None:
            return torch.ones(len(experts), dtype=torch.float64)
        return checks.weight_vector(self.name, self.weights, experts, 0.0)

    def constant(self, site: SitePlan) -> None:
        """It differs between the copies of a row."""

    def gate(self, site: SitePlan) -> None:
        """Nothing is learned."""
