"""Linear combination, in the space of deltas (exact) or of factors (as published by LoRAHub and PEM)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from loraweave.transforms import checks
from loraweave.transforms.concat import weighted_sum
from loraweave.transforms.registry import register
from loraweave.transforms.spaces import equal_ranks
from loraweave.transforms.types import Space, Term

Negate = Literal["both", "one"]


@register
@dataclass(frozen=True)
class Linear:
    """``sum_i w_i s_i B_i A_i`` (delta), or ``(sum_i w_i B_i)(sum_i w_i A_i)`` (factors).

    In factors every expert's ``B`` also meets every other's ``A``, and a weight counts twice: ``w_i^2 B_i A_i``. Scales
    go half to either factor (their square root), which is the published formula where all are equal.

    Args:
        space: ``delta`` takes any ranks and is exact; ``factors`` needs equal ranks and keeps them.
        negate: what a negative weight does in factors: ``both`` has ``w_i`` on either factor (LoRAHub's code), which
            leaves ``B_i A_i`` positive; ``one`` has ``|w_i|`` on ``A`` and ``w_i`` on ``B`` (PEM: negation turns one
            factor), which turns it.
    """

    space: Space = "delta"
    negate: Negate = "both"

    name: ClassVar[str] = "linear"
    source: ClassVar[str] = "https://arxiv.org/abs/2307.13269"

    def __post_init__(self) -> None:
        checks.choice(self.name, "space", self.space, Space)
        checks.choice(self.name, "negate", self.negate, Negate)

    def module(self, terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
        if self.space == "delta":
            return weighted_sum(terms)
        equal_ranks(terms)
        A, B = torch.zeros_like(terms[0].A), torch.zeros_like(terms[0].B)
        for term in terms:
            root = math.sqrt(abs(term.scale))
            A = A + (term.weight if self.negate == "both" else abs(term.weight)) * root * term.A
            B = B + term.weight * math.copysign(root, term.scale) * term.B
        return A, B
