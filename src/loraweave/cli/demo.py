"""``loraweave demo``: the main job on what is bundled."""

from __future__ import annotations

import argparse
from importlib import resources

from loraweave.cli.verb import Verb, positive

RECIPE = "demo.yaml"
IMAGES = {"steps": 60, "sets": 3, "denoising_steps": 25}


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", "-o", metavar="DIR", help="where it all goes (default: out/demo, or out/demo-images)")
    parser.add_argument("--images", action="store_true", help="compose the bundled LoRAs of the image pipeline instead")
    parser.add_argument(
        "--seeds", type=positive, metavar="N", help="how many seeds to train with (default: 5), or to paint with (2)"
    )
    parser.add_argument("--quick", action="store_true", help="one seed, few steps and items: does it run at all?")


def _run(options: argparse.Namespace) -> None:
    if options.images:
        from loraweave.cli.demo_images import demo

        size = {"steps": 2, "sets": 1, "denoising_steps": 4} if options.quick else IMAGES
        demo(options.out or "out/demo-images", seeds=options.seeds or (1 if options.quick else 2), **size)
    else:
        _of_text(options)


def _of_text(options: argparse.Namespace) -> None:
    from loraweave.cli.comparing import compare
    from loraweave.recipe import load_recipe

    overrides = []
    if options.quick:
        overrides = ["train.seeds=[0]", "train.steps=10", "data.train_items=40", "data.test_items=10"]
    if options.seeds:
        overrides.append(f"train.seeds={list(range(options.seeds))}")
    with resources.as_file(resources.files("loraweave.cli") / RECIPE) as path:
        recipe = load_recipe(path, overrides)
    compare(recipe, options.out or "out/demo", fresh=True)


VERB = Verb(
    name="demo",
    summary="see it work, offline: 8 bundled LoRAs on the bundled model, 3 minutes on 2 cores",
    details="Attach 8 bundled LoRAs to the bundled model, train MoLE gates on generated examples of each skill, and\n"
    "compare with the bare model, each LoRA alone, the sum and the average. The same as 'loraweave compare' on a\n"
    "recipe that comes with the package. Needs no network.\n"
    "With --images: compose 2 to 5 bundled LoRAs of the bundled image pipeline by every method, train MoLE gates by\n"
    "CLIP's judgement, and leave a contact sheet and a table of scores.",
    examples=[
        ("loraweave demo --out out/demo", "results.json, weights.png and the mixture in out/demo"),
        ("loraweave demo --images", "sheet.png, results.json and the mixture in out/demo-images"),
        ("loraweave demo --quick", "half a minute, to see whether it runs"),
    ],
    arguments=_arguments,
    run=_run,
)
