"""The two spaces in which number-by-number methods can work: experts' deltas, or their factors."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from loraweave.errors import LoraweaveError
from loraweave.transforms.elementwise import Elementwise, combine
from loraweave.transforms.lowrank import best_of_matrix
from loraweave.transforms.types import Space, Term, generator


def merge_in_space(
    method: Elementwise, space: Space, terms: Sequence[Term], density: float, seed: int, rank: int | None
) -> tuple[Tensor, Tensor]:
    """Merge a module's experts number by number.

    - ``delta``: on ``s_i B_i A_i`` as in the papers, then the best approximation of that rank, because what is left
      after pruning has full rank.
    - ``factors``: on ``A_i`` and ``B_i`` apart, as peft does, with the square root of ``w_i s_i`` on either side and
      its sign on ``A``. Products of one expert's ``A`` with another's ``B`` come in; ranks must be equal.

    Args:
        method: what to do with the numbers.
        space: where.
        terms: the experts.
        density: share of numbers that is kept.
        seed: of random numbers.
        rank: of the result in delta space; ``None``: the experts' ranks added up.
    """

    def merged(tensors: list[Tensor], weights: list[float], part: str) -> Tensor:
        return combine(method, tensors, weights, density, lambda number: generator(seed, terms[number], part))

    if space == "delta":
        whole = merged([term.delta for term in terms], [term.weight for term in terms], "delta")
        return best_of_matrix(whole, sum(term.rank for term in terms) if rank is None else rank)
    equal_ranks(terms)
    root = [math.sqrt(abs(term.weight * term.scale)) for term in terms]
    signed = [math.copysign(r, term.weight * term.scale) for r, term in zip(root, terms, strict=True)]
    return merged([term.A for term in terms], signed, "A"), merged([term.B for term in terms], root, "B")


def equal_ranks(terms: Sequence[Term]) -> None:
    """Raise unless factors can be added, which takes equal ranks."""
    if len({term.rank for term in terms}) > 1:
        ranks = ", ".join(f"{term.name} {term.rank}" for term in terms)
        raise LoraweaveError(
            f"space='factors' adds A and B apart and needs equal ranks, but at {terms[0].path!r} they are {ranks}; "
            "use space='delta', which takes any"
        )
