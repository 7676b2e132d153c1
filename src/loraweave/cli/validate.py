"""``loraweave validate``: is a recipe right, and what does it need that is not here?"""

from __future__ import annotations

import argparse

from loraweave.cli.verb import Verb


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipes", metavar="RECIPE", nargs="+", help="YAML files")
    parser.add_argument("--fields", action="store_true", help="check the fields alone, not which files are there")


def _run(options: argparse.Namespace) -> None:
    from pathlib import Path

    from loraweave.errors import LoraweaveError
    from loraweave.recipe import load_recipe
    from loraweave.recipe.needs import needs

    missing = 0
    for path in options.recipes:
        recipe = load_recipe(path)
        if recipe.small:
            load_recipe(path, small=True)
        forms = "and its small form are" if recipe.small else "is"
        print(f"{path}: every field {forms} right")
        if recipe.testbed is not None:
            sets = recipe.testbed.sets()
            sizes = sorted({len(one.experts) for one in sets})
            counts = ", ".join(f"{sum(len(one.experts) == size for one in sets)} of {size}" for size in sizes)
            print(f"  sets of elements: {len(sets)} ({counts})")
        if options.fields:
            continue
        found = needs(recipe, Path(path).parent)
        for state, words in (("hub", "from the hub, when needed"), ("bundled", "bundled"), ("here", "here")):
            if count := sum(need.state == state for need in found):
                print(f"  {count} {words}")
        for need in found:
            if need.state == "missing":
                missing += 1
                print(f"  missing: {need.source} ({need.what}){f'; from {need.origin}' if need.origin else ''}")
    if missing:
        raise LoraweaveError(f"{missing} files or folders are missing; the recipes' fields are right")


VERB = Verb(
    name="validate",
    summary="check recipes: every field, and which files are missing",
    details="Check recipes without loading anything: every field, of the recipe and of its small form; the sets a\n"
    "test bed has; and which of the files it names are missing, with where they come from if the recipe says so.\n"
    "Nothing is looked up on the hub.",
    examples=[
        ("loraweave validate recipe.yaml", "one recipe"),
        ("loraweave validate recipes/mole/*/*.yaml --fields", "many, whatever files are there"),
    ],
    arguments=_arguments,
    run=_run,
)
