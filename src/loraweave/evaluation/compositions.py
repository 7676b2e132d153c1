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
    pictures that show what the LoRA paints. ``distinct``: share of its LoRAs whose words are nearer to the picture than
    those of every LoRA of the same layer and those of every element of that layer that the base knows.
    """

    def __init__(self) -> None:
        self._clip = Clip("zoo:images/clip-metrics")
        self._references = images.references()
        known = (*images.BASE, *images.HELD_OUT.values())
        self._words = {layer: [e.words for e in known if e.layer == layer] for layer in images.LAYERS}
        self._phrases = {layer: self._clip.texts(words) for layer, words in self._words.items()}

    def scores(self, composition: images.Composition, pictures: Sequence[Image]) -> list[dict[str, float]]:
        """One of :data:`MEASURES` each, for pictures painted with the composition's prompt."""
        features = self._clip.pictures(pictures)
        text = features @ self._clip.texts([composition.prompt])[0]
        shown = torch.stack([features @ self._references[name] for name in composition.loras]).mean(0)
        found = torch.stack([self._nearest(name, features) for name in composition.loras]).mean(0)
        columns = (text.tolist(), shown.tolist(), found.tolist())
        return [dict(zip(MEASURES, row, strict=True)) for row in zip(*columns, strict=True)]

    def _nearest(self, name: str, features: torch.Tensor) -> torch.Tensor:
        element = images.HELD_OUT[name]
        nearest = (features @ self._phrases[element.layer].T).argmax(-1)
        return (nearest == self._words[element.layer].index(element.words)).float()
