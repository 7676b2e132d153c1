"""What an expert is: one trained LoRA, read from a file and not yet attached to anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from loraweave.experts.report import ExpertReport


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """The LoRA of one module: ``delta(x) = scale * B A x``.

    Attributes:
        A: ``[rank, in]`` (for an embedding, ``in`` is the number of entries; of a convolution ``[rank, in, kh, kw]``).
        B: ``[out, rank]``.
        scale: ``alpha / rank``, or ``alpha / sqrt(rank)`` for rank-stabilised LoRA.
        embedding: whether the module is an embedding, looked up rather than multiplied.
    """

    A: Tensor
    B: Tensor
    scale: float
    embedding: bool = False

    @property
    def rank(self) -> int:
        return self.A.shape[0]


@dataclass(frozen=True)
class Expert:
    """One trained LoRA.

    Attributes:
        name: how the mixture calls it; unique within a mixture.
        factors: module path in the base model (no ``base_model.model.`` prefix) -> its LoRA.
        source: where it was read from, as the user wrote it.
        sha256: hash of the weight file followed by its configuration; tells whether an expert changed since.
        base: the base model its author named, if any.
        revision: the hub commit it was read at, if it came from the hub.
        report: what reading it for a pipeline showed; ``None`` for other experts.
    """

    name: str
    factors: Mapping[str, LoraFactors] = field(repr=False)
    source: str = ""
    sha256: str = ""
    base: str | None = None
    revision: str | None = None
    report: ExpertReport | None = field(default=None, repr=False, compare=False)

    def scaled(self, strength: float) -> Expert:
        """The same at ``strength`` times its scale."""
        if strength == 1:
            return self
        factors = {path: dataclasses.replace(f, scale=f.scale * strength) for path, f in self.factors.items()}
        return dataclasses.replace(self, factors=factors)
