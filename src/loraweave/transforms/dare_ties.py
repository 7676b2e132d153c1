"""DARE, then TIES: drop at random and rescale, elect signs, average what agrees."""

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
class DareTies:
    """TIES' election and disjoint mean of ``w_i (m_i * d_i) / density``; nothing is trimmed besides, as in peft.

    Args:
        density: share of each matrix that is kept, in (0, 1].
        seed: of the random numbers. They depend on it, the module and the expert's name, not on the experts' order.
        space: ``delta``: ``d_i = s_i B_i A_i``, as in the paper. ``factors``: ``A_i`` and ``B_i`` apart, as in peft;
            see :func:`~loraweave.transforms.spaces.merge_in_space`.
        rank: of the result in delta space; default: the experts' ranks added up.
    """

    density: float = DENSITY["dare_ties"]
    seed: int = 0
    space: Space = "delta"
    rank: int | None = None

    name: ClassVar[str] = "dare_ties"
    source: ClassVar[str] = "https://arxiv.org/abs/2311.03099"

    def __post_init__(self) -> None:
        checks.density(self.name, self.density)
        checks.seed(self.name, self.seed)
        checks.choice(self.name, "space", self.space, Space)
        checks.rank(self.name, self.rank)
        checks.no_rank_in_factors(self.name, self.space, self.rank)

    def module(self, terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
        return merge_in_space("dare_ties", self.space, terms, self.density, self.seed, self.rank)
