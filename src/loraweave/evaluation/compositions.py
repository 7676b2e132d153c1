"""How well pictures of the bundled image zoo show the elements they should: per picture, by ``clip-metrics``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from loraweave.evaluation.image_metrics import Clip
from loraweave.zoo import images

if TYPE_CHECKING:
    from PIL.Image import Image

MEASURES = ("text", "image", "distinct")


class CompositionJudge:
    """Scores pictures of :func:`loraweave.zoo.images.compositions`.

    ``text``: cosine of picture and prompt. ``image``: mean over the composition's LoRAs of the mean cosine with exact
    pictures that show what the LoRA paints. ``distinct``: share of its LoRAs that are told from every other element: of
    the prompts that name another element of the same layer instead, of the base's or of other LoRAs, none is nearer.
    """

    def __init__(self) -> None:
        self._clip = Clip("zoo:images/clip-metrics")
        self._references = images.references()
        everything = (*images.BASE, *images.HELD_OUT.values())
        self._others = {layer: [e for e in everything if e.layer == layer] for layer in images.LAYERS}

    def scores(self, composition: images.Composition, pictures: Sequence[Image]) -> list[dict[str, float]]:
        """One of :data:`MEASURES` each, for pictures painted with the composition's prompt."""
        features = self._clip.pictures(pictures)
        text = features @ self._clip.texts([composition.prompt])[0]
        shown = torch.stack([features @ self._references[name] for name in composition.loras]).mean(0)
        found = torch.stack([self._told(name, composition, features) for name in composition.loras]).mean(0)
        columns = (text.tolist(), shown.tolist(), found.tolist())
        return [dict(zip(MEASURES, row, strict=True)) for row in zip(*columns, strict=True)]

    def _told(self, name: str, composition: images.Composition, features: torch.Tensor) -> torch.Tensor:
        own = images.HELD_OUT[name]
        others = self._others[own.layer]
        prompts = [images.caption(composition.elements | {own.layer: other}) for other in others]
        nearest = (features @ self._clip.texts(prompts).T).argmax(-1)
        return (nearest == others.index(own)).float()
