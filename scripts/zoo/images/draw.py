"""Draws exact pictures from the tiles in the data folder, and their captions."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from loraweave.zoo.images.elements import BASE, HELD_OUT, LAYERS, Element, by_layer, caption

Picture = dict[str, Element]
"""Layer to element."""

CHANCES = {"floor": 0.92, "cloak": 0.35, "character": 1.0, "clothing": 0.8, "hand1": 0.6, "hand2": 0.55, "head": 0.45}
"""How often a random picture has a part."""
PLAIN = (150, 150, 150)
"""The colour behind a picture without a floor."""


class Tiles:
    """All known tiles as one tensor; draws pictures in (-1, 1), (n, 3, 32, 32)."""

    def __init__(self, data: Path) -> None:
        folder = data / "crawl_tiles"
        rows = [json.loads(line) for line in (folder / "labels.jsonl").read_text(encoding="utf-8").splitlines()]
        where = {row["path"]: row["index"] for row in rows}
        images = np.load(folder / "images.npz")["images"]
        self.elements = (*BASE, *HELD_OUT.values())
        self.number = {element: i + 1 for i, element in enumerate(self.elements)}
        chosen = np.stack([images[where[element.tile]] for element in self.elements])
        tiles = torch.from_numpy(chosen).permute(0, 3, 1, 2).float() / 255
        empty = torch.zeros(1, 4, 32, 32)
        self.tiles = torch.cat([empty, tiles])
        self.tiles[:, :3] = self.tiles[:, :3] * 2 - 1
        opaque = torch.from_numpy(images[[row["index"] for row in rows]]).permute(0, 3, 1, 2)
        self.everything = opaque  # uint8, for the autoencoder

    def draw(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """The exact pictures."""
        ids = torch.tensor([[self.number[p[layer]] if layer in p else 0 for layer in LAYERS] for p in pictures])
        made = (torch.tensor(PLAIN).float() / 127.5 - 1).view(1, 3, 1, 1).expand(len(pictures), 3, 32, 32)
        for column in range(len(LAYERS)):
            layer = self.tiles[ids[:, column]]
            made = torch.lerp(made, layer[:, :3], layer[:, 3:])
        return made


_BY_LAYER = by_layer()


def random_picture(rng: random.Random, chances: dict[str, float] = CHANCES, known: dict | None = None) -> Picture:
    """A random composition of what the base knows (or of ``known``, layer to elements)."""
    known = known or _BY_LAYER
    return {layer: rng.choice(known[layer]) for layer in LAYERS if known[layer] and rng.random() < chances[layer]}


def told(rng: random.Random, picture: Picture) -> str:
    """The caption of a picture; a tenth of them leave out some of what is seen."""
    if rng.random() < 0.1:
        picture = {k: v for k, v in picture.items() if k == "character" or rng.random() < 0.7}
    return caption(picture)
