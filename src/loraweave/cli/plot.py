"""``loraweave plot``: a heat map of the weights that each gate site gives to each expert."""

from __future__ import annotations

import argparse
import sys

from loraweave.cli.verb import Verb, add_generation, add_masks, positive
from loraweave.errors import LoraweaveError


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("mixture", metavar="MIXTURE", help="folder or hub id of a saved mixture, or a recipe (.yaml)")
    parser.add_argument("-o", "--out", metavar="FILE", required=True, help=".png, .pdf or .svg")
    parser.add_argument("--input", metavar="TEXT", nargs="+", help="what to answer while the weights are read")
    parser.add_argument(
        "--data", metavar="FILE", help="or: .jsonl, zoo:FAMILY/VARIANT, or a recipe, one picture for each of its tests"
    )
    parser.add_argument("--limit", type=positive, metavar="N", default=32, help="most items per task (default: 32)")
    parser.add_argument("--title", default="", help="stands above the picture")
    add_masks(parser)
    add_generation(parser)


def _run(options: argparse.Namespace) -> None:
    from loraweave.cli import building
    from loraweave.reporting.plots import heat_maps

    recipe = building.recipe_of(options.mixture)
    inputs: dict[str, list[str]] = {}
    if options.input:
        inputs = {"": options.input}
    elif options.data or (recipe is not None and recipe.data.by_task()):
        tests = building.held_out(recipe, options.data, None, options.limit)
        inputs = {name: [example.input for example in test.examples] for name, test in tests.items()}
    opened = building.open_mixture(options.mixture, recipe)
    # CAT's gates learn weights that no input changes; they tell them themselves.
    if not inputs and any(not hasattr(gate, "constant") for gate in opened.mixture.gates.values()):
        raise LoraweaveError("the weights of these gates depend on the input: give --input TEXT or --data FILE")
    settings = building.generation(recipe, options)
    with building.masked(opened.mixture, options):
        panels = building.average_weights(
            opened.mixture, opened.tokenizer, inputs, progress=sys.stderr.isatty(), **settings
        )
    heat_maps(panels, opened.mixture.experts, options.out, options.title)
    print(f"drew {options.out}")


VERB = Verb(
    name="plot",
    summary="draw what each gate gives to each expert",
    details="Draw a heat map of the mean weight that each gate site gives to each expert, while it answers.",
    examples=[
        ("loraweave plot out/mixture -o weights.png --data test.jsonl", "on a file"),
        ("loraweave plot out/mixture -o weights.png --data examples/zoo.yaml", "one picture per task"),
        ("loraweave plot out/mixture -o weights.png --input 'sort: pear fig apple'", "on one input"),
    ],
    arguments=_arguments,
    run=_run,
)
