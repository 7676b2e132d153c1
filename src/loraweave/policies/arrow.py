"""Arrow: routing by what each expert's own weights respond to most, without training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from loraweave.errors import LoraweaveError
from loraweave.experts.bank import Bank
from loraweave.experts.types import LoraFactors
from loraweave.mixing.types import Evidence, SitePlan, Weights
from loraweave.policies import checks
from loraweave.policies.mole_evidence import symmetric_root
from loraweave.policies.precision import full_precision, moved
from loraweave.policies.registry import register


@register
@dataclass(frozen=True)
class Arrow:
    """``g`` is the softmax over the ``k`` largest of ``|v_i . x| / temperature`` (Arrow).

    ``v_i`` is the top right singular vector of ``B_i A_i``: what the expert responds to most. Every module routes every
    token by itself; nothing is trained. As in peft's Arrow the token is not normalised. An expert that does not extend
    a module is no candidate there.

    Args:
        k: how many experts a token gets.
        temperature: of the softmax.
    """

    k: int = 3
    temperature: float = 1.0

    name: ClassVar[str] = "arrow"
    source: ClassVar[str] = "https://arxiv.org/abs/2405.11157"
    granularity: ClassVar[Literal["matrix"]] = "matrix"
    normalized: ClassVar[bool] = True
    mix: ClassVar[Literal["deltas"]] = "deltas"

    def __post_init__(self) -> None:
        checks.whole(self.name, "k", self.k)
        checks.finite(self.name, "temperature", self.temperature, above=0)

    def constant(self, site: SitePlan) -> None:
        """No site is constant."""

    def gate(self, site: SitePlan) -> nn.Module:
        return ArrowRouter(self, site.bank)


class ArrowRouter(nn.Module):
    """Routes the tokens of one module.

    ``v_i`` lies in the row space of ``A_i``, so ``v_i . x = c_i . (A_i x)``: all is read in rank space, which the
    mixture computes anyway.

    Attributes:
        directions: ``[R, E]``; column ``i`` holds ``c_i`` in the rank rows of expert ``i``.
        absent: ``[E]``, the experts that do not extend this module.
    """

    normalized = True
    directions: Tensor
    absent: Tensor

    def __init__(self, policy: Arrow, bank: Bank) -> None:
        super().__init__()
        self.policy = policy
        experts = len(bank.layout.ranks)
        directions = torch.zeros(bank.layout.rows, experts, dtype=torch.float32)
        for i, start in enumerate(bank.layout.offsets[:experts]):
            f = bank.factors(i)
            if f is not None:
                directions[start : start + f.rank, i] = direction(f).cpu()
        device = bank.device
        self.register_buffer("directions", directions.to(device), persistent=False)
        absent = torch.tensor([rank == 0 for rank in bank.layout.ranks], device=device)
        self.register_buffer("absent", absent, persistent=False)
        self.closed = self.absent

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ArrowRouter:
        super()._apply(moved(fn), recurse)
        self.closed = self.closed.to(self.absent.device)
        return self

    def keep(self, kept: Tensor | None) -> None:
        """Mask experts: ``kept`` is ``[E]`` bool; ``None`` lifts the mask."""
        self.closed = self.absent if kept is None else self.absent | ~kept.to(self.absent.device)

    def forward(self, evidence: Evidence) -> Weights:
        assert evidence.ranks is not None
        with full_precision(evidence.hidden):
            similarity = (evidence.ranks.float() @ self.directions).abs()
            open_to = similarity.masked_fill(self.closed.to(similarity.device), -torch.inf)
            best, index = open_to.topk(min(self.policy.k, len(self.closed)))
            # Where no candidate is left there is nothing to weigh, and the softmax is not a number.
            values = (best / self.policy.temperature).softmax(-1).nan_to_num(0.0)
            return Weights(torch.zeros_like(similarity).scatter(-1, index, values), index, values)


def direction(f: LoraFactors) -> Tensor:
    """``c`` ``[r]`` with ``A^T c`` the top right singular vector of ``B A`` (its sign is arbitrary); 0 where ``BA`` is.

    With ``S = (B^T B)^(1/2)``, ``S A`` and ``B A`` have the same right singular vectors, ``A^T S z / sigma`` for the
    eigenvectors ``z`` of ``S A A^T S``.
    """
    root, A = symmetric_root(f.B).double(), f.A.double().flatten(1)  # of a convolution: what a kernel sees
    if not torch.isfinite(root).all() or not torch.isfinite(A).all():
        raise LoraweaveError("arrow: an expert's weights are not finite, so they point nowhere; check it with inspect")
    values, vectors = torch.linalg.eigh(root @ A @ A.T @ root)
    if values[-1] <= 0:
        return torch.zeros(f.rank, device=A.device)
    c: Tensor = root @ vectors[:, -1] / values[-1].sqrt()
    return c.float()
