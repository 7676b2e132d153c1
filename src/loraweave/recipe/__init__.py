"""Recipes: YAML files from which mixtures are built, trained and compared; see :mod:`loraweave.recipe.recipe`."""

from loraweave.recipe.methods import Contender, Contestant, Method
from loraweave.recipe.parts import ZOO, ZOO_IMAGES, ZOO_PREFIX, Data, Generation, Task, Train
from loraweave.recipe.recipe import Recipe, check_recipe, load_recipe, recipe_schema

__all__ = [
    "ZOO",
    "ZOO_IMAGES",
    "ZOO_PREFIX",
    "Contender",
    "Contestant",
    "Data",
    "Generation",
    "Method",
    "Recipe",
    "Task",
    "Train",
    "check_recipe",
    "load_recipe",
    "recipe_schema",
]
