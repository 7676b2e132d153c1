"""What a merging transform is: the experts of one module -> one pair of factors."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from loraweave.experts.types import LoraFactors

Space = Literal["delta", "factors"]


@dataclass(frozen=True)
class Term:
    """One expert's part in a merged module; its delta is ``weight * s B A``.

    Attributes:
        name: the expert's name.
        path: of the module in the base model.
        weight: not zero.
        A: ``[r, in]``, float64, as in the file.
        B: ``[out, r]``, float64, as in the file.
        scale: the expert's own scale ``s``.
    """

    name: str
    path: str
    weight: float
    A: Tensor
    B: Tensor
    scale: float

    @classmethod
    def of(cls, name: str, path: str, weight: float, factors: LoraFactors, device: torch.device) -> Term:
        A, B = (tensor.detach().to(device, torch.float64) for tensor in (factors.A, factors.B))
        return cls(name, path, weight, A, B, float(factors.scale))

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def delta(self) -> Tensor:
        """``[out, in]``: ``s B A``, without the weight."""
        return self.scale * self.B @ self.A


class Transform(Protocol):
    """A way to merge: a frozen dataclass whose fields are its options.

    Attributes:
        name: how users call it.
        source: its paper.
    """

    name: ClassVar[str]
    source: ClassVar[str]

    def module(self, terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
        """Merge one module.

        Args:
            terms: the experts that extend it and whose weight is not zero, in order; at least one.

        Returns:
            ``A [r, in]`` and ``B [out, r]`` of the merged LoRA at scale 1; ``r`` is 0 where nothing is left.
        """
        ...


def generator(seed: int, term: Term, part: str) -> torch.Generator:
    """Random numbers that depend on the seed, the module, the expert's name and the part of it, and not on the order
    of experts, so that a merge does not change when they are listed differently or when another one joins."""
    digest = hashlib.sha256("\0".join((str(seed), term.path, term.name, part)).encode()).digest()
    made = torch.Generator()
    made.manual_seed(int.from_bytes(digest[:8]) >> 1)
    return made
