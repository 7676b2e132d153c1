"""``loraweave image``: one prompt, painted by several methods."""

from __future__ import annotations

import argparse

from loraweave.cli.verb import Verb, finite, positive


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file whose 'base' is a diffusers pipeline")
    parser.add_argument("--prompt", metavar="TEXT", required=True, help="what to paint")
    parser.add_argument("--negative", metavar="TEXT", help="what to keep away from")
    parser.add_argument(
        "--method", metavar="NAME", action="append", default=[],
        help="switch, composite, merge, nla, bare, a label of the recipe's 'compare', or the folder of a mixture that "
        "'loraweave train' saved; may be given several times "
        "(default: all of 'compare', or else 'method')",
    )  # fmt: skip
    parser.add_argument("-o", "--out", metavar="DIR", required=True, help="where pictures, sheet and JSON go")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one picture of each (default: 0)")
    parser.add_argument("--steps", type=positive, metavar="N", default=50, help="denoising steps (default: 50)")
    parser.add_argument("--guidance", type=finite, metavar="X", help="guidance scale (default: the pipeline's)")
    parser.add_argument("--size", type=positive, nargs=2, metavar=("WIDTH", "HEIGHT"), help="default: the pipeline's")
    parser.add_argument("overrides", metavar="FIELD=VALUE", nargs="*", help="recipe fields to set, e.g. method.every=2")


def _run(options: argparse.Namespace) -> None:
    from loraweave.cli.painting import paint
    from loraweave.recipe import load_recipe

    paint(load_recipe(options.recipe, options.overrides), options)


VERB = Verb(
    name="image",
    summary="one prompt, painted by several methods",
    details="Paint a prompt with the recipe's LoRAs, by one or several methods, with the same seeds.\n"
    "Leaves the pictures, a labelled contact sheet and image.json with seeds, versions, times and settings.\n"
    "What each method will cost is said before it starts.",
    examples=[
        (
            "loraweave image hero.yaml --prompt 'hero in a coat' --method switch --method composite -o out/",
            "side by side",
        ),
        (
            "loraweave image hero.yaml --prompt 'hero in a coat' -o out/ --seed 0 1 2 --steps 30",
            "by the recipe's methods",
        ),
        (
            "loraweave image examples/images.yaml --prompt 'hero in a coat' --method out/gated --method nla -o out/",
            "by gates that 'loraweave train' has learned",
        ),
    ],
    arguments=_arguments,
    run=_run,
)
