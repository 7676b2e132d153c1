"""Which sets of a test bed are painted, and what is told about them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from loraweave.errors import LoraweaveError, unknown
from loraweave.recipe import Recipe
from loraweave.recipe.testbeds import CompositionSet, Testbed


def testbed_of(recipe: Recipe) -> Testbed:
    """The recipe's test bed. Raises :class:`LoraweaveError` if it has none."""
    if recipe.testbed is None:
        raise LoraweaveError("testbed: the recipe has no such section, so there are no sets of elements")
    return recipe.testbed


def chosen_sets(testbed: Testbed, ids: Sequence[str] = (), limit: int | None = None) -> list[CompositionSet]:
    """The sets named by ``ids``, or all; ``limit`` of them, evenly spread, so that every size keeps its share.

    Raises:
        LoraweaveError: an unknown set.
    """
    sets = {one.id: one for one in testbed.sets()}
    for name in ids:
        if name not in sets:
            raise unknown("set", name, sets)
    chosen = [sets[name] for name in dict.fromkeys(ids)] or list(sets.values())
    if limit is None or limit >= len(chosen):
        return chosen
    return [chosen[n * len(chosen) // limit] for n in range(limit)]


def listed(recipe: Recipe, ids: Sequence[str] = (), limit: int | None = None) -> Iterator[str]:
    """A line of JSON for each set: ``id``, ``experts``, ``elements`` and ``prompts``."""
    testbed = testbed_of(recipe)
    for one in chosen_sets(testbed, ids, limit):
        row = {
            "id": one.id,
            "experts": list(one.experts),
            "elements": testbed.described(one),
            "prompts": testbed.prompts_of(one),
        }
        yield json.dumps(row, ensure_ascii=False)
