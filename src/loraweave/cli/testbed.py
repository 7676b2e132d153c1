"""``loraweave testbed``: the sets of elements of a test bed, listed or painted by several methods."""

from __future__ import annotations

import argparse

from loraweave.cli.verb import Verb, positive


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file with a section 'testbed'")
    parser.add_argument(
        "-o", "--out", metavar="DIR", help="where pictures and trained gates go; without it the sets are listed"
    )
    parser.add_argument("--set", metavar="ID", action="append", default=[], help="this set alone; may be given again")
    parser.add_argument("--limit", type=positive, metavar="N", help="that many sets, evenly spread (default: all)")
    parser.add_argument("--clip", metavar="MODEL", help="score the pictures with this CLIP model; needs -o")
    parser.add_argument("--dino", metavar="MODEL", help="and with this DINO model; needs --clip")
    parser.add_argument("--small", action="store_true", help="the recipe's small form, on what is bundled")
    parser.add_argument("overrides", metavar="FIELD=VALUE", nargs="*", help="recipe fields, e.g. testbed.steps=30")


def _run(options: argparse.Namespace) -> None:
    from loraweave.errors import LoraweaveError
    from loraweave.recipe import load_recipe

    for given, needed in (("clip", "out"), ("dino", "clip")):
        if getattr(options, given) is not None and getattr(options, needed) is None:
            raise LoraweaveError(f"--{given} goes with --{needed}; give both")
    recipe = load_recipe(options.recipe, options.overrides, small=options.small)
    if options.out is None:
        from loraweave.evaluation.testbed import listed

        for line in listed(recipe, options.set, options.limit):
            print(line)
        return
    from loraweave.cli.testbed_painting import paint

    paint(recipe, options.out, options.set, options.limit, clip=options.clip, dino=options.dino)


VERB = Verb(
    name="testbed",
    summary="paint the sets of elements of a test bed by several methods",
    details="List the sets of elements of a recipe's test bed as JSON, or paint each by all methods of 'compare'.\n"
    "Leaves pictures and pictures.jsonl, which loraweave judge reads. Pictures that are there are not painted again.\n"
    "Where the recipe has a section 'images', methods that learn are trained first, once, and kept in DIR/gates; an\n"
    "interrupted training goes on with the same command.\n"
    "With --clip they are scored: text alignment, image alignment where elements have references, distinctness.",
    examples=[
        ("loraweave testbed recipes/composlora/anime.yaml", "the sets and their prompts"),
        ("loraweave testbed recipes/composlora/anime.yaml -o out/anime --limit 24", "paint some of them"),
        (
            "loraweave testbed recipes/mole/table02/n3.yaml --small -o out/n3 --clip zoo:images/clip-metrics",
            "the bundled form of a table, painted and scored",
        ),
    ],
    arguments=_arguments,
    run=_run,
)
