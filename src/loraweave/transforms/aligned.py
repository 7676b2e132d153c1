"""The method that runs inside an aligned space (KnOTS, Core Space)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from loraweave.errors import LoraweaveError
from loraweave.transforms import checks
from loraweave.transforms.elementwise import DENSITY, Elementwise, combine
from loraweave.transforms.types import Term, generator


@dataclass(frozen=True)
class Inner:
    """A number-by-number method with its options; ``density`` is the method's own default where not given."""

    owner: str
    then: Elementwise
    density: float | None
    seed: int

    def __post_init__(self) -> None:
        if self.density is None:
            return
        checks.density(self.owner, self.density)
        if self.then == "linear":
            raise LoraweaveError(f"{self.owner} density: then='linear' keeps everything; leave density out")

    def merge(self, terms: Sequence[Term], coordinates: Sequence[Tensor]) -> Tensor:
        """Merge the experts' coordinates, one tensor per term, all of one shape."""
        density = DENSITY.get(self.then, 1.0) if self.density is None else self.density
        weights = [term.weight for term in terms]
        return combine(
            self.then, coordinates, weights, density, lambda number: generator(self.seed, terms[number], self.owner)
        )
