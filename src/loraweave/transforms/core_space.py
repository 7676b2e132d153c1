"""Core Space merging: experts become small matrices between common bases of all ``A`` and of all ``B``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loraweave.transforms import checks
from loraweave.transforms.aligned import Inner
from loraweave.transforms.elementwise import Elementwise
from loraweave.transforms.lowrank import column_basis
from loraweave.transforms.registry import register
from loraweave.transforms.types import Term


@register
@dataclass(frozen=True)
class CoreSpace:
    """``M_i = U^T (s_i B_i A_i) V``; the ``M_i`` are merged to ``M``, and the result is ``U M V^T``.

    ``U [out, k_B]`` and ``V [in, k_A]`` are the singular vectors of ``[B_1 ... B_N]`` and of ``[A_1; ...; A_N]``, which
    span every expert, so nothing is lost on the way (their Theorem on reconstruction) and plain sums are exact. The
    result is a LoRA as it stands, of at most the experts' ranks added up.

    Args:
        then: the method on the core matrices: ``linear`` (which gives the plain sum), ``magnitude_prune``, ``ties``,
            ``dare_linear`` or ``dare_ties``.
        density: share that ``then`` keeps; default: its own.
        seed: of DARE's random numbers.
    """

    then: Elementwise = "ties"
    density: float | None = None
    seed: int = 0

    name: ClassVar[str] = "core_space"
    source: ClassVar[str] = "https://arxiv.org/abs/2509.17786"

    def __post_init__(self) -> None:
        checks.choice(self.name, "then", self.then, Elementwise)
        checks.seed(self.name, self.seed)
        self._inner()

    def _inner(self) -> Inner:
        return Inner(self.name, self.then, self.density, self.seed)

    def module(self, terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
        U = column_basis(torch.cat([term.B for term in terms], 1))
        V = column_basis(torch.cat([term.A for term in terms], 0).T)
        cores = [(U.T @ term.B) @ (term.scale * term.A @ V) for term in terms]
        merged = self._inner().merge(terms, cores)
        # The shorter side is the rank.
        return (merged @ V.T, U) if U.shape[1] <= V.shape[1] else (V.T, U @ merged)
