"""Magnitude pruning: of every expert only the largest numbers, added up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loraweave.transforms import checks
from loraweave.transforms.elementwise import DENSITY
from loraweave.transforms.registry import register
from loraweave.transforms.spaces import merge_in_space
from loraweave.transforms.types import Space, Term


@register
@dataclass(frozen=True)
class MagnitudePrune:
    """``sum_i w_i trim(d_i)``: ``trim`` keeps the share ``density`` of largest magnitude of each matrix.

    Args:
        density: share of each matrix that is kept, in (0, 1].
        space: ``delta``: ``d_i = s_i B_i A_i``, as in the paper. ``factors``: ``A_i`` and ``B_i`` apart, as in peft;
            see :func:`~loraweave.transforms.spaces.merge_in_space`.
        rank: of the result in delta space; default: the experts' ranks added up.
    """

    density: float = DENSITY["magnitude_prune"]
    space: Space = "delta"
    rank: int | None = None

    name: ClassVar[str] = "magnitude_prune"
    source: ClassVar[str] = "https://arxiv.org/abs/1506.02626"

    def __post_init__(self) -> None:
        checks.density(self.name, self.density)
        checks.choice(self.name, "space", self.space, Space)
        checks.rank(self.name, self.rank)
        checks.no_rank_in_factors(self.name, self.space, self.rank)

    def module(self, terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
        return merge_in_space("magnitude_prune", self.space, terms, self.density, 0, self.rank)
