"""Regional: every expert in its own part of the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from loraweave.errors import LoraweaveError, unknown
from loraweave.mixing.stream import Canvas
from loraweave.mixing.types import Evidence, SitePlan, Weights
from loraweave.policies import masks
from loraweave.policies.registry import register


@register
@dataclass(frozen=True)
class Regional:
    """The weight of an expert at a place is its mask there; where masks overlap, experts add up.

    Masks are resized by area to the resolution of every layer that computes on places: attention, feed-forward and
    convolution layers of a UNet, picture tokens of a transformer. What has no place (text encoders, keys and values of
    the prompt, time embeddings) takes each expert at its mask's largest value.

    Args:
        regions: expert -> its mask: a box ``(x0, y0, x1, y1)`` in fractions of width and height; an array or tensor
            ``[height, width]`` or a picture, 0 for off and 1 (255) for on; the path of a picture; or ``None`` for
            everywhere. Experts that are not named are off.
    """

    regions: Mapping[str, Any]

    name: ClassVar[str] = "regional"
    source: ClassVar[str] = "https://arxiv.org/abs/2305.18292"
    granularity: ClassVar[Literal["matrix"]] = "matrix"
    normalized: ClassVar[bool] = False
    mix: ClassVar[Literal["deltas"]] = "deltas"

    def __post_init__(self) -> None:
        if not isinstance(self.regions, Mapping) or not self.regions:
            raise LoraweaveError(f"regional regions: expected expert -> mask, got {self.regions!r}")
        read = {name: masks.read(f"mask of {name!r}", mask) for name, mask in self.regions.items()}
        object.__setattr__(self, "_masks", read)

    def check(self, sites: Sequence[SitePlan]) -> None:
        experts = sites[0].experts
        for name in self.regions:
            if name not in experts:
                raise unknown("expert", name, experts)
        if not any(site.spatial for site in sites):
            raise LoraweaveError("regional: no expert extends a layer that computes on places in a picture")

    def constant(self, site: SitePlan) -> Tensor | None:
        return None if site.spatial else self.peaks(site.experts)

    def gate(self, site: SitePlan) -> nn.Module | None:
        return RegionalGate(self, site) if site.spatial else None

    def peaks(self, experts: Sequence[str]) -> Tensor:
        """``[E]``: the largest value of each mask."""
        return torch.tensor([self.mask(name).peak if name in self.regions else 0.0 for name in experts]).double()

    def mask(self, name: str) -> masks.Mask:
        read: Mapping[str, masks.Mask] = self._masks  # type: ignore[attr-defined]
        return read[name]

    def grid(self, experts: Sequence[str], height: int, width: int) -> Tensor:
        """``[height * width, E]``, row by row."""
        off = torch.zeros(height, width)
        drawn = [self.mask(name).draw(height, width) if name in self.regions else off for name in experts]
        return torch.stack(drawn, dim=-1).flatten(0, 1)


class RegionalGate(nn.Module):
    """The masks at one site's resolution; nothing is learned."""

    normalized = False
    reads_canvas = True

    def __init__(self, policy: Regional, site: SitePlan) -> None:
        super().__init__()
        self.policy, self.site = policy, site
        self.kept: Tensor | None = None
        self.drawn: dict[tuple[Any, ...], Tensor] = {}

    def keep(self, kept: Tensor | None) -> None:
        self.kept = kept
        self.drawn.clear()

    def forward(self, evidence: Evidence) -> Weights:
        canvas, tokens = evidence.stream.canvas, evidence.hidden.shape[1]
        key = (evidence.grid, evidence.pooled, tokens, canvas, evidence.hidden.device)
        if key not in self.drawn:
            g = self.weights(evidence.grid, None if evidence.pooled else tokens, canvas).float()
            g = g if self.kept is None else g * self.kept
            self.drawn = {key: g.unsqueeze(0).to(evidence.hidden.device)}
        return Weights(self.drawn[key])

    def weights(self, grid: tuple[int, int] | None, tokens: int | None, canvas: Canvas | None) -> Tensor:
        """``[tokens or 1, E]``.

        Raises:
            LoraweaveError: the tokens are not the cells of the picture at any resolution.
        """
        policy, experts = self.policy, self.site.experts
        if grid is not None:
            return policy.grid(experts, *grid)
        if tokens is None:
            return policy.peaks(experts).unsqueeze(0)
        if canvas is not None:
            height, width = canvas.height, canvas.width
            before = canvas.text if canvas.text and tokens == canvas.text + height * width else 0
            while height * width > tokens - before and max(height, width) > 1:
                height, width = -(-height // 2), -(-width // 2)
            if height * width == tokens - before:
                cells = policy.grid(experts, height, width)
                return torch.cat([policy.peaks(experts).to(cells).expand(before, -1), cells])
        picture = "a picture of unknown size" if canvas is None else f"a {canvas.width} x {canvas.height} picture"
        raise LoraweaveError(
            f"regional: {self.site.members[0]!r} reads {tokens} tokens, which are not the cells of {picture} at any "
            "resolution; this model is not supported"
        )
