"""SVD: the best approximation of the weighted sum by one LoRA of a given rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loraweave.transforms import checks
from loraweave.transforms.concat import weighted_sum
from loraweave.transforms.lowrank import best_of_product
from loraweave.transforms.registry import register
from loraweave.transforms.types import Term


@register
@dataclass(frozen=True)
class SVD:
    """The rank-r matrix nearest to ``sum_i w_i s_i B_i A_i`` in Frobenius and spectral norm (Eckart and Young, 1936).

    The sum itself, ``[out, in]``, is never formed: see :func:`~loraweave.transforms.lowrank.best_of_product`.

    Args:
        rank: of the result; default: the largest rank among the experts at that module.
    """

    rank: int | None = None

    name: ClassVar[str] = "svd"
    source: ClassVar[str] = "https://doi.org/10.1007/BF02288367"

    def __post_init__(self) -> None:
        checks.rank(self.name, self.rank)

    def module(self, terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
        A, B = weighted_sum(terms)
        return best_of_product(A, B, max(term.rank for term in terms) if self.rank is None else self.rank)
