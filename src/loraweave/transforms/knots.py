"""KnOTS: experts share one orthonormal basis of outputs, and their coordinates in it are merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loraweave.transforms import checks
from loraweave.transforms.aligned import Inner
from loraweave.transforms.elementwise import Elementwise
from loraweave.transforms.lowrank import supported
from loraweave.transforms.registry import register
from loraweave.transforms.types import Term


@register
@dataclass(frozen=True)
class Knots:
    """``[d_1 ... d_N] = U S [V_1^T ... V_N^T]``; the ``S V_i^T`` are merged, and ``U`` brings the result back.

    ``d_i = s_i B_i A_i`` without its weight, which enters the merge. The result is a LoRA as it stands (``U`` is ``B``)
    of at most the experts' ranks added up, so nothing is cut off. The dense ``d_i`` are never formed.

    Args:
        then: the method in the aligned space: ``linear`` (which gives the plain sum), ``magnitude_prune``, ``ties``,
            ``dare_linear`` or ``dare_ties``.
        density: share that ``then`` keeps; default: its own.
        seed: of DARE's random numbers.
    """

    then: Elementwise = "ties"
    density: float | None = None
    seed: int = 0

    name: ClassVar[str] = "knots"
    source: ClassVar[str] = "https://arxiv.org/abs/2410.19735"

    def __post_init__(self) -> None:
        checks.choice(self.name, "then", self.then, Elementwise)
        checks.seed(self.name, self.seed)
        self._inner()

    def _inner(self) -> Inner:
        return Inner(self.name, self.then, self.density, self.seed)

    def module(self, terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
        U = joint_basis(terms)
        coordinates = [(U.T @ term.B) @ (term.scale * term.A) for term in terms]
        return self._inner().merge(terms, coordinates), U


def joint_basis(terms: Sequence[Term]) -> Tensor:
    """``U [out, k]``: the left singular vectors of ``[d_1 ... d_N]``.

    With ``[B_1 ... B_N] = Q R`` and ``A_i^T = Q_i R_i`` the concatenation is ``Q R diag(s_i R_i^T) diag(Q_i^T)``, and
    the last matrix has orthonormal rows, so the SVD of the small ``R diag(s_i R_i^T)`` tells ``U``.
    """
    Q, R = torch.linalg.qr(torch.cat([term.B for term in terms], 1))
    inner = R @ torch.block_diag(*(term.scale * torch.linalg.qr(term.A.T).R.T for term in terms))
    U, S, _ = torch.linalg.svd(inner, full_matrices=False)
    basis: Tensor = Q @ U[:, : supported(S, max(inner.shape))]
    return basis
