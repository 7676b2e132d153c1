"""Standard scores of a gate's evidence: measured before training, so that its steps are of one size everywhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

FLOOR = 0.1
"""Coordinates that hardly vary are noise: none is divided by less than this share of the root mean square spread."""


class Standard(nn.Module):
    """Mean and spread of each coordinate of normalised evidence.

    Hidden states have a large part in common, whatever the input, and a few coordinates that dwarf the others; what
    tells two tasks apart is small beside both. Adam moves every coordinate of a gate by the same amount, so a gate on
    raw evidence first learns what is large. With ``v`` the normalised evidence the gate reads ``(v - center) / spread``
    instead: the same functions of ``v``, up to a bias, with other first steps.

    Frozen parameters, saved with the gate: ``center`` and ``spread``, ``[C]``; zero and one until measured.
    """

    def __init__(self, coordinates: int, **like: Any) -> None:
        super().__init__()
        self.center = nn.Parameter(torch.zeros(coordinates, **like), requires_grad=False)
        self.spread = nn.Parameter(torch.ones(coordinates, **like), requires_grad=False)
        self._sums: Tensor | None = None

    def forward(self) -> tuple[Tensor, Tensor]:
        """Center and spread. Where parameters are offloaded they are only there while a module is called."""
        return self.center, self.spread

    @property
    def measured(self) -> bool:
        """Whether :meth:`finish` has ever been called, here or before the gate was saved."""
        return bool((self.spread != 1).any() or (self.center != 0).any())

    @property
    def measuring(self) -> bool:
        return self._sums is not None

    def start(self) -> None:
        """From now on :meth:`note` adds up."""
        self._sums = torch.zeros(3, self.center.numel(), device=self.center.device, dtype=torch.float64)

    def note(self, v: Tensor, mask: Tensor | None) -> None:
        """Add vectors ``[rows, tokens, C]``, of those tokens that the mask ``[rows, tokens]`` keeps."""
        assert self._sums is not None
        kept = (v.flatten(0, 1) if mask is None else v[mask.bool()]).detach().double()
        self._sums += torch.stack([torch.full_like(self._sums[0], len(kept)), kept.sum(0), kept.square().sum(0)])

    def sums(self) -> Tensor:
        """``[3, C]``: how many vectors, their sum and their sum of squares; of several processes they add up."""
        assert self._sums is not None
        return self._sums

    def stop(self) -> None:
        """Add up no more, and forget the sums."""
        self._sums = None

    @torch.no_grad()
    def finish(self, sums: Tensor) -> None:
        """Take mean and standard deviation from :meth:`sums`."""
        self.stop()
        count, total, squares = sums
        if count[0] < 2:
            return
        mean = total / count
        spread = (squares / count - mean.square()).clamp(min=0).sqrt()
        smallest = FLOOR * spread.square().mean().sqrt()
        if smallest > 0:
            self.center.copy_(mean)
            self.spread.copy_(spread.clamp(min=smallest))
