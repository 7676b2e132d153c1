"""Keeping the mixing weights of some calls, for logs and pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loraweave.mixing.site import Site


class Record:
    """Mixing weights seen while it listened.

    Attributes:
        weights: site name -> the weights of its last pass, ``[rows or 1, tokens or 1, E]``.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self.weights: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, float] = {}
        for site in sites:
            if site.constant is not None:
                self._add(site.name, site.constant.view(1, 1, -1).float(), None)

    def note(self, site: Site) -> None:
        assert site.current is not None
        g = site.current.dense.detach().float()
        mask = site.stream.mask
        self._add(site.name, g, mask if mask is not None and mask.shape == g.shape[:2] else None)

    def _add(self, name: str, g: Tensor, mask: Tensor | None) -> None:
        self.weights[name] = g
        kept = torch.ones(g.shape[:2], device=g.device) if mask is None else mask.to(g)
        total = (g * kept.unsqueeze(-1)).sum((0, 1))
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._counts[name] = self._counts.get(name, 0.0) + float(kept.sum())

    def average(self) -> dict[str, list[float]]:
        """Site name -> mean weight of each expert over rows, real tokens and passes."""
        return {name: (total / max(self._counts[name], 1.0)).tolist() for name, total in self._sums.items()}
