"""Compositions are seeded, complete, and of one character each; elements are told apart by their words."""

from __future__ import annotations

import pytest

from loraweave.errors import LoraweaveError
from loraweave.zoo import images


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6])
def test_one_character_and_no_layer_twice(size: int) -> None:
    for made in images.compositions(40, size, seed=3):
        layers = [images.HELD_OUT[name].layer for name in made.loras]
        assert layers.count("character") == 1
        assert len(set(layers)) == len(layers) == size
        assert layers == sorted(layers, key=images.LAYERS.index)
        assert all(images.HELD_OUT[name].words in made.prompt for name in made.loras)
        assert {made.elements[layer] for layer in layers} == {images.HELD_OUT[name] for name in made.loras}
        assert set(made.elements) == {*layers, "floor"}


def test_a_seed_decides_and_a_longer_list_starts_alike() -> None:
    assert images.compositions(9, 4, seed=1)[:5] == images.compositions(5, 4, seed=1)
    assert images.compositions(5, 4, seed=1) != images.compositions(5, 4, seed=2)


@pytest.mark.parametrize(("n", "size", "field"), [(1, 0, "size"), (1, 7, "size"), (-1, 2, "n")])
def test_bad_numbers_are_named(n: int, size: int, field: str) -> None:
    with pytest.raises(LoraweaveError, match=f"^{field}: expected"):
        images.compositions(n, size)


def test_words_and_tiles_are_unique_and_held_out_ones_start_with_a_rare_word() -> None:
    everything = (*images.BASE, *images.HELD_OUT.values())
    assert len({e.words for e in everything}) == len({e.tile for e in everything}) == len(everything)
    common = {word for e in images.BASE for word in e.words.split()}
    assert not common & {e.words.split()[0] for e in images.HELD_OUT.values()}


def test_a_caption_written_out() -> None:
    known = {(e.layer, e.words): e for e in images.BASE}
    parts = {"character": "human", "clothing": "red robe", "cloak": "blue cloak", "hand2": "torch", "floor": "grass"}
    elements = {layer: known[layer, words] for layer, words in parts.items()}
    told = "a human in a red robe and a blue cloak, with a torch, on grass"
    assert images.caption(elements) == told
    assert images.caption(elements, "quill sketch") == f"quill sketch, {told}"
