"""Test compositions: which LoRAs go together in one picture, and the prompt that asks for them."""

from __future__ import annotations

import random
from dataclasses import dataclass

from loraweave.errors import LoraweaveError
from loraweave.zoo.images.elements import HELD_OUT, LAYERS, Element, by_layer, caption


@dataclass(frozen=True)
class Composition:
    """One picture to paint: ``loras`` (names, bottom layer first), ``prompt``, and ``elements`` (layer to element),
    which decide the exact reference picture."""

    loras: tuple[str, ...]
    prompt: str
    elements: dict[str, Element]


def compositions(n: int, size: int, seed: int = 0) -> list[Composition]:
    """Random sets of LoRAs for one picture each, as in ComposLoRA: always one character, and never two of a layer.

    A floor that no LoRA brings is drawn from what the base knows, so that every prompt has one.

    Args:
        n: how many.
        size: LoRAs in each, 1 to 6.
        seed: the same seed gives the same list, and a longer list starts with a shorter one.

    Raises:
        LoraweaveError: ``size`` is out of range, or ``n`` is negative.
    """
    layers = {layer: [name for name, e in HELD_OUT.items() if e.layer == layer] for layer in LAYERS}
    others = [layer for layer, names in layers.items() if names and layer != "character"]
    if not 1 <= size <= 1 + len(others):
        raise LoraweaveError(f"size: expected 1 to {1 + len(others)} LoRAs in a composition, got {size}")
    if n < 0:
        raise LoraweaveError(f"n: expected a number of compositions, got {n}")
    rng = random.Random(f"compositions|{size}|{seed}")
    floors = by_layer()["floor"]
    made = []
    for _ in range(n):
        chosen = {"character", *rng.sample(others, size - 1)}
        names = tuple(rng.choice(layers[layer]) for layer in LAYERS if layer in chosen)
        floor = rng.choice(floors)
        elements = {"floor": floor} | {HELD_OUT[name].layer: HELD_OUT[name] for name in names}
        made.append(Composition(names, caption(elements), elements))
    return made
